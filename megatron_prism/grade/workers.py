"""Algebra in processes that can be killed: math-verify compares, the kernel counts its CPU-seconds, and the caller never waits for a bomb.

A worker is a new interpreter (never a fork of a process with torch's threads). It speaks lines of JSON: it gets [gold, answer], and says
"gold" when it has parsed the gold, then true or false, or [why] where the gold cannot be parsed. A comparison beyond its CPU-seconds ends the
worker by SIGXCPU: the response's doing, so wrong. One that is late on the clock only, or a worker that died otherwise, is the machine's fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, Self

from megatron_prism.core.errors import EnvironmentFault

START_LIMIT_S = 180.0  # sympy is imported
MAX_MEMORY_BYTES = 2 << 30
Verdict = bool | str  # right or not, or why it is a fault
BAD_GOLD = "the gold cannot be parsed"


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    is_ready: bool = False
    task: int | None = None
    gold_parsed: bool = False
    received: bytes = b""


@dataclass
class Workers:
    """A pool of workers that compares expressions, for one call at a time. A context manager: no worker is left after it.

    A thread of the pool starts the workers: the kernel ends them with the thread that started them, and a caller's thread may be short.
    """

    num_workers: int
    cpu_limit_s: int
    wall_limit_s: float
    _workers: list[_Worker] = field(default_factory=list)
    _starter: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "grading workers"))
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _is_ending: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        for worker in list(self._workers):
            worker.process.kill()  # a call in another thread sees it, and ends
        with self._one_at_a_time:
            self._end_all()
        self._starter.shutdown()

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Compare each (gold, answer), and return for each True, False, or why that could not be said.

        Raises: EnvironmentFault where a worker cannot be started, or the pool ends meanwhile.
        """
        with self._one_at_a_time:
            try:
                return self._compare(pairs)
            except BaseException:  # no worker is left with a pair of this call
                self._end_all()
                raise

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._end(worker)  # while it was idle
        verdicts: dict[int, Verdict] = {}
        waiting = list(range(len(pairs)))[::-1]
        while len(verdicts) < len(pairs):
            if self._is_ending:
                raise EnvironmentFault("grading was ended before it was done")
            while len(self._workers) < min(self.num_workers, len(waiting) + sum(worker.task is not None for worker in self._workers)):
                self._start()
            for worker in self._workers:
                if worker.is_ready and worker.task is None and waiting:
                    self._send(worker, waiting.pop(), pairs)
            for worker in self._with_news():
                self._read(worker, verdicts, waiting)
        return [verdicts[index] for index in range(len(pairs))]

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", "megatron_prism.grade.workers", str(os.getpid()), str(self.cpu_limit_s)]
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)

        self._workers.append(_Worker(self._starter.submit(start).result(), time.monotonic() + START_LIMIT_S))

    def _end_all(self) -> None:
        for worker in list(self._workers):
            self._end(worker)

    def _end(self, worker: _Worker) -> int:
        """Kill a worker and return its exit code, which is its own where it had ended before."""
        self._workers.remove(worker)
        if worker.process.stdout is not None and worker.process.stdin is not None:
            worker.process.kill()
            code = worker.process.wait()
            worker.process.stdout.close()
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
            return code
        raise AssertionError("a worker has pipes")

    def _send(self, worker: _Worker, task: int, pairs: Sequence[tuple[str, str]]) -> None:
        worker.task, worker.gold_parsed, worker.deadline = task, False, time.monotonic() + self.wall_limit_s
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: _read sees its end
            worker.process.stdin.write(json.dumps(pairs[task]).encode() + b"\n")
            worker.process.stdin.flush()

    def _with_news(self) -> list[_Worker]:
        """Wait until a worker has said something, has ended, or is late; return those workers."""
        busy = [worker for worker in self._workers if worker.task is not None or not worker.is_ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            wait_s = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            news: list[_Worker] = [key.data for key, _ in selector.select(wait_s)]
        return news + [worker for worker in busy if worker not in news and worker.deadline <= time.monotonic()]

    def _read(self, worker: _Worker, verdicts: dict[int, Verdict], waiting: list[int]) -> None:
        is_late = worker.deadline <= time.monotonic()
        said = b""
        assert worker.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(worker.process.stdout, selectors.EVENT_READ)
            if selector.select(0):
                said = os.read(worker.process.stdout.fileno(), 1 << 16)
                is_late = False
        if not said:
            self._lost(worker, is_late, verdicts)
            return
        *lines, worker.received = (worker.received + said).split(b"\n")
        for line in map(json.loads, lines):
            if line == "ready":
                worker.is_ready = True
            elif line == "gold":
                worker.gold_parsed = True
            else:
                assert worker.task is not None
                verdicts[worker.task] = line if isinstance(line, bool) else str(line[0])
                worker.task = None

    def _lost(self, worker: _Worker, is_late: bool, verdicts: dict[int, Verdict]) -> None:
        """End a worker that is late or dead, and say whose doing it was."""
        task = worker.task
        code = self._end(worker)
        if not worker.is_ready:
            raise EnvironmentFault(
                f"a grading worker did not start ({'too slow' if is_late else f'exit code {code}'}): is math-verify whole?"
            )
        if task is None:
            return
        if code == -signal.SIGXCPU:
            verdicts[task] = False if worker.gold_parsed else f"{BAD_GOLD} in {self.cpu_limit_s} CPU-seconds"
        else:
            verdicts[task] = f"no verdict in {self.wall_limit_s:g} s" if is_late else f"a grading worker ended with code {code}"


def main(parent: int, cpu_limit_s: int, stdin: IO[str], say_to: IO[str]) -> None:
    """Answer comparisons until standard input ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: at the end of the thread that started this process
        if os.getppid() != parent:
            os._exit(1)
    import logging

    logging.disable(logging.CRITICAL)  # math-verify logs every comparison that fails
    import math_verify  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(value: Any) -> None:
        say_to.write(json.dumps(value) + "\n")
        say_to.flush()

    say("ready")
    for line in stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit_s = int(used.ru_utime + used.ru_stime) + 1 + cpu_limit_s
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        for value in compared(*json.loads(line)):
            say(value)


def compared(gold: str, answer: str) -> Iterator[Any]:
    """Yield what a worker says of one pair. An error while the answer is parsed or compared is the answer's: it is not the gold's value."""
    import math_verify

    try:
        golds = _parsed_gold(gold)
    except Exception:
        golds = []
    if not any(not isinstance(part, str) for part in golds):
        yield [BAD_GOLD]
        return
    yield "gold"
    try:
        is_right = bool(math_verify.verify(list(golds), _parsed(answer), timeout_seconds=None))
    except (Exception, MemoryError):
        is_right = False
    yield is_right


def _parsed(text: str) -> list[Any]:
    import math_verify

    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    return list(math_verify.parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None))


_parsed_gold = lru_cache(maxsize=256)(_parsed)  # a group's answers share it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.stdin, sys.stdout)
