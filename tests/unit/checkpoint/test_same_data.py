"""A run that resumes knows its mixtures by what they hold, not by where they lie."""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import folder, run_folder, same_data
from megatron_prism.core import log
from megatron_prism.core.config import BatchConfig, DataConfig, InitConfig, MixtureChange, TrainConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.manifest import read_json, write_json
from megatron_prism.jobs import train

A, B, MOVED = Path("data/a"), Path("data/b"), Path("/disk/a")
SUMS = {A: "a" * 64, B: "b" * 64, MOVED: "a" * 64}
THEN = DataConfig(prepared=A, seq_length=8, changes=(MixtureChange(step=3, prepared=B), MixtureChange(step=7, weights={"x": 100.0})))


def described(data: DataConfig, sums: dict[Path, str] = SUMS, own: float = 100.0) -> list[dict[str, Any]]:
    mixtures, prepared = [], data.prepared
    for change in (MixtureChange(step=1, weights=data.weights), *data.changes):
        prepared = change.prepared or prepared
        mixtures.append({"step": change.step, "prepared": str(prepared), "sha256": sums[prepared], "weights": change.weights or {"x": own}})
    return mixtures


def problems(now: DataConfig, step: int, sums: dict[Path, str] = SUMS, own: float = 100.0) -> list[str]:
    started = {"plan": {"mixtures": described(THEN)}}
    return list(map(str, same_data.check(THEN, now, started, described(now, sums, own), step)))


def with_first(prepared: Path | None, step: int = 3) -> DataConfig:
    return replace(THEN, changes=(MixtureChange(step=step, prepared=prepared), *THEN.changes[1:]))


def test_the_same_mixture_may_lie_elsewhere_and_no_other_in_its_place() -> None:
    moved = replace(THEN, prepared=MOVED)
    assert problems(THEN, 10) == problems(moved, 10) == problems(replace(THEN, prepared=Path("data/a")), 10) == []
    (said,) = problems(THEN, 2, {**SUMS, A: "c" * 64})
    assert said.startswith("data.prepared: found data/a, a mixture of other documents (sha256 cccccccccccc); required the mixture")
    assert "(sha256 aaaaaaaaaaaa), which was at data/a; name the folder where that mixture is now" in said
    assert "add to data.changes {step: 2, prepared: data/a}; or start another run" in said


def test_a_change_that_was_read_is_known_by_its_content_and_one_to_come_is_free() -> None:
    other = {**SUMS, B: "c" * 64}
    assert problems(THEN, 3, other) == []
    (said,) = problems(THEN, 10, other)  # named once, though a later change keeps it
    assert said.startswith("data.changes.0.prepared: found data/b, a mixture of other documents")
    assert problems(with_first(Path("data/../data/b")), 10, {**SUMS, Path("data/../data/b"): SUMS[B]}) == []
    assert problems(with_first(MOVED), 3) == []
    assert [line.partition(":")[0] for line in problems(with_first(MOVED), 4)] == ["data.changes.0.prepared"]
    for wrong in (with_first(B, step=2), replace(THEN, changes=()), replace(THEN, changes=THEN.changes[:1])):
        assert problems(wrong, 10)[0].startswith("data.changes: found")


def test_changes_are_said_as_a_config_has_them() -> None:
    (problem,) = same_data.check(THEN, replace(THEN, changes=()), {"plan": {"mixtures": described(THEN)}}, described(THEN), 10)
    assert problem.found == "[]"
    assert problem.required == "[{step: 3, prepared: data/b}, {step: 7, weights: {x: 100}}], as the run has read them up to step 10"


def test_weights_of_the_mixture_itself_are_part_of_it() -> None:
    assert [line.partition(" with")[0] for line in problems(THEN, 3, own=50.0)] == ["data.prepared: found data/a"]
    assert problems(replace(THEN, weights={"x": 50.0}), 3) == []  # data.weights is compared as a key of the config


def test_a_run_of_an_earlier_version_that_read_a_source_again_is_not_resumed() -> None:
    """x, then y, then x again from step 7 on, which that version read from its start."""
    weights: list[dict[str, float]] = [{"x": 100.0}, {"y": 100.0}, {"x": 50.0, "y": 50.0}]
    changes = tuple(MixtureChange(step=step, weights=of) for step, of in zip((3, 7), weights[1:], strict=True))
    data = DataConfig(prepared=A, seq_length=8, weights=weights[0], changes=changes)
    now = described(data)
    before = {"plan": {"mixtures": now}}
    since = {"plan": {"mixtures": [{**mixture, "taken": {}} for mixture in now]}}
    assert same_data.check(data, data, before, now, 7) == same_data.check(data, data, since, now, 8) == []
    (problem,) = same_data.check(data, data, before, now, 8)
    assert problem.where == "data.changes" and problem.found.startswith("source x comes back") and "another run_dir" in problem.fix


def test_a_run_folder_of_an_earlier_version_knows_paths_and_manifests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for path in (a, b):
        path.mkdir()
        (path / "manifest.json").write_text(path.name)
    then = DataConfig(prepared=a, seq_length=8)
    started = {"inputs": {f"{a}/manifest.json": hashlib.sha256(b"a").hexdigest()}, "plan": {}}

    def wheres(prepared: Path, of: dict[str, Any] = started) -> list[str]:
        return [problem.where for problem in same_data.check(then, replace(then, prepared=prepared), of, [], 2)]

    assert wheres(b) == wheres(tmp_path / "absent", {}) == ["data.prepared"]
    assert wheres(a) == wheres(tmp_path / "b" / ".." / "a") == wheres(a, {}) == [] and not caplog.messages
    moved = a.rename(tmp_path / "moved")
    assert wheres(moved) == [] and not caplog.messages
    shutil.copytree(b, a)
    with caplog.at_level(logging.WARNING, logger=log.NAME):
        assert wheres(a) == []
    assert "was written again since this run began" in caplog.messages[0]


def test_a_run_records_what_it_reads_and_resumes_from_a_copy(tiny_checkpoint: Path, tiny_mixture: Path, tmp_path: Path) -> None:
    data = DataConfig(prepared=Path(shutil.copytree(tiny_mixture, tmp_path / "data")), seq_length=8)
    assert folder.read(tiny_checkpoint).model.max_position_embeddings >= 8
    config = TrainConfig(
        run_dir=tmp_path / "run",
        steps=9,
        precision="fp32",
        data=data,
        batch=BatchConfig(global_size=2),
        init=InitConfig(checkpoint=tiny_checkpoint),
    )
    resolved = train.resolve(config, 1)
    with run_folder._held(config, resolved.start, train._inputs(config), resolved.figures):
        pass
    run_folder.step_folder(config.run_dir, 1).mkdir(parents=True)
    data.prepared.rename(tmp_path / "moved")
    moved = replace(config, data=replace(data, prepared=tmp_path / "moved"))
    assert train.resolve(moved, 1).start.is_resumed
    values = dict(read_json(tmp_path / "moved" / "manifest.json"))
    values["sources"][0]["shards"][0]["train"]["bin"]["sha256"] = "0" * 64
    write_json(tmp_path / "moved" / "manifest.json", values)
    (tmp_path / "moved").rename(data.prepared)
    with pytest.raises(InputError, match=r"data\.prepared: found .*data, a mixture of other documents .* which was at"):
        train.resolve(config, 1)
