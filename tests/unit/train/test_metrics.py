"""What a run writes down, read back as its users read it: JSON lines, and TensorBoard's own reader."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.train import metrics
from megatron_prism.train.metrics import METRICS, Recorder, SampleLog, forget_after, sample_log


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return {tag: [(step, value), ...]} of a run's event files, through TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def run(run_dir: Path, first_step: int, steps: int, scale: float = 1.0) -> None:
    with Recorder(run_dir, first_step, steps, enabled=True) as recorder:
        for step in range(first_step + 1, steps + 1):
            recorder.record(step, {"loss": scale / step, "mfu_causal": None})
        recorder.record_validation(steps, {"math": 0.5})


def test_metrics_read_back_from_both_files(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    assert lines(tmp_path / METRICS) == [
        *({"step": step, "loss": 1 / step, "mfu_causal": None} for step in (1, 2, 3)),
        {"step": 3, "valid_loss/math": 0.5},
    ]
    found = scalars(tmp_path)
    assert found == {"loss": [(step, pytest.approx(1 / step)) for step in (1, 2, 3)], "valid_loss/math": [(3, 0.5)]}


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    run(tmp_path, 0, 4)
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 5, "lo')
    run(tmp_path, 2, 4, scale=10.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / METRICS) if "loss" in line] == [
        (1, 1.0),
        (2, 0.5),
        (3, 10 / 3),
        (4, 2.5),
    ]
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(10 / 3)), (4, 2.5)]


def test_a_start_that_died_before_its_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    """It may have validated before step 1, and have logged steps that are run again."""
    for value in (0.1, 0.2):
        with Recorder(tmp_path, 0, 3, enabled=True) as recorder:
            assert list(recorder.validations()) == []
            recorder.record_validation(0, {"math": value})
            recorder.record(1, {"loss": value})
    assert lines(tmp_path / METRICS) == [{"step": 0, "valid_loss/math": 0.2}, {"step": 1, "loss": 0.2}]
    assert scalars(tmp_path) == {"valid_loss/math": [(0, pytest.approx(0.2))], "loss": [(1, pytest.approx(0.2))]}


def test_what_is_not_finite_is_null_and_has_no_point(tmp_path: Path) -> None:
    with Recorder(tmp_path, 0, 1, enabled=True) as recorder:
        recorder.record(1, {"loss": 1.0, "grad_norm": math.inf})
        recorder.record_validation(1, {"math": math.nan, "code": 2.0})
    assert "NaN" not in (tmp_path / METRICS).read_text() and "Infinity" not in (tmp_path / METRICS).read_text()
    assert lines(tmp_path / METRICS)[1] == {"step": 1, "valid_loss/math": None, "valid_loss/code": 2.0}
    assert set(scalars(tmp_path)) == {"loss", "valid_loss/code"}
    with Recorder(tmp_path, 1, 1, enabled=True) as recorder:
        assert list(recorder.validations()) == [(1, "math", None), (1, "code", 2.0)]


def test_files_beside_the_sample_logs_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for name in ("rank_00000.jsonl", "rank_00002.jsonl", "rank_00000.old.jsonl", "rank_.jsonl"):
        (folder / name).write_text('{"step": 2}\n')
    SampleLog(tmp_path, 1, 0, 2, list)
    assert {path.name for path in folder.iterdir() if path.read_text()} == {"rank_00000.old.jsonl", "rank_.jsonl"}


def test_a_line_that_is_no_text_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xff"}\n\xff\xfe\n{"step": 2}\n')
    assert forget_after(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', [1, 2]),
        ('{"step": 1}\n{"step": 2, "lo', [1]),
        ('{"step": 1}\n\n[3]\n3\n{"loss": 2}\n{"step": "1"}\n{"step": 2}', [1, 2]),
        ("", []),
    ],
)
def test_forget_after(tmp_path: Path, text: str, kept: list[int]) -> None:
    path = tmp_path / METRICS
    path.write_text(text)
    forget_after(path, 2)
    assert [line["step"] for line in lines(path)] == kept
    assert path.read_text().endswith("\n") or not kept
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]


def test_the_metrics_of_a_run_whose_checkpoints_are_gone_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = [{"step": 0, "valid_loss/math": 3.0}, {"step": 1, "loss": 2.0}, {"step": 7, "loss": 1.0}]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in first))
    with Recorder(tmp_path, 0, 9, enabled=True):
        pass
    assert lines(tmp_path / METRICS) == [] and lines(tmp_path / "metrics_1.jsonl") == first
    assert "the 7 steps" in caplog.text and "metrics_1.jsonl" in caplog.text
    (tmp_path / METRICS).write_text('{"step": 0, "valid_loss/math": 3.0}\n')  # nothing trained yet: nothing is lost
    with Recorder(tmp_path, 0, 9, enabled=True):
        pass
    (tmp_path / METRICS).write_text('{"step": 2}\n')
    with Recorder(tmp_path, 2, 9, enabled=True):  # it goes on
        pass
    assert not (tmp_path / "metrics_2.jsonl").exists() and lines(tmp_path / METRICS) == [{"step": 2}]


def test_a_log_line_says_what_is_left_of_this_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 91 and 92 of 100 took 20 s: 80 s are left, however many steps were done before. A metric of a part is in the file alone."""
    clock = iter([1000.0, 1020.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    said = SimpleNamespace(duration=lambda seconds: f"{seconds:g} s", get=lambda: logging.getLogger("test"))
    monkeypatch.setattr(metrics, "log", said)
    with caplog.at_level("INFO", "test"), Recorder(tmp_path, 90, 100, enabled=True) as recorder:
        recorder.record(92, {"loss": 1.0, "seconds/data": 0.5})
    assert caplog.messages == ["step 92/100  loss 1  left 80 s"]


@pytest.mark.parametrize("part", ["tp_rank", "cp_rank", "pp_rank"])
def test_one_rank_of_each_replica_logs_its_samples(tmp_path: Path, part: str) -> None:
    """The ranks of a replica read the same sequences, and its file is named by the data-parallel rank."""
    config = SimpleNamespace(log=SimpleNamespace(samples=True), run_dir=tmp_path)
    first = SimpleNamespace(rank=6, tp_rank=0, cp_rank=0, pp_rank=0, dp_rank=1, dp=2)
    assert sample_log(config, SimpleNamespace(**{**vars(first), part: 1}), 0, list) is None  # type: ignore[arg-type]
    assert sample_log(config, first, 0, list) is not None  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["rank_00001.jsonl"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path, 0, 2, enabled=False) as recorder:
        recorder.record(1, {"loss": 1.0})
        recorder.record_validation(1, {"math": 1.0})
        recorder.advance(2)
    assert not list(tmp_path.iterdir())
    forget_after(tmp_path / METRICS, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opened", ["metrics.jsonl", "samples/rank_00000.jsonl"])
def test_a_full_disk_is_named_by_its_file(tmp_path: Path, opened: str) -> None:
    """/dev/full takes no byte. The files are opened by their names, as after a disk has filled while the run went."""
    (tmp_path / "samples").mkdir()
    with contextlib.suppress(OSError), open("/dev/full", "a", buffering=1) as full, Recorder(tmp_path, 0, 1, enabled=True) as recorder:
        samples = SampleLog(tmp_path, 0, 0, 1, list)
        (recorder if opened == "metrics.jsonl" else samples)._file = full
        with pytest.raises(EnvironmentFault, match=rf"{re.escape(str(tmp_path / opened))}: No space left on device"):
            recorder.record(1, {"loss": 1.0})
            samples.record(1, [])
