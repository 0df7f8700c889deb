"""Say whether a change of the code keeps every bit that training computes.

    python tools/golden.py main             # the golden runs with the code of `main` and with the work tree's: the same bits?
    python tools/golden.py main -k cp2      # those with cp2 in their name
    python tools/golden.py --write          # record the work tree's figures anew: only where training is meant to compute something else

The runs are those of tests/golden/cases.yaml: tiny models of 12 steps from the command line, dense and hybrid, on each kind of layout. Each
revision prepares its own data and trains in a temporary folder, on this machine and interpreter; the revision's code is exported there, and
PYTHONPATH goes before an editable install. Loss, gradient norm, validation loss and the steps that the guard passed over must be equal bit for
bit. A line a case: `equal`, or the first step that differs and both values. Exit code 0: all are equal. 1: one is not, or a run failed.

tests/golden/figures.json, which tests/golden/test_golden.py compares with on any machine, says which versions it was recorded with. Where only
these have changed, compare with the revision before first, and then record.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from platform import machine, python_version, system

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "golden"))
import runs  # noqa: E402


def main() -> int:
    """Parse, run the cases, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("revision", nargs="?", help="a git revision to compare the work tree with")
    action.add_argument("--write", action="store_true", help="record the work tree's figures in tests/golden/figures.json")
    parser.add_argument("-k", metavar="TEXT", default="", help="only the cases with this text in their name")
    given = parser.parse_args()
    names = [name for name in runs.cases() if given.k in name]
    if not names:
        parser.error(f"no case has {given.k!r} in its name; there are {', '.join(runs.cases())}")
    with tempfile.TemporaryDirectory(prefix="prism_golden_") as folder:
        return write(names, Path(folder)) if given.write else compare(given.revision, names, Path(folder))


def compare(revision: str, names: list[str], folder: Path) -> int:
    """Run the cases with a revision's code and with the work tree's; print a line a case."""
    export(revision, folder / "tree")
    trees = {folder / "before": folder / "tree", folder / "after": ROOT}
    for home, tree in trees.items():
        runs.prepare(tree, home)
    different = 0
    for name in names:
        started = time.monotonic()
        num_processes = runs.cases()[name].get("nproc", 1)
        with ThreadPoolExecutor(1 if num_processes > 1 else 2) as pool:
            both = [pool.submit(runs.run, tree, home, name) for home, tree in trees.items()]
        failed = [
            f"failed with {tree}: {error}"
            for tree, run in zip((revision, "the work tree"), both, strict=True)
            if (error := run.exception())
        ]
        difference = "; ".join(failed) or runs.first_difference(both[0].result(), both[1].result(), tolerance=0.0)
        different += difference is not None
        print(f"{name:25} {difference or 'equal'}  ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(names) - different} of {len(names)} cases equal: {revision} and the work tree")
    return 1 if different else 0


def export(revision: str, folder: Path) -> None:
    """Write a revision's package to a new folder; end with git's words where there is no such revision."""
    done = subprocess.run(["git", "archive", "--format=tar", revision, "megatron_prism"], cwd=ROOT, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"golden: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def write(names: list[str], folder: Path) -> int:
    """Run the cases with the work tree's code and record their figures; print a line a case: how it differs from what was recorded."""
    record = json.loads(runs.RECORD.read_text(encoding="utf-8")) if runs.RECORD.is_file() else {"versions": versions(), "cases": {}}
    if record["versions"] != versions() and len(names) < len(runs.cases()):
        sys.exit(f"golden: {runs.RECORD.name} was made with {record['versions']}, here are {versions()}: record all cases")
    before, home = record["cases"], folder / "home"
    runs.prepare(ROOT, home)
    after = {}
    for name in names:
        after[name] = runs.run(ROOT, home, name)
        difference = runs.first_difference(before[name], after[name], tolerance=0.0) if name in before else "new"
        print(f"{name:25} {difference or 'unchanged'}", flush=True)
    figures = {name: after.get(name) or before[name] for name in runs.cases() if name in after or name in before}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in figures.items())
    runs.RECORD.write_text(f'{{"versions": {json.dumps(versions())}, "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")
    return 0


def versions() -> dict[str, str]:
    """Return what the figures depend on beside the code."""
    from torch.backends import cpu

    packages = {name: version(name) for name in ("torch", "megatron-core")}
    return {"python": python_version(), **packages, "platform": f"{system()} {machine()}", "instructions": cpu.get_cpu_capability()}


if __name__ == "__main__":
    sys.exit(main())
