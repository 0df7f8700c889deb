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
# job: (the test, how many examples, what it does)
SOAKS: dict[str, tuple[str, int, str]] = {
    "kills": (
        "reliability/test_gang.py::test_random_kills_lose_nothing",
        500,
        "kill a gang, one of its ranks or its launcher at random moments of training and saving, and start it again",
    ),
    "splits": (
        "distributed/test_resume.py::test_resume_is_bit_equal",
        10,
        "kill runs on tp 2, pp 2, dp 2 and tp 2 x pp 2 after each of so many steps, and compare what they become bit for bit",
    ),
    "reshards": ("reliability/test_reshard.py", 20, "go on from each of 5 layouts on each other one: always all 20 pairs"),
    "signals": (
        "reliability/test_gang.py::test_a_signal_saves_and_ends",
        100,
        "ask a gang to stop at random moments, in each of the ways",
    ),
    "flips": (
        "reliability/test_faults.py::test_every_flipped_bit_is_seen",
        1000,
        "flip bits of a checkpoint, one at a time, and verify it",
    ),
    "deaths": (
        "reliability/test_gang.py::test_what_befalls_one_rank_ends_the_gang",
        50,
        "let a rank, its loader, its writer or its numbers fail at a random step",
    ),
    "headers": ("unit/checkpoint/test_fuzz.py", 5000, "change headers, indexes and configs of a Hugging Face folder, and import it"),
    "pickles": (
        "reliability/test_hostile.py::test_a_damaged_metadata_is_refused_or_read_and_never_runs",
        1000,
        "change the .metadata of a checkpoint, with hostile pickles among it, and read it",
    ),
    "configs": (
        "reliability/test_config_fuzz.py::test_a_changed_config_is_accepted_or_refused_in_lines",
        5000,
        "change the repository's configs, and give them to the command line",
    ),
    "texts": (
        "unit/launch/test_slurm_texts.py::test_every_text_arrives_as_it_was_written",
        10000,
        "write hostile texts into every field of a cluster and a command, and run the job's script",
    ),
    "study": (
        "reliability/test_study_whole.py",
        1,
        "kill the tiny study, with fewer steps, so many times in each of its stages, and run it as a chain of Slurm jobs; "
        "compare claims and report with those of an unbroken one",
    ),
    "rl": (
        "e2e/test_rl.py::test_rl_lifts_what_mid_training_taught_whatever_its_seed",
        3,
        "train a base model, mid-train it and learn by reinforcement from both, dense and hybrid, with a seed of its own each time",
    ),
}


def main() -> int:
    """Parse, run, and return the tests' exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name, (_, size, text) in SOAKS.items():
        job = jobs.add_parser(name, help=f"{text}; {size} examples")
        job.add_argument("--examples", type=int, default=size)
        job.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args()
    sizes = [f"--soak={given.examples}", f"--soak-seed={given.seed}", f"--hypothesis-seed={given.seed}"]
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-s", f"tests/{SOAKS[given.job][0]}", *sizes], cwd=ROOT).returncode
    print(f"soak: {given.job}: {given.examples} examples, seed {given.seed}: exit code {code} after {time.monotonic() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
