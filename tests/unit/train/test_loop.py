"""What the loop returns, measures and writes down, with the training step stood in for."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prism.core.config import BatchConfig, DataConfig, LogConfig, SaveConfig, TrainConfig, ValidationConfig
from megatron_prism.core.errors import Stopped
from megatron_prism.train import loop
from megatron_prism.train.guard import Decision, Verdict
from megatron_prism.train.metrics import METRICS, Recorder
from megatron_prism.train.step import Means
from megatron_prism.train.timers import Timers

SAVE_S = 0.2


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that trains a run in tmp_path for some steps and returns its validation losses and its steps' seconds."""
    monkeypatch.setattr(loop, "forward_backward", lambda *_: Means(1.0, 8.0, 8, {}))
    monkeypatch.setattr(loop, "read", lambda sums, measured: (sums, measured))
    monkeypatch.setattr(loop, "decide", lambda *_: Decision(Verdict.TAKE, "", 0.0, False))
    monkeypatch.setattr(loop.optim, "measure", lambda _: 1.0)
    monkeypatch.setattr(loop.optim, "apply", lambda *_: None)
    monkeypatch.setattr(loop.optim, "settled", lambda *_: nullcontext())
    monkeypatch.setattr(loop.safety, "save", lambda *_, **__: None)
    monkeypatch.setattr(loop.safety.groups, "agree", list)
    monkeypatch.setattr(loop, "summary", lambda seconds, _: {f"time/{name}_s": value for name, value in seconds.items()})

    def fit(
        first_step: int,
        steps: int,
        loss: float = 0.5,
        save_s: float = 0.0,
        timers: bool = True,
        asked: Sequence[int] = (0, 0),
        save_interval: int = 0,
    ) -> tuple[loop.Losses, list[float]]:
        """asked: the signal that asks to stop, when it is looked at first, and after the validation before the first step."""
        signals = iter(asked)
        monkeypatch.setattr(loop.safety, "remember", lambda *_: time.sleep(save_s))
        monkeypatch.setattr(loop, "evaluate", lambda *_: SimpleNamespace(loss=loss))
        seconds: list[float] = []
        config = TrainConfig(
            run_dir=tmp_path,
            steps=steps,
            data=DataConfig(prepared=tmp_path, seq_length=8),
            batch=BatchConfig(global_size=1),
            validation=ValidationConfig(interval=2),
            log=LogConfig(interval=1, timers=timers),
            save=SaveConfig(interval=save_interval),
        )
        with Recorder(tmp_path, first_step, steps, enabled=True) as recorder:
            run = SimpleNamespace(
                config=config,
                groups=SimpleNamespace(rank=0, world_size=1),
                chunks=[],
                optimizer=None,
                train_batches=iter([[]] * steps),
                valid_batches={"math": []},
                flops=SimpleNamespace(causal=1.0),
                peak_tflops=None,
                recorder=recorder,
                samples=None,
                saver=SimpleNamespace(longest_s=0.0, is_writing=lambda: False, finish=lambda: None),
                guard=None,
                stop=SimpleNamespace(reason=lambda _: 0.0, asked=lambda: next(signals)),
                watchdog=SimpleNamespace(doing=lambda _: None),
                against_plan=SimpleNamespace(record=lambda step, taken: seconds.append(taken)),
                collect_garbage=lambda step: None,
                objective=None,
            )
            return loop.fit(run, first_step), seconds  # type: ignore[arg-type]

    return fit


@pytest.mark.parametrize(("first_step", "asked"), [(0, (signal.SIGINT,)), (0, (0, signal.SIGUSR1)), (2, (signal.SIGTERM,))])
def test_a_run_that_is_asked_to_stop_before_its_first_step_makes_none(
    first_step: int, asked: Sequence[signal.Signals], fit: Any, tmp_path: Path
) -> None:
    """Loading a large model takes minutes, a validation too: then a step and a save, of which nobody has asked for any."""
    with pytest.raises(Stopped, match=f"stopped by {asked[-1].name} before the first step; the same command starts again"):
        fit(first_step, 4, asked=asked)
    steps = [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()]
    assert steps == [0] * (len(asked) - 1)


def test_a_run_that_is_whole_ends_so_whatever_it_is_asked(fit: Any) -> None:
    assert fit(4, 4, asked=[signal.SIGINT])[1] == []


def test_a_run_that_is_told_to_stop_is_saved_before_it_is_validated(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation may take longer than Slurm leaves the run. Where nothing stops it, a step that is saved has its validation."""
    done: list[str] = []
    reasons = iter([0.0, 0.0, 0.0, float(signal.SIGUSR1)])
    monkeypatch.setattr(loop, "decide", lambda *_: Decision(Verdict.TAKE, "", next(reasons), False))
    monkeypatch.setattr(loop.safety, "save", lambda run, step, timers, wait, *_, **__: done.append(f"saved {step} {wait}"))
    monkeypatch.setattr(Recorder, "record_validation", lambda self, step, values: done.append(f"validated {step}"))
    with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 4, which is saved"):
        fit(0, 6, save_interval=2)
    assert done == ["validated 0", "validated 2", "saved 2 False", "saved 4 True", "validated 4"]


def test_validations_of_earlier_starts_are_part_of_the_result(fit: Any) -> None:
    whole, _ = fit(0, 4)
    assert whole == {"math": {"0": 0.5, "2": 0.5, "4": 0.5}}
    assert fit(4, 4)[0] == whole  # finished before
    assert fit(2, 4, loss=0.25)[0] == {"math": {"0": 0.5, "2": 0.5, "4": 0.25}}  # step 4 is run again
    assert fit(0, 2, loss=0.75)[0] == {"math": {"0": 0.75, "2": 0.75}}  # and here every one


def test_a_step_s_seconds_are_without_the_save_that_ends_meanwhile(fit: Any, tmp_path: Path) -> None:
    _, seconds = fit(0, 2, save_s=SAVE_S)
    steps = [line["step_s"] for line in map(json.loads, (tmp_path / METRICS).open()) if "step_s" in line]
    assert len(steps) == len(seconds) == 2 and max(*steps, *seconds) < SAVE_S / 2


def test_a_validation_that_is_not_finite_is_said_and_written_as_null(fit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(0, 2, loss=math.nan)
    assert "step 2: the validation loss of math is NaN or inf" in caplog.text
    assert "NaN" not in (tmp_path / METRICS).read_text()
    assert fit(2, 2)[0] == {"math": {"0": None, "2": None}}


def test_phases_are_timed_where_they_are_written(fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Timers] = []

    class Kept(Timers):
        def __init__(self, enabled: bool = True):
            super().__init__(enabled)
            made.append(self)

    monkeypatch.setattr(loop, "Timers", Kept)
    for timers in (True, False):
        fit(0, 1, timers=timers)
        assert ("time/data_s" in (tmp_path / METRICS).read_text()) == timers
        assert made[-1].read() == {}, "kept, and read by nothing"
