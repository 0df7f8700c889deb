"""A recorded step, computed again: nothing differs where nothing was changed, and each change by hand is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_prism.checkpoint import integrity, run_folder, torch_dist
from megatron_prism.jobs import rl, rl_replay, rl_rollout
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import record_files, rollout
from tests.distributed import toy_rl

pytestmark = pytest.mark.slow
STEP = 3
QKV = "decoder.layers.2.self_attention.linear_qkv.weight"


def replay(groups: Groups, places: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Replay steps of runs of the toy."""
    with patch.object(rl.grader, "Grader", toy_rl.Toy):
        return [rl_replay.replay_in_gang(rl_replay.resolve(Path(run_dir), step, groups.world_size), groups) for run_dir, step in places]


Again = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def again(run_distributed: Callable[..., list[Any]]) -> Again:
    """Return a function that replays a step of each of some runs, or some steps of one, in one gang, and returns what rank 0 says of each."""

    def again(*run_dirs: Path, steps: Sequence[int] = (STEP,), num_ranks: int = 1, **grid: Any) -> list[dict[str, Any]]:
        places = [(run_dir, step) for run_dir in run_dirs for step in steps]
        return run_distributed(replay, num_ranks, timeout_s=400, places=places, parallel=grid)[0]

    return again


@pytest.fixture(scope="module")
def train(
    run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function that trains the toy in a folder of a name, with records, and returns the folder."""
    home = tmp_path_factory.mktemp("replay")
    prompts = toy_rl.write_prompts(home / "prompts")

    def train(name: str, num_ranks: int = 1, worker: Callable[..., Any] = toy_rl.train, **values: Any) -> Path:
        common = {"prompts": prompts, "checkpoint": tiny_checkpoint, "steps": STEP + 1, "save": {"interval": 2, "background": False}}
        given = {**common, "record": {"interval": 1}, **values}
        run_distributed(worker, num_ranks, timeout_s=240, run_dir=home / name, parallel=values.get("grid", {}), **given)
        return home / name

    return train


@pytest.fixture(scope="module")
def alone(train: Callable[..., Path]) -> Path:
    """Return a recorded run of one process. No test changes it."""
    return train("alone")


def by_stage(result: dict[str, Any]) -> dict[str, Any]:
    return {row["stage"]: row for row in result["stages"]}


def test_a_replay_is_the_step_bit_for_bit(alone: Path, again: Again) -> None:
    for step, result in enumerate(again(alone, steps=(1, 2, 3)), 1):  # from the first weights; through step 1; from a checkpoint
        assert result["first_difference"] is None and result["exact"], result["verdict"]
        rows = by_stage(result)
        assert all(row["compared"] == row["equal"] for row in rows.values()), rows
        assert rows["responses"]["compared"] == 24 and rows["gradients"]["compared"] > 20 and rows["ref_log_probs"]["compared"] == 24
        assert ("stored_weights" in rows) == (step == 3) and result["steps"] == (2 if step == 2 else 1)


def test_a_step_of_responses_from_the_weights_before_is_sampled_again(train: Callable[..., Path], again: Again) -> None:
    run = train("lag", rollout={**toy_rl.ROLLOUT, "lag": 1}, save={"interval": 1, "keep_last": 4, "background": False})
    (result,) = again(run)
    assert result["steps"] == 2  # from the weights that sampled its responses
    assert result["exact"] and all(row["compared"] == row["equal"] for row in result["stages"]), result["verdict"]
    edit(run, "responses.jsonl", change_token)
    (result,) = again(run)
    assert result["first_difference"]["stage"] == "responses"
    for path in (record_files.path_of(run, STEP - 1), record_files.path_of(run, STEP - 2)):
        shutil.rmtree(path)
    (result,) = again(run)  # from the checkpoint before the step, which has its responses
    assert result["steps"] == 1 and result["first_difference"]["stage"] == "responses", result["verdict"]


def test_to_record_changes_nothing(alone: Path, train: Callable[..., Path]) -> None:
    plain = train("plain", record={})
    assert not (plain / "records").exists() and len(record_files.steps(alone)) == STEP + 1
    for step in (1, 3):
        assert (plain / f"rollouts/step_{step:08d}.jsonl").read_text() == (alone / f"rollouts/step_{step:08d}.jsonl").read_text()
    losses = [[(line["loss"], line["grad_norm"]) for line in map(json.loads, (run / "metrics.jsonl").open())] for run in (plain, alone)]
    assert losses[0] == losses[1]


def change_tensor(run_dir: Path, key: str, add: float = 1e-3) -> None:
    """Change one element of a tensor of the checkpoint before the step, and seal it again."""
    checkpoint = run_folder.step_folder(run_dir, STEP - 1)
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


BY_HAND: dict[str, tuple[Callable[[Path], None], str, str]] = {  # what is changed, and the stage and the name of the first difference
    "weight": (lambda run: change_tensor(run, QKV), "stored_weights", QKV),
    "fp32 weight": (lambda run: change_tensor(run, f"optimizer.state.param.{QKV}"), "weights_before", QKV),
    "moment": (lambda run: change_tensor(run, f"optimizer.state.exp_avg.{QKV}"), "optimizer_before", f"optimizer.state.exp_avg.{QKV}"),
    "reference": (lambda run: change_tensor(run, f"reference.{QKV}"), "reference_before", QKV),
    "token": (lambda run: edit(run, "responses.jsonl", change_token), "responses", ""),
    "outcome": (lambda run: edit(run, "responses.jsonl", change_outcome), "outcomes", ""),
    "reward": (lambda run: edit(run, "responses.jsonl", change_reward), "rewards", ""),
    "advantage": (lambda run: edit(run, "trained.json", change_advantage), "advantages", ""),
}


def test_each_change_by_hand_is_named(alone: Path, again: Again, tmp_path: Path) -> None:
    runs = [shutil.copytree(alone, tmp_path / name) for name in BY_HAND]
    for run, (change, _, _) in zip(runs, BY_HAND.values(), strict=True):
        change(run)
    line = json.loads((record_files.path_of(alone, STEP) / "responses.jsonl").read_text().splitlines()[7])
    response = f"prompt {line['id']} sample {line['sample']}"
    for result, (what, (_, stage, name)) in zip(again(*runs), BY_HAND.items(), strict=True):
        first = result["first_difference"]
        print(what, result["verdict"])
        assert (first["stage"], first["name"]) == (stage, name or response), result["verdict"]
        assert by_stage(result)[stage]["different"] == 1  # that one and no other


GRIDS = {"dp2": {"tp": 1}, "tp2": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}}


@pytest.mark.parametrize("name", GRIDS)
def test_a_gang_s_step_is_replayed_on_its_layout_and_on_one_process(train: Callable[..., Path], again: Again, name: str) -> None:
    run = train(name, 2, grid=GRIDS[name])
    changed = shutil.copytree(run, run.with_name(f"{name}-changed"))
    change_tensor(changed, QKV, add=1e-6)  # far below the bound: what was loaded is compared by its bits
    same, other = again(run, changed, num_ranks=2, **GRIDS[name])
    assert same["exact"] and same["first_difference"] is None, same["verdict"]
    assert all(row["compared"] == row["equal"] for row in by_stage(same).values())
    assert (other["first_difference"]["stage"], other["first_difference"]["name"]) == ("stored_weights", QKV)
    through, same, _, other = again(run, changed, steps=(STEP - 1, STEP))
    assert through["steps"] == 2 and through["first_difference"] is None, through["verdict"]
    print(name, [(row["stage"], row["equal"], row["compared"], row["largest_difference"]) for row in same["stages"]])
    assert not same["exact"] and "world_size" in same["other_platform"] and same["first_difference"] is None, same["verdict"]
    rows = by_stage(same)
    assert all(rows[stage]["compared"] == rows[stage]["equal"] for stage in ("stored_weights", "optimizer_before", "rewards", "advantages"))
    assert (other["first_difference"]["stage"], other["first_difference"]["name"]) == ("stored_weights", QKV)


@contextmanager
def killed_at_write(number: int | None) -> Iterator[None]:
    """Within the block a run is killed (SIGKILL) once it has written its number-th step's responses."""
    kept, num_writes = rollout.write, 0

    def write(*arguments: Any) -> None:
        nonlocal num_writes
        kept(*arguments)
        num_writes += 1
        if num_writes == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(rollout, "write", write):
        yield


def part(groups: Groups, kill_at_write: int | None = None, off_from: int | None = None, **values: Any) -> None:
    """Run the toy as a config says that does only a part: where it only trains, there is neither engine nor grader."""
    config = toy_rl.config(**values)
    trains = config.mode == "train"
    with (
        patch.object(rl.grader, "Grader", None if trains else toy_rl.Toy),
        patch.object(rl.grader, "require", None if trains else rl.grader.require),
        patch.object(rl.rollout, "engine", None if trains else rl.rollout.engine),
        killed_at_write(kill_at_write),
        toy_rl.sampler_off(off_from),
    ):
        resolved = rl.resolve(config, groups.world_size)
        (rl.train_in_gang if trains else rl_rollout.sample_in_gang)(resolved, groups)


def test_only_rollout_and_only_train(alone: Path, train: Callable[..., Path], again: Again) -> None:
    sampled = train("sampled", worker=part, record={}, mode="rollout")
    one, last = (f"rollouts/step_{step:08d}.jsonl" for step in (1, STEP + 1))
    assert (sampled / one).read_text() == (alone / one).read_text()
    assert (sampled / last).read_text() != (alone / last).read_text()  # nothing was learnt
    assert {json.loads(line)["weights_step"] for step in (one, last) for line in (sampled / step).open()} == {0}
    assert not (sampled / "checkpoints").exists() and len((sampled / "metrics.jsonl").read_text().splitlines()) == STEP + 1
    recorded = {"mode": "train", "train_from": str(alone)}
    trained = train("trained", worker=part, **recorded)
    for step in (1, STEP + 1):
        ours, theirs = (record_files.read(run, step) for run in (trained, alone))
        assert ours.responses == theirs.responses and ours.figures == theirs.figures and ours.tensors == theirs.tensors
    with pytest.raises(AssertionError, match="seed: found 5"):
        train("other", worker=part, **recorded, seed=5)
    other = train("rloo", worker=part, **recorded, algorithm={"advantage": "rloo", "keep_zero_variance": True})
    ours, theirs = (record_files.read(run, STEP) for run in (other, alone))
    assert ours.responses == theirs.responses and ours.tensors != theirs.tensors
    (result,) = again(other)  # its own weights did not sample its responses, so nothing is sampled again
    assert result["first_difference"] is None and result["exact"], result["verdict"]


def sampled_by(run_dir: Path) -> list[str]:
    """Return the files and the metrics of a run that only samples."""
    return [path.read_text() for path in sorted((run_dir / "rollouts").iterdir())] + [(run_dir / "metrics.jsonl").read_text()]


def test_only_rollout_goes_on_where_it_was_killed(train: Callable[..., Path]) -> None:
    refilling = {"record": {}, "mode": "rollout", "algorithm": {}, "rollout": {**toy_rl.ROLLOUT, "max_refills": 1}}
    whole = train("whole", worker=part, **refilling)
    progress = json.loads((whole / rl_rollout.PROGRESS).read_text())
    assert progress["step"] == STEP + 1 and progress["num_drawn"] > 4 * (STEP + 1)  # the draws do not follow from the step
    metrics = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert "right/math" in metrics and "response_tokens/science" in metrics
    (described,) = json.loads((whole / "manifest.json").read_text())["starts"]
    assert any(path.endswith("prompts.jsonl") for path in described["inputs"])
    with pytest.raises(AssertionError, match="exit code -9"):
        train("cut", worker=part, kill_at_write=2, **refilling)  # its progress is of step 1
    first = whole.with_name("cut") / "rollouts/step_00000001.jsonl"
    written = first.stat().st_ino
    with pytest.raises(AssertionError, match="seed: found 5"):
        train("cut", worker=part, seed=5, **refilling)
    assert sampled_by(train("cut", worker=part, **refilling)) == sampled_by(whole)
    assert first.stat().st_ino == written  # step 1 was not sampled again


def test_only_rollout_does_not_begin_with_a_sampler_that_is_not_the_trainer_s(train: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="sampler and trainer disagree"):
        train("off", worker=part, record={}, mode="rollout", off_from=0)


def test_only_rollout_samples_by_the_newest_whole_checkpoint(alone: Path, train: Callable[..., Path]) -> None:
    run = shutil.copytree(alone, alone.with_name("damaged"))
    shutil.rmtree(run / "rollouts")
    (run_folder.step_folder(run, STEP + 1) / integrity.SUMS).unlink()
    train("damaged", worker=part, record={}, mode="rollout")
    names = [f"step_{step:08d}.jsonl" for step in (STEP, STEP + 1)]
    assert sorted(path.name for path in (run / "rollouts").iterdir()) == ["progress.json", *names]
    assert (run / "rollouts" / names[0]).read_text() == (alone / "rollouts" / names[0]).read_text()  # by the weights of step 2, its prompts
    ids = [[json.loads(line)["id"] for line in (root / "rollouts" / names[1]).open()] for root in (run, alone)]
    assert ids[0] == ids[1] and {json.loads(line)["weights_step"] for line in (run / "rollouts" / names[1]).open()} == {STEP - 1}


def test_a_killed_run_has_the_records_of_an_unbroken_one(alone: Path, train: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        train("killed", kill_at="reference", kill_after=2)  # at the end of step 2, before its record and its checkpoint
    killed = train("killed")
    assert record_files.steps(killed) == record_files.steps(alone)
    for step in record_files.steps(alone):
        ours, theirs = (record_files.read(run, step) for run in (killed, alone))
        assert ours.responses == theirs.responses and ours.figures == theirs.figures and ours.tensors == theirs.tensors
