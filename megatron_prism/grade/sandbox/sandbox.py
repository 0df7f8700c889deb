"""The sandbox as its users see it: run a program, or let tests judge an answer. A fault is tried a second time, and then told."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prism.grade.sandbox import seccomp, supervise
from megatron_prism.grade.sandbox.backend import Backend, Interpreter, interpreter
from megatron_prism.grade.sandbox.result import Limits, Result

NUM_TRIES = 2


def _inside_source(name: str = "inside") -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A backend, bounds and an interpreter. It holds no process and no descriptor between two runs; threads may share it."""

    backend: Backend
    limits: Limits = field(default_factory=Limits)
    interpreter: Interpreter = field(default_factory=interpreter)
    inside: str = field(default_factory=_inside_source, repr=False)
    exchange: str = field(default_factory=partial(_inside_source, "exchange"), repr=False)
    landlock: str = field(default_factory=partial(_inside_source, "landlock"), repr=False)

    def run(self, source: str, stdin: str = "") -> Result:
        """Run a Python program on a text and return what became of it."""
        for _ in range(NUM_TRIES):
            result = self._together([({"role": "program", "source": source}, stdin)])[0]
            if not result.is_fault:
                break
        return result

    def judge(self, answer: str, tests: str, names: Sequence[str]) -> Result:
        """Run tests that call an answer's `names`, each in a sandbox of its own; the result's verdict is `passed`, `failed: ...` or `broken: ...`.

        Values cross as built-in types, arguments by value: what the answer does to its arguments is not seen by the tests.
        """
        fields: list[dict[str, Any]] = [{"role": "answer", "source": answer}, {"role": "judge", "source": tests, "names": list(names)}]
        for _ in range(NUM_TRIES):
            results = self._together([(given, "") for given in fields])
            if not any(result.is_fault for result in results):
                return results[-1]
        return next(result for result in results if result.is_fault)

    def _together(self, given: Sequence[tuple[dict[str, Any], str]]) -> list[Result]:
        """Run one program, or an answer and its judge."""
        try:
            program = seccomp.filter_bytes()
            common: dict[str, Any] = {"limits": self.limits.inside(self.backend.counts_threads), "seccomp": b""}
            if not self.backend.bwrap:
                common |= {"seccomp": program, "readable": self.interpreter.readable(), "landlock": self.landlock}
            links: list[dict[str, int]] = [{} for _ in given]
            if len(given) == 2:
                common["exchange"] = self.exchange
                (answer_reads, judge_writes), (judge_reads, answer_writes) = os.pipe(), os.pipe()
                links = [{"requests": answer_reads, "replies": answer_writes}, {"requests": judge_writes, "replies": judge_reads}]
            jobs = [
                supervise.Job(fields={**common, **fields, **link}, stdin=stdin.encode("utf-8", "surrogatepass"), fds=tuple(link.values()))
                for (fields, stdin), link in zip(given, links, strict=True)
            ]
            command = self.backend.command(self.interpreter, self.limits)
            command += [str(self.interpreter.program), "-I", "-S", "-B", "-c", self.inside, "{job}"]
            return supervise.run([command] * len(jobs), jobs, self.limits, program)
        except OSError as error:  # no process, no descriptor, no memory
            return [Result(stdout=b"", exit_code=None, ended="fault", seconds=0.0, why=f"{type(error).__name__}: {error}")] * len(given)


def describe(sandbox: Sandbox) -> str:
    """Return one line on what contains the code."""
    return f"{sandbox.backend.name} on {platform.machine()}, {sandbox.interpreter.program}"
