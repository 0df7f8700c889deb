"""What a run writes down: metrics.jsonl (one line a logged step), TensorBoard, progress on a terminal, log lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_prism.core import disk, log
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.manifest import finite, write_text
from megatron_prism.parallel.groups import Groups

METRICS, SAMPLES = "metrics.jsonl", "samples"


class Recorder:
    """Records metrics on rank 0 of a gang. On the other ranks it does nothing.

    On resume the lines of steps that are run again are dropped, so that each step stands once. A run that begins has none: those of steps that an
    earlier one made, which left no checkpoint, go into a file of their own.
    """

    def __init__(self, run_dir: Path, first_step: int, steps: int, enabled: bool):
        self.enabled = enabled
        self._steps = steps
        self._started = time.monotonic()
        self._first_step = first_step
        self._validations: list[dict[str, Any]] = []
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / METRICS
        with disk.writing(self._path):
            if first_step == 0:
                _keep_earlier(self._path)
            kept = forget_after(self._path, first_step or -1)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else 0)
        self._validations = [line for line in kept if any(name.startswith("valid") for name in line)]
        self._progress, self._task = _progress_bar(first_step, steps)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.enabled:
            return
        self._file.close()
        self._board.close()
        if self._progress is not None:
            self._progress.stop()

    def record(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one step's metrics under their names."""
        if not self.enabled:
            return
        self._write(step, values)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items() if value is not None and "/" not in name)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, shown=shown)
        else:
            done = step - self._first_step
            left_s = (time.monotonic() - self._started) / max(done, 1) * (self._steps - step)
            log.get().info("step %d/%d  %s  left %s", step, self._steps, shown, log.duration(left_s))

    def record_validation(self, step: int, values: Mapping[str, float], name: str = "valid_loss") -> None:
        """Write one validation's values, a metric a source: valid_loss/SOURCE, or under another name."""
        if not self.enabled:
            return
        self._write(step, {f"{name}/{source}": value for source, value in values.items()})

    def validations(self, name: str = "valid_loss") -> Iterator[tuple[int, str, float | None]]:
        """Yield (step, source, value) of the validations before this start, on rank 0. None: the value was not finite."""
        for line in self._validations:
            for key, value in line.items():
                if key.startswith(f"{name}/"):
                    yield line["step"], key.removeprefix(f"{name}/"), value

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        numbers = finite(dict(values))
        with disk.writing(self._path):
            self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
            for name, value in numbers.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def advance(self, step: int) -> None:
        """Advance the progress bar to a step that is not logged."""
        if self.enabled and self._progress is not None:
            self._progress.update(self._task, completed=step)


class SampleLog:
    """Writes which sequences this data-parallel rank's steps have read: samples/rank_NNNNN.jsonl, a line a step.

    On resume the lines of steps that are run again are dropped, those of ranks that are no more too.
    """

    def __init__(self, run_dir: Path, first_step: int, dp_rank: int, dp: int, describe: Callable[[Sequence[int]], Any]):
        self._describe = describe
        self._path = run_dir / SAMPLES / f"rank_{dp_rank:05d}.jsonl"
        with disk.writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for path in self._path.parent.glob("rank_*.jsonl"):
                rank = path.stem.removeprefix("rank_")
                if rank.isdecimal() and int(rank) % dp == dp_rank:  # a file of another name is the user's
                    forget_after(path, first_step)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def record(self, step: int, microbatches: Sequence[Mapping[str, Any]]) -> None:
        """Write which sequences a step has read."""
        samples = [self._describe(place) for batch in microbatches for place in batch["place"].tolist()]
        with disk.writing(self._path):
            self._file.write(json.dumps({"step": step, "samples": samples}) + "\n")


def sample_log(config: TrainConfig, groups: Groups, first_step: int, describe: Callable[[Sequence[int]], Any]) -> SampleLog | None:
    """Return the file of this rank's samples. None: not configured, or another rank reads the same sequences."""
    if not config.log.samples or groups.tp_rank or groups.cp_rank or groups.pp_rank:
        return None
    return SampleLog(config.run_dir, first_step, groups.dp_rank, groups.dp, describe)


def _short(value: float) -> str:
    return f"{value:.3e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4g}"


def _progress_bar(first_step: int, steps: int) -> tuple[Any, Any]:
    if not sys.stderr.isatty():
        return None, None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
    bar = Progress(*columns, console=Console(stderr=True))
    bar.start()
    return bar, bar.add_task("train", total=steps, completed=first_step, shown="")


def _keep_earlier(path: Path) -> None:
    """Rename the metrics of a run whose checkpoints are gone, or that never saved one: it begins anew, and its curve may be all that is left of it."""
    if not path.is_file() or not (taken := [values["step"] for _, values in _lines(path) if values["step"] > 0]):
        return
    number = 1
    while (earlier := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    path.rename(earlier)
    log.get().warning(
        "there is no checkpoint of the %d steps that this run has made: it begins anew; their metrics are in %s", max(taken), earlier
    )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a metrics file that a run wrote whole, each with its values."""
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            if values["step"] >= 0:
                yield line.decode(), values
        except (ValueError, KeyError, TypeError):
            continue


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines of a metrics file after a step, and those that a crash cut off or damaged; return the lines that stay."""
    if not path.is_file():
        return []
    kept = [(text, values) for text, values in _lines(path) if values["step"] <= step]
    write_text(path, "".join(f"{text}\n" for text, _ in kept))
    return [values for _, values in kept]
