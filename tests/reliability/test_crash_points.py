"""Killed at every step of a save, in a fresh folder or beside older checkpoints, a run loses nothing that was whole and mixes nothing.

A crash point is an operation on the file system, seen by Python's audit events: the process and its writers are killed as it begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import integrity, run_folder

from .conftest import losses, samples

pytestmark = pytest.mark.slow

POINTS: dict[str, tuple[str, str]] = {  # (audit event, how a path of its ends)
    "the new folder is made": ("os.mkdir", "/state"),
    "the writer opens its file": ("open", "__0_0.distcp"),
    "the metadata is opened": ("open", ".metadata.tmp"),
    "the metadata is renamed": ("os.rename", ".metadata.tmp"),
    "Megatron's marker is written": ("open", "metadata.json"),
    "the tokenizer is copied": ("open", "hf/tokenizer.json"),
    "prism.json is renamed": ("os.rename", "/prism.json"),
    "the sums are written": ("open", "SHA256SUMS"),
    "the folder is renamed": ("os.rename", "step_{step:08d}"),
    "the pointer is written": ("os.rename", "/latest"),
    "an old checkpoint is moved away": ("os.rename", ".step_{old:08d}.old"),
    "an old checkpoint is removed": ("shutil.rmtree", ".step_{old:08d}.old"),
}
WHEN = {"fresh": 2, "beside older ones": 6}  # the step whose save is cut short; every second step is saved, two stay
CASES = [(point, when) for point in POINTS for when in WHEN if when != "fresh" or "old" not in point.split()]


def fault(point: str, when: str) -> dict[str, Any]:
    event, path = POINTS[point]
    step = WHEN[when]
    found = {"kind": "crash", "event": event, "path": path.format(step=step, old=step - 4)}
    if "step_" in path:
        return found
    return found | ({"nth": step // 2} if path == "/latest" else {"within": f".step_{step:08d}."})


@pytest.fixture(scope="module")
def results(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return of each case (stderr of the crash, checkpoints left by it, the run that went on), and the unbroken run."""
    root = tmp_path_factory.mktemp("crash")
    whole = run_cases([{"name": "whole", "run_dir": root / "whole", "config": {"steps": 8}}])["whole"]
    assert whole["code"] == 0, whole["stderr"]
    cases = [
        {"name": f"{point}/{when}", "run_dir": root / f"{number}", "config": {"steps": 8}, "fault": fault(point, when)}
        for number, (point, when) in enumerate(CASES)
    ]
    crashed = run_cases(cases)
    left = {name: look(Path(found["run_dir"])) for name, found in crashed.items()}
    again = run_cases([{"name": case["name"], "run_dir": case["run_dir"], "config": {"steps": 8}} for case in cases])
    return {"whole": whole, "crashed": crashed, "left": left, "again": again}


def look(run_dir: Path) -> dict[int, list[str]]:
    """Return what is wrong with each checkpoint of a run, by step."""
    return {step: [str(problem) for problem in integrity.check(path)] for step, path in run_folder.checkpoints(run_dir).items()}


@pytest.mark.parametrize(("point", "when"), CASES)
def test_nothing_is_lost_and_nothing_mixed(results: dict[str, Any], point: str, when: str) -> None:
    name, step = f"{point}/{when}", WHEN[when]
    assert results["crashed"][name]["code"] == -9, results["crashed"][name]["stderr"][-2000:]
    left = results["left"][name]
    is_after = list(POINTS).index(point) > list(POINTS).index("the folder is renamed")
    before = {2, 4} if when != "fresh" else set()
    expected = before | ({step} if is_after else set())
    expected -= {2} if point == "an old checkpoint is removed" else set()
    assert left == {step: [] for step in expected}
    again, whole = results["again"][name], results["whole"]
    assert again["code"] == 0, again["stderr"][-2000:]
    assert f"continuing after step {max(expected)}" in again["stderr"] if expected else "continuing" not in again["stderr"]
    ours, theirs = Path(again["run_dir"]), Path(whole["run_dir"])
    assert losses(ours) == losses(theirs) and len(losses(ours)) == 8
    assert samples(ours) == list(range(32))
    assert look(ours) == {6: [], 8: []}
    assert not list((ours / "checkpoints").glob(".*"))
    tensors = [run_folder.step_folder(run_dir, 8) / "state" / "__0_0.distcp" for run_dir in (ours, theirs)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
