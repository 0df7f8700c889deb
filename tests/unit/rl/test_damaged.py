"""What a run has written of its responses, damaged: each file is named, and the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_prism.checkpoint import integrity
from megatron_prism.core.errors import InputError
from megatron_prism.jobs import rl_samples
from megatron_prism.rl import record_files, rollout
from megatron_prism.rl.record import Step
from megatron_prism.rl.rollout import Response
from tests.unit.rl.responses import response

RUN = {"num_threads": 1, "world_size": 1}


def group(prompt_id: str) -> list[Response]:
    return [response(prompt_id, number) for number in range(2)]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:-9], r"step_00000001.jsonl:4: found .*required a response"),
        (lambda text: "{}\n" + text, r"step_00000001.jsonl:1: found no 'text'"),
        (lambda text: "[]\n" + text, r"step_00000001.jsonl:1: found "),
        (lambda text: text.split("\n", 1)[1], r"step_00000001.jsonl:1: found sample 1, and none before it"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", r"step_00000001.jsonl:3: found 1 responses to the last prompt"),
        (lambda text: "", r"step_00000001.jsonl: found no line"),
        (lambda text: text.replace('"token_ids": [3', f'"token_ids": [{2**31}', 1), r"step_00000001.jsonl:1: found .*greater than maximum"),
    ],
    ids=["cut", "empty object", "list", "no first sample", "a line less", "empty", "no token"],
)
def test_a_damaged_step_is_named_by_file_and_line(tmp_path: Path, damage: Callable[[str], str], says: str) -> None:
    rollout.write(tmp_path, 1, [group("a"), group("b")])
    path = tmp_path / rollout.FOLDER / "step_00000001.jsonl"
    path.write_text(damage(path.read_text()))
    (tmp_path / "config.yaml").write_text(
        "{run_dir: r, steps: 1, prompts: p, init: {checkpoint: c}, rollout: {num_samples: 2, max_tokens: 8}, batch: {seq_length: 16}}"
    )
    with pytest.raises(InputError, match=says):
        rl_samples.run(tmp_path, 1)


def test_a_run_that_goes_on_removes_what_a_killed_one_left_and_nothing_of_the_file_systems(tmp_path: Path) -> None:
    root = tmp_path / record_files.FOLDER
    for name in (".step_00000003.7.tmp", "step_00000002", "step_00000001", ".snapshot"):
        (root / name).mkdir(parents=True)
    (root / ".nfs000000000001").write_text("a file that another process holds open")
    record_files.begin(tmp_path, 1)
    assert sorted(path.name for path in root.iterdir()) == [".nfs000000000001", ".snapshot", "step_00000001"]


def test_no_folder_is_named_as_that(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: found no such folder"):
        rl_samples.run(tmp_path / "none", 1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def drop(path: Path) -> None:
    path.write_text(path.read_text().replace("num_threads", "threads").replace('"plan"', '"plans"').replace('"text"', '"texts"'))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (record_files.LOG_PROBS, cut, "SafetensorError"),
        (
            record_files.LOG_PROBS,
            lambda path: save_file({"old": torch.zeros(3)}, path),
            "old of 3 tokens, and the trained responses have 8",
        ),
        (record_files.LOG_PROBS, lambda path: save_file({}, path), "no 'old'"),
        (record_files.STEP, drop, "no 'num_threads'"),
        (record_files.TRAINED, drop, "no 'plan'"),
        (record_files.RESPONSES, drop, "no 'text'"),
        (record_files.TENSORS, lambda path: path.write_text("{}\n"), "no 'stage'"),
        (record_files.TENSORS, Path.unlink, "No such file"),
    ],
)
def test_a_damaged_record_that_was_sealed_again_is_named_by_its_file(
    tmp_path: Path, name: str, damage: Callable[[Path], None], says: str
) -> None:
    responses = [*group("a"), *group("b")]
    numbers = range(len(responses))
    log_probs = {number: torch.zeros(2) for number in numbers}
    step = Step(
        step=1, platform=RUN, responses=responses, advantages=dict.fromkeys(numbers, 0.0), plan=[], old_log_probs=log_probs,
        ref_log_probs={}, figures={}, tensors={},
    )  # fmt: skip
    record_files.write(tmp_path, step, keep_last=1)
    assert list(record_files.read(tmp_path, 1).responses) == responses
    root = record_files.path_of(tmp_path, 1)
    damage(root / name)
    (root / integrity.SUMS).unlink()
    integrity.seal(root)
    with pytest.raises(InputError, match=says) as raised:
        record_files.read(tmp_path, 1)
    assert name in raised.value.problems[0].where
