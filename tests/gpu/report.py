"""A check of a part: whether it holds, its figures and its time, as one line of JSON on standard output."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Check:
    """What a check has shown. ok: None where this machine cannot run it; figures then say why."""

    ok: bool | None = False
    figures: dict[str, Any] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Leave the check out."""
        self.ok, self.figures = None, {"skipped": reason}


@contextmanager
def check(part: str, name: str) -> Iterator[Check]:
    """Yield the check, and print its line at the end. An error within the block fails this check, and the part goes on."""
    result, started = Check(), time.perf_counter()
    try:
        yield result
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        traceback.print_exc()
        result.ok, result.figures = False, {**result.figures, "error": f"{type(error).__name__}: {error}"[-600:]}
    line = {"part": part, "check": name, "ok": result.ok, "figures": _plain(result.figures), "seconds": time.perf_counter() - started}
    print(json.dumps(_plain(line)), flush=True)


def read(text: str) -> list[dict[str, Any]]:
    """Return the checks among a part's lines of output; libraries print there too, and a killed part's last line may be cut."""
    checks = []
    for line in text.splitlines():
        if line.startswith('{"part"') and line.endswith("}"):
            checks.append(json.loads(line))
    return checks


def _plain(value: Any) -> Any:
    """Return a value that JSON has: numbers to four digits, NaN and inf as text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value
