"""A checkpoint goes from any layout to any other: every tensor of it bit for bit, and the next steps' losses within 1e-5.

What is loaded is saved again at once, on the new layout, and the two checkpoints are compared tensor by tensor, the
optimizer's moments and main weights too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.checkpoint import folder, torch_dist

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # of five steps' loss and gradient norm
BF16_TOLERANCE = 5e-3
SAVED_AT, STEPS = 5, 10
# run: (processes, model, grid); each is killed after step 5
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp2": (2, "llama", {"tp": 2}),
    "dp2": (2, "llama", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2 bf16": (2, "llama", {}),
    "pp2": (2, "granite", {"pp": 2}),
    "hybrid tp2": (2, "nemotron", {"tp": 2}),
    "hybrid dp2": (2, "granite_h", {}),
    "tp2 pp2": (4, "llama", {"tp": 2, "pp": 2}),
}
# (the run, the processes and the grid it goes on with)
PAIRS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tp2 to dp2": ("tp2", 2, {}),
    "dp2 to tp2": ("dp2", 2, {"tp": 2}),
    "dp2 to pp2 interleaved": ("dp2", 2, {"pp": 2, "vpp": 2}),
    "dp2 to single": ("dp2", 1, {}),
    "dp2 bf16 to tp2": ("dp2 bf16", 2, {"tp": 2}),
    "pp2 tied to tp2 sp": ("pp2", 2, {"tp": 2, "sequence_parallel": True}),
    "nemotron tp2 to pp2": ("hybrid tp2", 2, {"pp": 2}),
    "granite_h dp2 to pp2": ("hybrid dp2", 2, {"pp": 2}),
    "tp2 pp2 to dp2": ("tp2 pp2", 2, {}),
}
# a soak also goes from each of these to each other
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}
EVERY_PAIR = {f"{one} to {other}": (one, *LAYOUTS[other]) for one in LAYOUTS for other in LAYOUTS if one != other}
CONTROL = "control"  # tp2 to dp2, every box read one row beside its place


def config(run: str, parallel: dict[str, Any], starts: dict[str, Path]) -> dict[str, Any]:
    """Return the config of a run, on its own grid or on another."""
    own: dict[str, Any] = {"optimizer": {"lr": 1e-3}} if run.startswith("hybrid") else {}
    precision = "bf16" if "bf16" in run else "fp32"
    start = {"checkpoint": str(starts[RUNS[run][1] if run in RUNS else "llama"])}
    save = {"interval": SAVED_AT, "keep_last": 9}
    return {"init": start, "parallel": parallel, "precision": precision, "steps": STEPS, "save": save, **own}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", {**PAIRS, **EVERY_PAIR} if metafunc.config.getoption("--soak") else PAIRS)


@pytest.fixture(scope="module")
def starts(make_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """Return the models: rows of 80 values, among which a rank's range ends, and a vocabulary that pads to 640 at TP 1, to 768 at TP 2."""
    heads: dict[str, dict[str, int]] = {"nemotron": {"mamba_num_heads": 10}, "granite_h": {"mamba_n_heads": 10}}
    models = sorted({model for _, model, _ in RUNS.values()})
    return {model: make_checkpoint(model, vocab_size=520, hidden_size=80, **heads.get(model, {})) for model in models}


@pytest.fixture(scope="module")
def whole(gang: Any, starts: dict[str, Path], soak: int | None) -> dict[str, Any]:
    cases: dict[int, list[dict[str, Any]]] = {}
    runs = {run: (processes, parallel) for run, (processes, _, parallel) in RUNS.items()} | (LAYOUTS if soak else {})
    for run, (processes, parallel) in runs.items():
        cases.setdefault(processes, []).append({"name": run, "config": config(run, parallel, starts)})
    return {name: result for processes, part in cases.items() for name, result in gang(processes, part).items()}


