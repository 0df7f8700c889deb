"""Run the parts, each in a process of its own under a time limit, and write what came of them: bash tools/gpu_check.sh --help."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    Part("parity", 200),  # of it Triton compiles the hybrids' kernels a minute and more
    Part("resume", 220),
    Part("kills", 180),
    Part("text", 90),
    Part("two_cudnns", 60),
    Part("saving", 90),
    Part("rl", 150, "dense"),
    Part("rl", 240, "hybrid"),
    Part("throughput", 120, "dense", alone=True),
    Part("throughput", 120, "lengths", alone=True),
    Part("layouts", 120, alone=True),
    Part("rl", 120, "engines", alone=True),
    Part("mcore", 150),
    Part("throughput", 200, "hybrid", alone=True),  # the last: mamba_ssm's autotuner may take minutes
)
TINY_FACTOR = 3.0  # a CPU's time, of a part's limit
LEAST_S = 15.0  # a part is not begun with less


class Runner:
    """Runs parts within what the command line says and a budget, which begins now; every process of a part ends with it."""

    def __init__(self, given: argparse.Namespace, work: Path):
        self._given, self._work, self._ends = given, work, time.monotonic() + given.budget_s
        self._children: set[subprocess.Popen[bytes]] = set()

    def run(self, part: Part) -> list[Line]:
        """Run a part within its limit and the budget, and return its checks."""
        left_s = self._ends - time.monotonic()
        if left_s < LEAST_S:
            return [_line(part, "not run", None, {"skipped": "the time budget is spent"})]
        tiny = ["--tiny"] if self._given.tiny else []
        folders = [str(self._work / name) for name in ("fixtures", part.name.replace(" ", "_"))]
        limit_s = min(left_s, part.limit_s * (TINY_FACTOR if tiny else 1))
        return self.start(part, [*folders, "--data", str(self._given.data), "--group", part.group, *tiny], limit_s)

    def start(self, part: Part, arguments: list[str], limit_s: float) -> list[Line]:
        """Run a part's program. A part that ends badly or too late has a failed check more, with the end of what it said."""
        print(f"gpu_check: {part.name}, at most {limit_s:.0f} s", file=sys.stderr, flush=True)
        began, command = time.monotonic(), [sys.executable, "-m", f"tests.gpu.{part.program}", *arguments]
        output, said = (self._work / f"{part.name.replace(' ', '_')}.{end}" for end in ("out", "err"))
        with output.open("w") as stream, said.open("w") as errors:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=stream, stderr=errors, start_new_session=True
            )
            self._children.add(child)
            try:
                ending = f"exit code {code}" if (code := child.wait(limit_s)) else ""
            except subprocess.TimeoutExpired:
                ending = f"stopped after {limit_s:.0f} s"
                _end(child)
            self._children.discard(child)
        lines = report.read(output.read_text(errors="replace"))
        if ending:
            lines.append(_line(part, "ended", False, {"error": f"{ending}: {said.read_text(errors='replace')[-800:]}"}))
        print(f"gpu_check: {part.name}: {len(lines)} checks, {time.monotonic() - began:.0f} s {ending}", file=sys.stderr, flush=True)
        return lines

    def end(self) -> None:
        """End what still runs: no process is left on the device."""
        for child in list(self._children):
            _end(child)


def main() -> int:
    """Run what was asked for; return 0 where nothing failed."""
    given = _read()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = [part for part in PARTS if given.parts is None or part.name in given.parts or part.program in given.parts]
    facts, lines = describe(), list[Line]()
    if given.work is not None:
        given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_", dir=given.work) as folder:
        runner = Runner(given, Path(folder))
        try:
            for lines_of_part in _in_turn(runner, parts, Path(folder)):
                lines += lines_of_part
                _write(given, facts, lines)
        finally:
            runner.end()
    print(table(facts, lines))
    failed = [line for line in lines if line["ok"] is False]
    print(f"gpu_check: {len(lines) - len(failed)} of {len(lines)} checks held or were left out, {len(failed)} failed; {given.out}")
    return 1 if failed else 0


def _in_turn(runner: Runner, parts: list[Part], work: Path) -> Iterator[list[Line]]:
    """Yield the checks of each part: first two parts at a time where the machine has the processors, then those that run alone."""
    fixtures = Part("fixtures", 120)
    made = runner.start(fixtures, [str(work / "fixtures")], fixtures.limit_s)
    yield made or [_line(fixtures, "made", True, {})]
    if made:
        return
    with ThreadPoolExecutor(2 if len(os.sched_getaffinity(0)) >= 16 else 1) as pool:
        futures = [pool.submit(runner.run, part) for part in parts if not part.alone]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:  # told to end: the pool waits for its threads, which wait for their parts
            pool.shutdown(wait=False, cancel_futures=True)
            runner.end()
            raise
    for part in parts:
        if part.alone:
            yield runner.run(part)


def _read() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small and few, for a CPU: shows that the programs run")
    parser.add_argument("--budget-s", type=float, help="the time of all parts together; default 480, 1800 with --tiny")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the checks as JSON; beside it the table as .md")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the test data's folder, for the golden text")
    parser.add_argument("--work", type=Path, help="a folder for what is written meanwhile: some 15 GB; default that of temporary files")
    parser.add_argument("--parts", nargs="+", help=f"these alone: {', '.join(part.name for part in PARTS)}")
    given = parser.parse_args()
    names = {name for part in PARTS for name in (part.name, part.program)}
    if unknown := [name for name in given.parts or () if name not in names]:
        parser.error(f"--parts: {', '.join(unknown)}: there is no such part; there are {', '.join(part.name for part in PARTS)}")
    given.budget_s = given.budget_s or (1800.0 if given.tiny else 480.0)
    return given


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
