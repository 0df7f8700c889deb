"""What every part is told on its command line: python -m tests.gpu.PART FIXTURES WORK [--tiny] [--data FOLDER] [--group NAME]."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    """fixtures: what fixtures.py made. work: an empty folder of the part's own. tiny: small and few, for a CPU. data: the shared test data.
    group: which of a part's groups of checks.
    """

    fixtures: Path
    work: Path
    tiny: bool
    data: Path
    group: str

    @property
    def num_at_once(self) -> int:
        """The runs that this process may train at a time: two processors each, of those that it was given."""
        return max(1, len(os.sched_getaffinity(0)) // 2)


def read() -> Options:
    """Read the command line, and make the part's folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--group", default="")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    return Options(given.fixtures.resolve(), given.work.resolve(), given.tiny, given.data.resolve(), given.group)