@pytest.fixture(scope="module")
def resumed(gang: Any, whole: dict[str, Any], starts: dict[str, Path], soak: int | None) -> dict[str, Any]:
    cases: dict[int, list[dict[str, Any]]] = {}
    pairs = [(name, *pair, None) for name, pair in {**PAIRS, **(EVERY_PAIR if soak else {})}.items()] + [
        (CONTROL, *PAIRS["tp2 to dp2"], "shifted_boxes")
    ]
    for name, run, processes, parallel, control in pairs:
        start = {"run_dir": whole[run]["run_dir"], "step": SAVED_AT}
        case = {"name": name, "config": config(run, parallel, starts), "start_from": start, "save_again": True, "control": control}
        cases.setdefault(processes, []).append(case)
    return {name: result for processes, part in cases.items() for name, result in gang(processes, part).items()}


def run_of(name: str) -> str:
    return {**PAIRS, **EVERY_PAIR}[name][0]


def saved(result: dict[str, Any]) -> torch_dist.TensorReader:
    return torch_dist.TensorReader(folder.read(Path(result["run_dir"]) / "checkpoints" / f"step_{SAVED_AT:08d}").state)


def differing(before: torch_dist.TensorReader, after: torch_dist.TensorReader) -> list[str]:
    """Return the tensors that differ between two checkpoints, or hold more than zeros where one alone has a padded row."""
    found = []
    for key, shape in before.shapes().items():
        ours, theirs = before.read(key, shape), after.read(key, after.shapes()[key])
        rows = min(len(ours), len(theirs)) if shape else 1
        if not torch.equal(ours[:rows], theirs[:rows]) or ours[rows:].any() or theirs[rows:].any():
            found.append(key)
    return found


def test_every_tensor_is_bit_equal_after_a_reshard(whole: dict[str, Any], resumed: dict[str, Any], name: str) -> None:
    before, after = saved(whole[run_of(name)]), torch_dist.TensorReader(Path(resumed[name]["run_dir"]) / "again")
    assert before.shapes().keys() == after.shapes().keys()
    for state in ("param", "exp_avg", "exp_avg_sq"):
        assert any(key.startswith(f"optimizer.state.{state}.") for key in before.shapes())
    assert differing(before, after) == []


def test_the_next_steps_are_the_same(whole: dict[str, Any], resumed: dict[str, Any], name: str) -> None:
    run = run_of(name)
    tolerance = BF16_TOLERANCE if "bf16" in run else TOLERANCE
    assert len(resumed[name]["loss"]) == STEPS
    assert resumed[name]["loss"][SAVED_AT:] == pytest.approx(whole[run]["loss"][SAVED_AT:], abs=tolerance)


def cut_rows(reader: torch_dist.TensorReader) -> list[str]:
    """Return the optimizer's tensors of which a shard holds a part of a row."""
    found = []
    for key, shape in reader.shapes().items():
        with reader.open(key) as stored:
            if key.startswith("optimizer.") and any(chunk.sizes[1:] != shape[1:] for chunk in stored.chunks):
                found.append(key)
    return found


@pytest.mark.parametrize("run", ["dp2", "hybrid dp2"])
def test_a_ranks_range_ends_within_a_row(whole: dict[str, Any], run: str) -> None:
    """Else the tests above would prove nothing of it."""
    assert cut_rows(saved(whole[run]))


def test_the_vocabularys_padding_changes(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    key = "optimizer.state.exp_avg.embedding.word_embeddings.weight"
    before, after = saved(whole["dp2"]), torch_dist.TensorReader(Path(resumed["dp2 to tp2"]["run_dir"]) / "again")
    assert before.shapes()[key] != after.shapes()[key]
    assert before.read(key, before.shapes()[key]).any()


def test_control_is_seen(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Boxes read from one row beside their place are other values, and other steps."""
    before, after = saved(whole["tp2"]), torch_dist.TensorReader(Path(resumed[CONTROL]["run_dir"]) / "again")
    assert any(key.startswith("optimizer.state.exp_avg.") for key in differing(before, after))
    moved = zip(resumed[CONTROL]["loss"][SAVED_AT:], whole["tp2"]["loss"][SAVED_AT:], strict=True)
    assert max(abs(ours - theirs) for ours, theirs in moved) > 100 * TOLERANCE
