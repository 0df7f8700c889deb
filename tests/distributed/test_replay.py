"""A recorded step, computed again: nothing differs where nothing was changed, and each change by hand is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.checkpoint import integrity, torch_dist
from megatron_prism.jobs import rl, rl_replay
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import record_files
from tests.distributed import toy_rl

pytestmark = pytest.mark.slow
STEP = 3
QKV = "decoder.layers.2.self_attention.linear_qkv.weight"


def replay(groups: Groups, run_dir: str, step: int, grid: dict[str, Any] | None = None) -> dict[str, Any]:
    """Replay a step of the toy."""
    rl.grader.Grader, kept = toy_rl.Toy, rl.grader.Grader  # type: ignore[misc, assignment]
    try:
        return rl_replay.replay_in_gang(rl_replay.resolve(Path(run_dir), step, groups.world_size), groups)
    finally:
        rl.grader.Grader = kept  # type: ignore[misc]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("replay")
    toy_rl.write_prompts(home / "prompts")
    return home


@pytest.fixture(scope="module")
def train(home: Path, run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path) -> Callable[..., Path]:
    """Return a function that trains the toy in a folder of a name, and returns the folder."""

    def train(name: str, num_ranks: int = 1, **values: Any) -> Path:
        given = {"prompts": home / "prompts", "checkpoint": tiny_checkpoint, "record": {"interval": 1}, "steps": STEP, **values}
        run_distributed(toy_rl.train, num_ranks, timeout_s=240, run_dir=home / name, parallel=values.get("grid", {}), **given)
        return home / name

    return train


@pytest.fixture(scope="module")
def alone(train: Callable[..., Path]) -> Path:
    """Return a recorded run of one process. No test changes it."""
    return train("alone", save={"interval": 2, "background": False})


@pytest.fixture
def changed(alone: Path, tmp_path: Path) -> Path:
    """Return a copy of it to be changed."""
    return shutil.copytree(alone, tmp_path / "run")


def again(run_distributed: Callable[..., list[Any]], run_dir: Path, step: int = STEP, num_ranks: int = 1, **grid: Any) -> dict[str, Any]:
    return run_distributed(replay, num_ranks, timeout_s=240, run_dir=run_dir, step=step, parallel=grid)[0]


def by_stage(result: dict[str, Any]) -> dict[str, Any]:
    return {row["stage"]: row for row in result["stages"]}


def test_a_replay_is_the_step_bit_for_bit(alone: Path, run_distributed: Callable[..., list[Any]]) -> None:
    for step in (1, 2, 3):  # from the first weights; through a step without a checkpoint; from one
        result = again(run_distributed, alone, step)
        assert result["first_difference"] is None and result["exact"], result["verdict"]
        rows = by_stage(result)
        assert all(row["compared"] == row["equal"] for row in rows.values()), rows
        assert rows["responses"]["compared"] == 24 and rows["gradients"]["compared"] > 20 and rows["ref_log_probs"]["compared"] == 24
        assert ("stored_weights" in rows) == (step == 3)


def test_to_record_changes_nothing(alone: Path, train: Callable[..., Path]) -> None:
    plain = train("plain", save={"interval": 2, "background": False}, record={})
    assert not (plain / "records").exists()
    for name in ("rollouts/step_00000003.jsonl", "rollouts/step_00000001.jsonl"):
        assert (plain / name).read_text() == (alone / name).read_text()
    losses = [[(line["loss"], line["grad_norm"]) for line in map(json.loads, (run / "metrics.jsonl").open())] for run in (plain, alone)]
    assert losses[0] == losses[1]


def change_tensor(checkpoint: Path, key: str, add: float = 1e-3) -> None:
    """Change one element of a tensor of a checkpoint, and seal it again."""
    reader = torch_dist.TensorReader(checkpoint / "state")
    with reader.open(key) as stored:
        chunk = stored.chunks[0]
        path = Path(chunk.stream.name)
    with path.open("r+b") as stream:
        stream.seek(chunk.start + 40)
        value = torch.frombuffer(bytearray(stream.read(4)), dtype=torch.float32) + add
        stream.seek(chunk.start + 40)
        stream.write(value.numpy().tobytes())
    seal_again(checkpoint)


def seal_again(root: Path) -> None:
    (root / integrity.SUMS).unlink()
    integrity.seal(root)


@pytest.mark.parametrize(
    ("key", "stage"),
    [(QKV, "stored_weights"), (f"optimizer.state.param.{QKV}", "weights_before"), (f"optimizer.state.exp_avg.{QKV}", "optimizer_before")],
)
def test_a_weight_that_was_changed_by_hand_is_named(changed: Path, run_distributed: Callable[..., list[Any]], key: str, stage: str) -> None:
    change_tensor(changed / "checkpoints" / "step_00000002", key)
    result = again(run_distributed, changed)
    name = key if stage == "optimizer_before" else QKV
    assert (result["first_difference"]["stage"], result["first_difference"]["name"]) == (stage, name)
    assert by_stage(result)[stage]["different"] == 1  # that tensor and no other


def edit(run_dir: Path, file: str, change: Callable[[list[Any]], None]) -> None:
    """Change the lines of a file of the step's record, and seal it again."""
    path = record_files.path_of(run_dir, STEP) / file
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seal_again(path.parent)


def change_token(lines: list[Any]) -> None:
    lines[7]["token_ids"][2] ^= 1


def change_reward(lines: list[Any]) -> None:
    lines[7]["reward"] += 0.25


def change_outcome(lines: list[Any]) -> None:
    lines[7]["outcome"] = "wrong" if lines[7]["outcome"] == "right" else "right"


def change_advantage(lines: list[Any]) -> None:
    lines[0]["advantages"][7] += 1e-3


@pytest.mark.parametrize(
    ("change", "file", "stage"),
    [
        (change_token, "responses.jsonl", "responses"),
        (change_reward, "responses.jsonl", "rewards"),
        (change_outcome, "responses.jsonl", "outcomes"),
        (change_advantage, "trained.json", "advantages"),
    ],
)
def test_what_was_changed_in_a_record_is_named(
    changed: Path, run_distributed: Callable[..., list[Any]], change: Callable[[list[Any]], None], file: str, stage: str
) -> None:
    edit(changed, file, change)
    result = again(run_distributed, changed)
    line = json.loads((record_files.path_of(changed, STEP) / "responses.jsonl").read_text().splitlines()[7])
    assert result["first_difference"]["stage"] == stage, result["verdict"]
    assert result["first_difference"]["name"] == f"prompt {line['id']} sample {line['sample']}"
    assert by_stage(result)[stage]["different"] == 1
