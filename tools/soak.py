#!/usr/bin/env python3
"""Run a reliability test for far longer than the continuous tests do: tools/soak.py headers --examples 5000.

The tests are those of tests/; only their sizes stand here. The seed is printed: with --seed the same examples come again.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def headers(arguments: argparse.Namespace) -> int:
    """Change headers, indexes and configs of a Hugging Face folder at random, and import it (R10)."""
    return _pytest("tests/unit/checkpoint/test_fuzz.py", f"--fuzz-examples={arguments.examples}", f"--hypothesis-seed={arguments.seed}")


def pickles(arguments: argparse.Namespace) -> int:
    """Change the .metadata of a checkpoint at random, with hostile pickles among it, and read it (R11)."""
    return _fuzz("tests/reliability/test_hostile.py::test_a_damaged_metadata_is_refused_or_read_and_never_runs", arguments)


def configs(arguments: argparse.Namespace) -> int:
    """Change the repository's configs at random, and give them to the command line (R13)."""
    return _fuzz("tests/reliability/test_config_fuzz.py::test_a_changed_config_is_accepted_or_refused_in_lines", arguments)


def flips(arguments: argparse.Namespace) -> int:
    """Flip bits of a checkpoint, one at a time, and verify it (R6)."""
    return _pytest("tests/reliability/test_faults.py::test_every_flipped_bit_is_seen", f"--fuzz-examples={arguments.examples}", f"--moments-seed={arguments.seed}")


def kills(arguments: argparse.Namespace) -> int:
    """Kill a gang or one of its ranks at random moments of training and saving, and start it again (R1, R17)."""
    return _pytest("tests/reliability/test_gang.py::test_random_kills_lose_nothing", f"--kills={arguments.examples}", f"--moments-seed={arguments.seed}")


def signals(arguments: argparse.Namespace) -> int:
    """Ask a gang to stop at random moments, in each of the ways, and start it again (R5)."""
    return _pytest("tests/reliability/test_gang.py::test_a_signal_saves_and_ends", f"--signals={arguments.examples}", f"--moments-seed={arguments.seed}")


def _fuzz(test: str, arguments: argparse.Namespace) -> int:
    return _pytest(test, f"--fuzz-examples={arguments.examples}", f"--fuzz-seed={arguments.seed}")


def _pytest(test: str, *sizes: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-s", test, *sizes], cwd=ROOT).returncode


def main() -> int:
    """Parse, run, and return the tests' exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for run, size in {headers: 5000, pickles: 1000, configs: 5000, flips: 1000, kills: 500, signals: 100}.items():
        job = jobs.add_parser(run.__name__, help=run.__doc__)
        job.add_argument("--examples", type=int, default=size)
        job.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
        job.set_defaults(run=run)
    arguments = parser.parse_args()
    start = time.monotonic()
    code = arguments.run(arguments)
    print(f"soak: {arguments.examples} examples, seed {arguments.seed}: exit code {code} after {time.monotonic() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
