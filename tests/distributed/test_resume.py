"""A run killed after step 4 or 8 and started again is the uninterrupted run: bit for bit on the same ranks, to 1e-5 on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

SAVE = {"save": {"interval": 4, "keep_last": 9}}
WHOLE: dict[str, dict[str, Any]] = {
    "dp2_plain": {"distributed_optimizer": False},
    "dp2": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2": {"tp": 2},
    "cp2": {"cp": 2},
}
HYBRID = {"nemotron": {"tp": 2, "sequence_parallel": True}, "granite_h": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
RUNS = [*WHOLE, "bf16", *HYBRID]
SPLITS = [*((run, 4) for run in RUNS), *((run, 8) for run in ("dp2", "bf16", "nemotron"))]
# a soak splits these after each of its first so many steps
SOAKED: dict[str, dict[str, Any]] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {}, "tp2 pp2": {"tp": 2, "pp": 2}}
# (a run killed after step 4, the grid it goes on with)
RESHARDED = {
    "tp2 to dp2": ("tp2", {}),
    "cp2 to dp2": ("cp2", {}),
    "dp2 to pp2 interleaved": ("dp2", {"pp": 2, "vpp": 2}),
}


@pytest.fixture(scope="module")
def configs(nemotron_checkpoint: Path, granite_h_checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return what is each run's own."""
    starts = {"nemotron": nemotron_checkpoint, "granite_h": granite_h_checkpoint}
    found: dict[str, dict[str, Any]] = {name: {"parallel": parallel, **SAVE} for name, parallel in (WHOLE | HYBRID).items()}
    for name, start in starts.items():
        found[name] |= {"init": {"checkpoint": str(start)}, "optimizer": {"lr": 1e-3}}
    return found | {"bf16": {"parallel": {}, "precision": "bf16", **SAVE}}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "step" in metafunc.fixturenames:
        steps = range(1, (metafunc.config.getoption("--soak") or 0) + 1)
        metafunc.parametrize(("run", "step"), [(run, step) for run in SOAKED for step in steps] or SPLITS)


@pytest.fixture(scope="module")
def split(gang: Any, soak: int | None, request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the unbroken runs, and those that were killed, by (run, step)."""
    if not soak:
        return request.getfixturevalue("whole"), request.getfixturevalue("resumed")
    whole: dict[str, Any] = {}
    resumed: dict[str, Any] = {}
    for run, parallel in SOAKED.items():
        processes = parallel.get("tp", 1) * parallel.get("pp", 1) if parallel else 2
        config = {"parallel": parallel, "steps": soak + 2, "save": {"interval": 1, "keep_last": soak + 2}}
        whole |= gang(processes, [{"name": run, "config": config}])
        starts = {step: {"run_dir": whole[run]["run_dir"], "step": step} for step in range(1, soak + 1)}
        resumed |= gang(processes, [{"name": f"{run} at {step}", "config": config, "start_from": start} for step, start in starts.items()])
    return whole, resumed


@pytest.fixture(scope="module")
def whole(gang: Any, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return gang(2, [{"name": name, "config": configs[name]} for name in RUNS])


@pytest.fixture(scope="module")
def resumed(gang: Any, configs: dict[str, dict[str, Any]], whole: dict[str, Any]) -> dict[str, Any]:
    def again(name: str, run: str, step: int = 4, control: str | None = None, **config: Any) -> dict[str, Any]:
        start = {"run_dir": whole[run]["run_dir"], "step": step}
        return {"name": name, "config": {**configs[run], **config}, "start_from": start, "control": control}

    cases = [again(f"{run} at {step}", run, step) for run, step in SPLITS]
    cases += [again(name, run, parallel=parallel) for name, (run, parallel) in RESHARDED.items()]
    return gang(2, [*cases, again("control", "dp2", control="shared_step")])


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's last checkpoint, the optimizer's too."""
    from megatron_prism.checkpoint import folder, torch_dist

    reader = torch_dist.TensorReader(folder.read(Path(run_dir)).state)
    return {key: reader.read(key, shape) for key, shape in reader.shapes().items()}


def test_resume_is_bit_equal(split: tuple[dict[str, Any], dict[str, Any]], soak: int | None, run: str, step: int) -> None:
    whole, found = split[0], split[1][f"{run} at {step}"]
    assert len(found["loss"]) == (soak + 2 if soak else 10)
    assert found["loss"] == whole[run]["loss"]
    assert found["grad_norm"] == whole[run]["grad_norm"]
    ours, theirs = weights(found["run_dir"]), weights(whole[run]["run_dir"])
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in key for key in ours)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("name", RESHARDED)
def test_resume_on_another_layout(whole: dict[str, Any], resumed: dict[str, Any], name: str) -> None:
    run, _ = RESHARDED[name]
    for metric in ("loss", "grad_norm"):
        assert resumed[name][metric][4:] == pytest.approx(whole[run][metric][4:], abs=1e-5)


def test_control_is_seen(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    """One step counter shared by all parameters, as Megatron-Core restores it beside torch's AdamW, moves the losses."""
    found, right = resumed["control"]["loss"], whole["dp2"]["loss"]
    assert found[:5] == right[:5]  # step 5 still runs on the restored weights
    assert max(abs(a - b) for a, b in zip(found[5:], right[5:], strict=True)) > 1e-4


def test_a_finished_run_is_left_alone(whole: dict[str, Any], gang: Any) -> None:
    """Started once more, a run at its last step trains nothing and keeps its checkpoint and metrics."""
    run_dir = Path(whole["dp2"]["run_dir"])
    before = (run_dir / "metrics.jsonl").read_text(), (run_dir / "checkpoints" / "latest").read_text()
    gang(2, [{"name": "again", "config": {"run_dir": str(run_dir), "parallel": WHOLE["dp2"], **SAVE}}])
    assert ((run_dir / "metrics.jsonl").read_text(), (run_dir / "checkpoints" / "latest").read_text()) == before
    assert json.loads((run_dir / "manifest.json").read_text())["kind"] == "run"
