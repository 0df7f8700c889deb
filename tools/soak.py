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
    command = [sys.executable, "-m", "pytest", "-q", "-s", "tests/unit/checkpoint/test_fuzz.py"]
    sizes = [f"--fuzz-examples={arguments.examples}", f"--hypothesis-seed={arguments.seed}"]
    return subprocess.run([*command, *sizes], cwd=ROOT).returncode


def pickles(arguments: argparse.Namespace) -> int:
    """Change the .metadata of a checkpoint at random, with hostile pickles among it, and read it (R11)."""
    return _fuzz("tests/reliability/test_hostile.py::test_a_damaged_metadata_is_refused_or_read_and_never_runs", arguments)


def configs(arguments: argparse.Namespace) -> int:
    """Change the repository's configs at random, and give them to the command line (R13)."""
    return _fuzz("tests/reliability/test_config_fuzz.py::test_a_changed_config_is_accepted_or_refused_in_lines", arguments)


def _fuzz(test: str, arguments: argparse.Namespace) -> int:
    sizes = [f"--fuzz-examples={arguments.examples}", f"--fuzz-seed={arguments.seed}"]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-s", test, *sizes], cwd=ROOT).returncode


def main() -> int:
    """Parse, run, and return the tests' exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for run in (headers, pickles, configs):
        job = jobs.add_parser(run.__name__, help=run.__doc__)
        job.add_argument("--examples", type=int, default=5000)
        job.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
        job.set_defaults(run=run)
    arguments = parser.parse_args()
    start = time.monotonic()
    code = arguments.run(arguments)
    print(f"soak: {arguments.examples} examples, seed {arguments.seed}: exit code {code} after {time.monotonic() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
