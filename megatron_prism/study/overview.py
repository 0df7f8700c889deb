"""A study as it stands: what study.json says, and its lines for a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_prism.core import log
from megatron_prism.study import claims

KIND = "study"
TO_RUN, CHANGED, RUNNING, DONE, NO_GO, FAILED, STOPPED, BLOCKED = (
    "to run",
    "changed",
    "running",
    "done",
    "no-go",
    "failed",
    "stopped",
    "blocked",
)
ENDED = (DONE, NO_GO)
LEFT_OUT = "left out"  # by --only or --until: no state of a stage


def now() -> str:
    """Return the time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def progress(text: str, told_at: float, interval_s: float) -> float:
    """Show what runs: a line that is written over on a terminal, else a line of the log every interval_s. Return when it was last told."""
    if not text or time.monotonic() - told_at < (1.0 if sys.stderr.isatty() else interval_s):
        return told_at
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}\r")
        sys.stderr.flush()
    else:
        log.get().info("%s", text)
    return time.monotonic()


def lines(study: Mapping[str, Any], wanted: Collection[str]) -> Iterator[str]:
    """Yield a line for each stage that is wanted, one for all of them, and the table of claims."""
    stages: Mapping[str, Mapping[str, Any]] = {name: stage for name, stage in study["stages"].items() if name in wanted}
    width = max(map(len, stages), default=0)
    for name, stage in stages.items():
        times = f"{log.duration(stage['seconds'])} ({stage['cpu_s']:.0f} s of processors)" if stage["num_starts"] else ""
        told = stage["failure"] or stage["reason"]
        yield f"{name:<{width}}  {stage['state']:<8}  {stage['job']:<16}  {times}{': ' if told and times else ''}{told or ''}".rstrip()
    counts: dict[str, int] = {}
    for stage in stages.values():
        counts[stage["state"]] = counts.get(stage["state"], 0) + 1
    seconds, cpu_s = (sum(stage[key] for stage in stages.values()) for key in ("seconds", "cpu_s"))
    if left_out := len(study["stages"]) - len(stages):
        counts[LEFT_OUT] = left_out
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    yield f"{study['name']}: {told}; {log.duration(seconds)} of stages, {cpu_s:.0f} s of processors"
    given = {name.split("/")[0] for name, stage in study["stages"].items() if stage["result"]}  # NAME/0 is an element of an array
    yield from claims.lines(study["claims"], given)
