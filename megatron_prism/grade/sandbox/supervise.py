"""Start contained processes, take what they say until they end or reach a limit, and leave nothing of them behind."""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prism.grade.sandbox.inside import encode
from megatron_prism.grade.sandbox.result import Ended, Limits, Result

GRACE_S = 5.0  # for a killed process to be gone
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one contained process is given. fields: for `inside.main`, beside the descriptors. fds: inherited under their own numbers."""

    fields: Mapping[str, Any]
    stdin: bytes = b""
    fds: tuple[int, ...] = ()


@dataclass(eq=False)
class Running:
    """A process and what it said: stdout, stderr, started, verdict. starved_s: of a processor, as it was killed for its time."""

    process: subprocess.Popen[bytes]
    began: float
    starved_s: float = 0.0
    said: dict[str, bytearray] = field(default_factory=lambda: {name: bytearray() for name in ("stdout", "stderr", "started", "verdict")})
    killed_for: Ended | None = None
    seconds: float = 0.0
    is_gone: bool = False

    def hear(self, name: str, part: bytes, max_bytes: int) -> None:
        """Keep what was said, up to max_bytes in all; kill a process that says more."""
        room = max_bytes - sum(map(len, self.said.values()))
        self.said[name] += part[:room]
        if len(part) > room:
            self.kill("output")

    def kill(self, why: Ended | None) -> None:
        if why == "time":
            self.starved_s = starved_s(self.process.pid)
        self.killed_for = self.killed_for or why
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # not reaped yet: the number is still its own


def starved_s(pid: int) -> float:
    """Return how long others kept the program behind a process from a processor: what its main thread waited, less what its own other threads
    computed meanwhile. 0 where the kernel does not tell.

    A program that sleeps waits for no processor, and one that crowds itself out is starved by nobody. It has no child processes (seccomp.py).
    """
    try:
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():  # bubblewrap waits; the program is its child
            pid = int(children[0])
        running_ns, waited_ns = map(int, Path(f"/proc/{pid}/schedstat").read_text().split()[:2])
        used = map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])  # utime, stime, of all threads
        return max(0.0, (running_ns + waited_ns) / 1e9 - sum(used) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


def memory_file(stack: ExitStack, data: bytes) -> int:
    """Return a descriptor of sealed bytes, which is closed with the stack."""
    fd = os.memfd_create("job", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def run(commands: Sequence[Sequence[str]], jobs: Sequence[Job], limits: Limits, seccomp: bytes) -> list[Result]:
    """Run the jobs at once, each behind its command, until the last of them has ended; the others are then killed.

    A command's words {seccomp}, {stdin} and {job} stand for descriptors. The jobs' fds are closed here in any case.
    Raises: OSError: a process or descriptor cannot be had.
    """
    with ExitStack() as stack:
        joining = stack.enter_context(ExitStack())
        for job in jobs:
            for fd in job.fds:
                joining.callback(os.close, fd)
        selector = stack.enter_context(selectors.DefaultSelector())
        runs: list[Running] = []
        stack.callback(_reap, runs)
        for command, job in zip(commands, jobs, strict=True):
            _start(stack, selector, runs, command, job, limits, seccomp)
        joining.close()  # the sandboxes have them: one that ends is seen by the other
        _watch(selector, runs, limits)
        return [_result(running, limits) for running in runs]


def _start(
    stack: ExitStack,
    selector: selectors.BaseSelector,
    runs: list[Running],
    command: Sequence[str],
    job: Job,
    limits: Limits,
    seccomp: bytes,
) -> None:
    """Start one process and add it to runs, its pipes and its end to the selector."""
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "started", "verdict")}
    for reads, _ in pipes.values():
        stack.callback(os.close, reads)
        os.set_blocking(reads, False)
    with ExitStack() as starting:
        for _, writes in pipes.values():
            starting.callback(os.close, writes)
        started, verdict = pipes["started"][1], pipes["verdict"][1]
        is_judge = job.fields["role"] == "judge"
        fields = {**job.fields, "started": started, "verdict": verdict if is_judge else -1}
        fds = {"{job}": memory_file(starting, encode(fields))}
        for word, data in (("{seccomp}", seccomp), ("{stdin}", job.stdin)):
            if word in command:
                fds[word] = memory_file(starting, data)
        inherited = [*fds.values(), started, *([verdict] if is_judge else []), *job.fds]
        process = subprocess.Popen(
            [str(fds.get(word, word)) for word in command],
            stdin=memory_file(starting, job.stdin),
            stdout=pipes["stdout"][1],
            stderr=pipes["stderr"][1],
            env={},
            cwd="/",
            pass_fds=inherited,
            start_new_session=True,
        )
    running = Running(process, time.monotonic())
    runs.append(running)
    for name, (reads, _) in pipes.items():
        selector.register(reads, selectors.EVENT_READ, (running, name))
    ended = os.pidfd_open(process.pid)
    stack.callback(os.close, ended)
    selector.register(ended, selectors.EVENT_READ, (running, "ended"))


def _watch(selector: selectors.BaseSelector, runs: Sequence[Running], limits: Limits) -> None:
    """Read until every pipe is at its end and its process has ended; kill at a limit."""
    num_open = {id(running): 5 for running in runs}
    deadline, is_late = time.monotonic() + limits.wall_s, False
    while any(num_open.values()):
        events = selector.select(max(0.0, deadline - time.monotonic()))
        if time.monotonic() >= deadline:
            if is_late:
                return  # killed, and still there: a fault
            is_late, deadline = True, time.monotonic() + GRACE_S
            for running in runs:
                if num_open[id(running)]:
                    running.kill("time")
        for key, _ in events:
            running, name = key.data
            part = b"" if name == "ended" else os.read(key.fd, 1 << 16)
            if part:
                running.hear(name, part, limits.output_bytes)
                continue
            selector.unregister(key.fd)
            num_open[id(running)] -= 1
            if name == "ended":
                running.seconds = time.monotonic() - running.began
            if not num_open[id(running)]:
                running.is_gone = True
                if running is runs[-1]:
                    for other in runs[:-1]:
                        other.kill("signal")


def _reap(runs: Sequence[Running]) -> None:
    for running in runs:
        if running.process.returncode is None:
            running.kill(None)
            with suppress(subprocess.TimeoutExpired):  # one that the kernel holds has been called a fault
                running.process.wait(GRACE_S)


def _result(running: Running, limits: Limits) -> Result:
    said = {name: bytes(part) for name, part in running.said.items()}
    why, code, cpu_s = said["stderr"][-2000:].decode("utf-8", "replace"), 0, 0.0
    if running.is_gone:
        _, status, used = os.wait4(running.process.pid, 0)
        code, cpu_s = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        running.process.returncode = code
    number = -code if code < 0 else code - 128 if code > 128 else 0  # a signal, of the process itself or as bubblewrap tells it
    ended: Ended = "exit"
    if not running.is_gone:
        ended, why = "fault", "a killed process was not gone in time"
    elif not said["started"]:
        ended, why = "fault", f"the sandbox did not start the program ({running.killed_for or code}): {why}"
    elif running.killed_for == "time" and running.starved_s >= limits.wall_s / 2:
        ended, why = "fault", f"it waited {running.starved_s:.1f} s for a processor: the machine is too busy"
    elif running.killed_for:
        ended = running.killed_for
    elif number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s >= 0.9 * limits.cpu_s):
        # the kernel's SIGKILL comes a second past the limit, by its ticks, which are coarser than the time that it tells
        ended = "cpu"
    elif number == signal.SIGKILL:  # the filter lets no program send it, nor exit with its number: the machine had no memory left
        ended, why = "fault", "killed from outside"
    elif number:
        ended = "signal"
    return Result(
        stdout=said["stdout"],
        exit_code=code if ended == "exit" else None,
        ended=ended,
        seconds=running.seconds,
        verdict=said["verdict"].decode("utf-8", "replace"),
        why=why,
    )
