"""A landscape over layouts and kills: its ends are evaluations of the models themselves, and nothing is paid for twice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import MergeConfig
from megatron_prism.core.load import build
from megatron_prism.eval import folder
from megatron_prism.jobs import convert, merge
from tests.distributed import toy_evaluate, toy_landscape
from tests.unit.merge.folders import moved

pytestmark = pytest.mark.slow
NUM_QUESTIONS, NUM_SAMPLES = 7, 2
ENDS = ("base", "mid", "rl")


@pytest.fixture(scope="module")
def toy(
    run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tiny_mixture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Return a function that scores the landscape of a folder, a run and a checkpoint, and returns its folder and its result."""
    home = tmp_path_factory.mktemp("landscape")
    lines = [{"id": f"q{n}", "kind": "math", "prompt": f"The sum of {n} and" + " and" * (n % 4), "gold": "1"} for n in range(NUM_QUESTIONS)]
    (home / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    hf = tiny_checkpoint.parent / "hf"
    for name, source, seed in (("mid", hf, 1), ("rl", home / "mid", 2)):
        moved(source, home / name, seed, by=0.02)
        convert.run_import(home / name, home / f"{name}_ckpt", dry_run=False)
    (home / "run/checkpoints").mkdir(parents=True)
    (home / "mid_ckpt").rename(home / "run/checkpoints/step_00000001")
    models = {"base": {"hf": hf}, "mid": {"checkpoint": home / "run"}, "rl": {"checkpoint": home / "rl_ckpt"}}
    asked = {"set": "file", "path": home / "set.jsonl", "num_samples": NUM_SAMPLES, "temperature": 1.0, "max_tokens": 8}
    losses = {"held_out": {"mixture": tiny_mixture, "seq_length": 32, "sequences": 4}}
    tasks = {"sums": asked, "losses": losses}

    def run(
        name: str, num_ranks: int = 1, grid: dict[str, int] | None = None, rl: str = "rl", **values: Any
    ) -> tuple[Path, dict[str, Any]]:
        three = {"base_model": models["base"], "mid_model": models["mid"], "rl_model": models[rl]}
        given = {"three": three, "tasks": tasks, "grid": grid or {}, **values}
        results = run_distributed(toy_landscape.run, num_ranks, timeout_s=240, out=home / name, parallel=grid or {}, **given)
        return home / name, results[0]

    def evaluate(name: str) -> Path:
        values = {"checkpoint": "unused", "file": home / "set.jsonl", "model": models[name], "tasks": tasks}
        run_distributed(toy_evaluate.run, 1, timeout_s=240, out=home / f"alone-{name}", parallel={}, grid={}, **values)
        return home / f"alone-{name}"

    run.evaluate = evaluate  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def unbroken(toy: Any) -> tuple[Path, dict[str, Any]]:
    return toy("unbroken", num_steps_to_mid=2, num_steps_to_rl=2, keep_largest=[0.2], num_nulls=1)


def texts(root: Path) -> tuple[str, str]:
    return (root / folder.RESULTS).read_text(), (root / folder.SUMMARY).read_text()


def paid(root: Path) -> Counter[str]:
    """Return how often each response was sampled, over all points and starts."""
    return Counter(line for line in Path(f"{root}.log").read_text().splitlines() if '"sampled"' in line)


def test_the_ends_are_the_evaluations_of_the_models(toy: Any, unbroken: tuple[Path, dict[str, Any]]) -> None:
    """Byte for byte: responses, scores, the held-out loss, the model's sums. A point between them is none of these."""
    root, result = unbroken
    alone = {name: texts(toy.evaluate(name)) for name in ENDS}
    assert {name: texts(root / "points" / name) for name in ENDS} == alone and len(set(alone.values())) == 3
    assert texts(root / "points/to_mid_1_of_2")[0] not in {results for results, _ in alone.values()}
    assert [row["name"] for row in result["points"]] == ["base", "to_mid_1_of_2", "mid", "to_rl_1_of_2", "rl", "keep_0.2", "null_0"]
    assert (result["kind"], result["analysis"], result["gates"]) == ("analysis", "landscape", 1)
    for row in result["points"]:
        summary = json.loads((root / "points" / row["name"] / folder.SUMMARY).read_text())["tasks"]
        assert row["tasks"]["sums"]["score"] == summary["sums"]["score"] and row["tasks"].keys() == {"sums"}
        losses = [one["loss"] for one in summary["losses"]["losses"].values()]
        assert min(losses) <= row["loss"] <= max(losses)
    loss = [row["loss"] for row in result["points"]]
    assert result["barrier"] == {
        "base_to_mid": pytest.approx(max(0, loss[1] - (loss[0] + loss[2]) / 2), abs=1e-9),
        "mid_to_rl": pytest.approx(max(0, loss[3] - (loss[2] + loss[4]) / 2), abs=1e-9),
    }
    assert json.loads((root / "landscape.json").read_text()) == {key: value for key, value in result.items() if key != "gates"}
    assert set(paid(root).values()) == {7} and sum(paid(root).values()) == 7 * NUM_QUESTIONS * NUM_SAMPLES  # once a point


def test_a_tensor_parallel_gang_gives_the_same(toy: Any, unbroken: tuple[Path, dict[str, Any]]) -> None:
    root, result = toy("tp2", 2, {"tp": 2}, num_steps_to_mid=1, num_steps_to_rl=1, keep_largest=[0.2], num_nulls=1)
    for name in (*ENDS, "keep_0.2", "null_0"):
        one, other = (json.loads((each / "points" / name / folder.SUMMARY).read_text()) for each in (root, unbroken[0]))
        assert (root / "points" / name / folder.RESULTS).read_text() == (unbroken[0] / "points" / name / folder.RESULTS).read_text()
        assert one["tasks"]["sums"] == other["tasks"]["sums"] and one["model"]["sha256"] == other["model"]["sha256"]
    losses = {row["name"]: row["loss"] for row in unbroken[1]["points"]}
    assert all(row["loss"] == pytest.approx(losses[row["name"]], rel=1e-5) for row in result["points"])


def test_a_killed_landscape_goes_on_and_samples_nothing_twice(toy: Any, unbroken: tuple[Path, dict[str, Any]]) -> None:
    given = {"num_steps_to_mid": 2, "num_steps_to_rl": 2, "keep_largest": [0.2], "num_nulls": 1}
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("killed", point="written", **given)
    root, result = toy("killed", **given)
    assert result["points"] == unbroken[1]["points"] and paid(root) == paid(unbroken[0])
    _, again = toy("killed", **given)
    assert again["gates"] == 0 and paid(root) == paid(unbroken[0])  # nothing is new, so no model is built
    assert len(list((root / "scores").glob("*.jsonl"))) == 7  # a file a point, and none more for a start without progress
    with pytest.raises(AssertionError, match="rl_model: found .* a landscape of other weights"):
        toy("killed", **given, rl="mid")


@pytest.mark.parametrize(
    ("name", "grid"), [("llama", {"tp": 2}), ("granite", {"pp": 2}), ("nemotron", {"tp": 2}), ("granite_h", {"pp": 2})]
)
def test_a_points_weights_are_those_of_a_merge(
    run_distributed: Callable[..., list[Any]], make_checkpoint: Callable[..., Path], tmp_path: Path, name: str, grid: dict[str, int]
) -> None:
    """In the ranks' shards, dense, tied and hybrid; the weights of another point differ."""
    base = shutil.copytree(make_checkpoint(name).parent / "hf", tmp_path / "base")
    three = [base, moved(base, tmp_path / "mid", 1), moved(base, tmp_path / "rl", 2)]
    entries = [{"path": str(path), "weight": weight} for path, weight in zip(three, (0.75, 0.125, 0.125), strict=True)]
    merge.run(build({"out": str(tmp_path / "merged"), "models": entries}, MergeConfig, str))
    given = {"three": three, "wanted": tmp_path / "merged", "grid": grid, "parallel": grid}
    same = run_distributed(toy_landscape.differing, 2, point={"name": "p", "kind": "path", "a": 0.25, "b": 0.125}, **given)
    other = run_distributed(toy_landscape.differing, 2, point={"name": "p", "kind": "path", "a": 0.5, "b": 0.125}, **given)
    assert max(same) < 1e-6 and min(other) > 1e-3
