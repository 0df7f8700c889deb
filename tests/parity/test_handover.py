"""The weights that a gang hands to an engine are those that an export would write: every family, by name and by bytes, on any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.generate import handover
from megatron_prism.jobs import convert
from megatron_prism.parallel.groups import Groups

from .tiny import FAMILIES

LAYOUTS = {"1": (1, {}), "tp2": (2, {"tp": 2, "sequence_parallel": True}), "pp2": (2, {"pp": 2}), "dp2": (2, {})}
ONE_GROUP = "granite_h_micro"  # its mixer's one group is not split by tensor parallelism
TIED = ("granite", "granite_micro", "granite_h_micro")


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def hand_over(groups: Groups, checkpoints: dict[str, str]) -> dict[str, dict[str, str]]:
    """On a rank: load each family, halve its weights as an optimizer would change them, and return what is handed over, by name."""
    from megatron_prism.checkpoint import folder, sharded
    from megatron_prism.core.config import GangConfig, ParallelConfig
    from megatron_prism.models import build

    said = {}
    for family, ckpt in checkpoints.items():
        parallel = ParallelConfig(tp=groups.tp, pp=groups.pp, sequence_parallel=groups.tp > 1)
        model = folder.read(Path(ckpt)).model
        chunks = build.build(model, groups, GangConfig(parallel=parallel, precision="fp32", seed=0))
        sharded.load_weights(Path(ckpt), chunks)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(0.5)
        sums: dict[str, int] = {}
        named = handover.summed(handover.tensors(chunks, model, groups), sums)
        said[family] = {name: digest(tensor) for name, tensor in named}
        assert list(sums) == list(said[family])
    return said


@pytest.fixture(scope="module")
def exported(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Return what `prism convert` writes of each family."""
    from safetensors.torch import load_file

    written = {}
    for family in FAMILIES:
        out = tmp_path_factory.mktemp("exported") / family
        convert.run_export(folders[family] / "ckpt", out, dry_run=False)
        written[family] = load_file(out / "model.safetensors")
    return written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_is_handed_over_as_an_export_writes_it(
    run_distributed: Callable[..., list[Any]], folders: dict[str, Path], exported: dict[str, dict[str, torch.Tensor]], layout: str
) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    families = [family for family in FAMILIES if layout != "tp2" or family != ONE_GROUP]
    checkpoints = {family: str(folders[family] / "ckpt") for family in families}
    results = run_distributed(hand_over, num_ranks, timeout_s=300.0, parallel=parallel, checkpoints=checkpoints)
    assert all(result == results[0] for result in results), "another tensor on another rank"
    for family in families:
        wanted = {name: digest(tensor * 0.5) for name, tensor in exported[family].items()}
        assert results[0][family] == wanted, family
        assert results[0][family] != {name: digest(tensor) for name, tensor in exported[family].items()}, "the control: stale weights"
    assert all("lm_head.weight" not in results[0][family] for family in TIED if family in families)


def test_the_sums_name_what_is_wrong(exported: dict[str, dict[str, torch.Tensor]]) -> None:
    tensors = exported["granite_h_micro"]
    handed = {name: handover.sum_of(tensor) for name, tensor in tensors.items()}
    assert handover.check(handed, handed) == []
    stale = tensors["model.embed_tokens.weight"] + 1e-6
    (problem,) = handover.check(handed, handed | {"model.embed_tokens.weight": handover.sum_of(stale)})
    assert problem.where == "model.embed_tokens.weight" and "bits that sum to" in problem.found
    one, other = "model.layers.0.mamba.A_log", "model.layers.0.mamba.dt_bias"  # of the same shape
    assert tensors[one].shape == tensors[other].shape
    swapped = handed | {one: handed[other], other: handed[one]}
    assert {problem.where for problem in handover.check(handed, swapped)} == {one, other}
    lost = {name: value for name, value in handed.items() if name != one}
    assert (
        [problem.where for problem in handover.check(handed, lost)] == [one] == [problem.where for problem in handover.check(lost, handed)]
    )


def test_sums_are_exact_and_additive_over_shards() -> None:
    tensor = torch.randn(64, 32).bfloat16()
    parts = [handover.sum_of(part) for part in tensor.chunk(4, dim=1)]
    assert sum(parts) == handover.sum_of(tensor) == handover.sum_of(tensor[torch.randperm(64)])
    nudged = tensor.clone()
    nudged.view(torch.int16)[3, 5] += 1
    assert handover.sum_of(nudged) != handover.sum_of(tensor)
