"""Run the parts, each in a process of its own under a time limit, and write what they found: bash tools/gpu_check.sh --help."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu import report
from tests.gpu.options import ROOT
from tests.gpu.runs import environment
from tests.gpu.table import describe, table

Line = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A program of this folder, the longest that it may take, and a group of its checks. alone: nothing else may run beside it."""

    program: str
    limit_s: float
    group: str = ""
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self.program} {self.group}".strip()


PARTS = (  # by worth: what is left when the budget is spent is not run
    Part("parity", 150),
    Part("resume", 180),
    Part("kills", 120),
    Part("text", 90),
    Part("two_cudnns", 60),
    Part("saving", 90),
    Part("throughput", 120, "dense", alone=True),
    Part("throughput", 120, "lengths", alone=True),
    Part("layouts", 120, alone=True),
    Part("throughput", 200, "hybrid", alone=True),  # the last: mamba_ssm's autotuner may take minutes
)
TINY_FACTOR = 3.0  # a CPU's time, of a part's limit
LEAST_S = 15.0  # a part is not begun with less


class Budget:
    """The time that is left."""

    def __init__(self, budget_s: float):
        self._ends = time.monotonic() + budget_s

    def left_s(self) -> float:
        return self._ends - time.monotonic()


def main() -> int:
    """Run what was asked for; return 0 where nothing failed."""
    given = _read()
    budget, names = Budget(given.budget_s), given.parts or [part.name for part in PARTS]
    parts = [part for part in PARTS if part.name in names or part.program in names]
    lines: list[Line] = []
    facts = describe()
    written = threading.Lock()

    def finish(found: list[Line]) -> None:
        with written:
            lines.extend(found)
            _write(given, facts, lines)

    with tempfile.TemporaryDirectory(prefix="gpu_check_", dir=given.work) as folder:
        work = Path(folder)
        fixtures = Part("fixtures", 120)
        made = start_part(fixtures, [str(work / "fixtures")], fixtures.limit_s, work)
        finish(made or [_line(fixtures, "made", True, {})])
        if not made:
            together = [part for part in parts if not part.alone]
            with ThreadPoolExecutor(1 if (os.cpu_count() or 1) < 16 else 2) as pool:
                for found in pool.map(lambda part: run_part(part, given, budget, work), together):
                    finish(found)
            for part in parts:
                if part.alone:
                    finish(run_part(part, given, budget, work))
    print(table(facts, lines))
    failed = [line for line in lines if line["ok"] is False]
    print(f"gpu_check: {len(lines) - len(failed)} of {len(lines)} checks held or were left out, {len(failed)} failed; {given.out}")
    return 1 if failed else 0


def _read() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small and few, for a CPU: shows that the programs run")
    parser.add_argument("--budget-s", type=float, help="the time of all parts together; default 480, 1800 with --tiny")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the checks as JSON; beside it the table as .md")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the test data's folder, for the golden text")
    parser.add_argument("--work", type=Path, help="a folder for what is written meanwhile: some 15 GB; default that of temporary files")
    parser.add_argument("--parts", nargs="+", help=f"these alone: {', '.join(part.name for part in PARTS)}")
    given = parser.parse_args()
    given.budget_s = given.budget_s or (1800.0 if given.tiny else 480.0)
    return given


def run_part(part: Part, given: argparse.Namespace, budget: Budget, work: Path) -> list[Line]:
    """Run a part within its limit and the budget, and return its checks."""
    left_s = budget.left_s()
    if left_s < LEAST_S:
        return [_line(part, "not run", None, {"skipped": "the time budget is spent"})]
    limit_s = min(left_s, part.limit_s * (TINY_FACTOR if given.tiny else 1))
    tiny = ["--tiny"] if given.tiny else []
    own = work / part.name.replace(" ", "_")
    return start_part(part, [str(work / "fixtures"), str(own), "--data", str(given.data), "--group", part.group, *tiny], limit_s, work)


def start_part(part: Part, arguments: list[str], limit_s: float, work: Path) -> list[Line]:
    """Run a part's program. A part that ends badly or too late has a failed check more, with the end of what it said."""
    print(f"gpu_check: {part.name}, at most {limit_s:.0f} s", file=sys.stderr, flush=True)
    began = time.monotonic()
    output, said = (work / f"{part.name.replace(' ', '_')}.{end}" for end in ("out", "err"))
    with output.open("w") as stream, said.open("w") as errors:
        command = [sys.executable, "-m", f"tests.gpu.{part.program}", *arguments]
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=stream, stderr=errors, start_new_session=True
        )
        try:
            ending = f"exit code {code}" if (code := child.wait(limit_s)) else ""
        except subprocess.TimeoutExpired:
            ending = f"stopped after {limit_s:.0f} s"
            _end(child)
    lines = report.read(output.read_text(errors="replace"))
    if ending:
        lines.append(_line(part, "ended", False, {"error": f"{ending}: {said.read_text(errors='replace')[-800:]}"}))
    seconds = time.monotonic() - began
    print(f"gpu_check: {part.name}: {len(lines)} checks, {seconds:.0f} s {ending}", file=sys.stderr, flush=True)
    return lines


def _end(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL a part and what it started, runs that lead sessions of their own too."""
    import psutil

    everyone = psutil.Process(child.pid).children(recursive=True)
    os.killpg(child.pid, signal.SIGKILL)
    for process in everyone:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    child.wait()


def _line(part: Part, check: str, ok: bool | None, figures: dict[str, Any]) -> Line:
    return {"part": part.name, "check": check, "ok": ok, "figures": figures, "seconds": 0.0}


def _write(given: argparse.Namespace, facts: dict[str, str], lines: list[Line]) -> None:
    """Write all that is known so far: whoever stops this keeps it."""
    given.out.write_text(json.dumps({"machine": facts, "tiny": given.tiny, "checks": lines}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(facts, lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
