"""Runs cut off after step 4 of 6 and resumed, with what the distributed tests cannot have: an offloaded optimizer, generators that are drawn from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.checkpoint import at_rest, run_folder
from megatron_prism.checkpoint.torch_dist import TensorReader

from .conftest import losses


@pytest.fixture
def cut_off(run_cases: Any, tmp_path: Path) -> Any:
    """Return a function that trains a run, then a copy of it from step 4 on, both with a fault built in; it returns the two folders."""

    def both(fault: dict[str, Any], **config: Any) -> tuple[Path, Path]:
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        for run_dir in (whole, resumed):
            if run_dir is resumed:
                shutil.copytree(whole, resumed)
                shutil.rmtree(run_folder.step_folder(resumed, 6))
            case = {"name": "run", "run_dir": run_dir, "config": {"save": {"keep_last": 9}, **config}, "fault": fault}
            found = run_cases([case])["run"]
            assert found["code"] == 0, found["stderr"][-4000:]
        assert "continuing after step 4" in found["stderr"]
        return whole, resumed

    return both


def test_a_run_with_an_offloaded_optimizer_goes_on_as_if_unbroken(cut_off: Any) -> None:
    """Megatron-Core's own, half of it on the host, on a host that plays the device too (worker.play_a_device): the same losses, weights, optimizer."""
    whole, resumed = cut_off({"kind": "offloaded"}, precision="bf16", offload={"optimizer_fraction": 0.5})
    assert losses(resumed) == losses(whole) and len(set(losses(whole).values())) == 6
    tensors = [run_folder.step_folder(run_dir, 6) / "state" / "__0_0.distcp" for run_dir in (whole, resumed)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


@pytest.mark.parametrize("fp8_recipe", [None, pytest.param("tensorwise", marks=pytest.mark.slow)])
def test_a_run_with_moments_in_bf16_goes_on_as_if_unbroken(cut_off: Any, fp8_recipe: str | None) -> None:
    """Transformer Engine's own FusedAdam over multi-tensor functions in torch (tests/te/fused_adam.py): the same losses, weights, optimizer.

    It holds the main weights. An optimizer that is told of FP8 in tensorwise scales leaves them to Megatron-Core.
    """
    fault = {"kind": "fused adam", "fp8_recipe": fp8_recipe}
    whole, resumed = cut_off(fault, precision="bf16", optimizer={"lr": 3e-3, "moments": "bf16"})
    assert losses(resumed) == losses(whole) and len(set(losses(whole).values())) == 6
    tensors = [run_folder.step_folder(run_dir, 6) / "state" / "__0_0.distcp" for run_dir in (whole, resumed)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    assert dtypes(whole) == {"param": {torch.float32}, "exp_avg": {torch.bfloat16}, "exp_avg_sq": {torch.bfloat16}}
    assert at_rest.masters(at_rest.read(whole)) is not None  # `prism analyze weights --run` reads the main weights


@pytest.mark.slow
def test_moments_in_bf16_are_near_those_in_fp32_and_those_are_torchs(run_cases: Any, tmp_path: Path) -> None:
    """FusedAdam on a host with moments in fp32 is torch's AdamW to rounding; with moments in bf16 it is another optimizer, a little."""
    optimizers = {"torch": None, "fp32": {"kind": "fused adam"}, "bf16": {"kind": "fused adam"}}
    cases = [
        {
            "name": name,
            "run_dir": tmp_path / name,
            "config": {"precision": "bf16", "optimizer": {"moments": name.replace("torch", "fp32")}},
            "fault": fault,
        }
        for name, fault in optimizers.items()
    ]
    for case in cases:
        found = run_cases([case])[case["name"]]
        assert found["code"] == 0, found["stderr"][-4000:]
    torchs, fp32, bf16 = (list(losses(tmp_path / name).values()) for name in optimizers)
    assert fp32 == pytest.approx(torchs, abs=2e-3)
    assert fp32 != bf16 and bf16 == pytest.approx(fp32, abs=2e-2)


@pytest.mark.slow
def test_moments_in_bf16_go_on_over_two_ranks_and_on_another_layout(start_gang: Any, tmp_path: Path) -> None:
    whole, keys = tmp_path / "whole", {"precision": "bf16", "optimizer": {"lr": 3e-3, "moments": "bf16"}, "save": {"keep_last": 9}}

    def train(run_dir: Path, **parallel: Any) -> dict[int, float]:
        if run_dir != whole:
            shutil.copytree(whole, run_dir)
            shutil.rmtree(run_folder.step_folder(run_dir, 6))
        gang = start_gang(2, {"kind": "fused adam", "rank": None}, run_dir=str(run_dir), parallel=parallel, **keys)
        assert gang.wait(240) == 0, gang.output()[-4000:]
        return losses(run_dir)

    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    unbroken = train(whole, **overlap)
    assert train(tmp_path / "same", **overlap) == unbroken
    again, theirs = (values_of(tmp_path / name) for name in ("same", "whole"))
    assert again.keys() == theirs.keys() and [key for key in again if not torch.equal(again[key], theirs[key])] == []
    assert train(tmp_path / "tp2", tp=2) == pytest.approx(unbroken, rel=2e-3)


def test_control_a_run_keeps_the_dtype_of_its_moments(run_cases: Any, tmp_path: Path) -> None:
    """What a checkpoint has in fp32 would be rounded into bf16 in silence: the key may not change within a run."""
    config, fault = {"precision": "bf16", "steps": 2, "schedule": {"warmup_steps": 0}}, {"kind": "fused adam"}
    first = {"name": "run", "run_dir": tmp_path / "run", "config": config, "fault": fault}
    assert run_cases([first])["run"]["code"] == 0
    found = run_cases([{**first, "config": {**config, "steps": 2, "optimizer": {"moments": "bf16"}}}])["run"]
    assert found["code"] == 2 and "optimizer.moments: found bf16; required fp32, as in" in found["stderr"]


@pytest.mark.slow
def test_control_copies_of_moments_in_bf16_are_loaded_in_vain(cut_off: Any) -> None:
    """Megatron-Core hands copies in fp32 out: a run that loads into those goes on with moments of zero."""
    whole, resumed = cut_off({"kind": "fused adam", "copies": True}, precision="bf16", optimizer={"lr": 3e-3, "moments": "bf16"})
    assert losses(resumed) != losses(whole)
    tensors = [run_folder.step_folder(run_dir, 6) / "state" / "__0_0.distcp" for run_dir in (whole, resumed)]
    assert tensors[0].read_bytes() != tensors[1].read_bytes()


def dtypes(run_dir: Path) -> dict[str, set[torch.dtype]]:
    """Return the dtypes of the optimizer's values in a run's last checkpoint, by their name."""
    found: dict[str, set[torch.dtype]] = {}
    for key, dtype in TensorReader(run_folder.step_folder(run_dir, 6) / "state").dtypes().items():
        if key.startswith("optimizer.state."):
            found.setdefault(key.split(".")[2], set()).add(dtype)
    return found


def values_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's last checkpoint."""
    reader = TensorReader(run_folder.step_folder(run_dir, 6) / "state")
    return {key: reader.read(key, shape) for key, shape in reader.shapes().items()}


def test_random_generators_go_on_where_they_were(cut_off: Any) -> None:
    """The host's and Megatron-Core's, drawn from after every step: all draws differ, and those of steps 5 and 6 come again."""
    whole, resumed = cut_off({"kind": "draws"})
    first, again = [(run_dir / "draws").read_text().split() for run_dir in (whole, resumed)]
    assert len(set(first)) == 12 and again == [*first, *first[8:]]
