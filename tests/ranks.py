"""Runs a test's function on the ranks of a gang: forked from one process that has imported torch and Megatron-Core, over gloo.

The fixture run_distributed (tests/conftest.py) is how a test asks for it. As a program this file is that process: a line of JSON on standard
input is a gang, a line on standard output what came of it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Ranks:
    """The process that forks; started by the first gang, ended with the tests."""

    def __init__(self, home: Path):
        self._home, self._number = home, 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(self, function: Callable[..., Any], num_ranks: int, timeout_s: float = 60.0, **arguments: Any) -> list[Any]:
        """Return what function(groups, **arguments) returned on each rank.

        The function is a module's own, and is found there by its name. Arguments and results travel as JSON. The argument `parallel` holds
        keys of ParallelConfig, which lay the grid, and is not passed on.
        Raises: AssertionError with the traceback of each rank that failed, the first one first, or with the ranks that have not ended after
        timeout_s. Every rank has ended by then.
        """
        self._number += 1
        folder = self._home / str(self._number)
        folder.mkdir()
        module = ".".join(Path(inspect.getfile(function)).relative_to(ROOT).with_suffix("").parts)
        gang = [module, function.__name__, num_ranks, timeout_s, str(folder), arguments]
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(gang, default=str) + "\n")
        self._server.stdin.flush()
        outcome = json.loads(self._server.stdout.readline() or '{"failed": "the process that forks the ranks has ended"}')
        assert not outcome["failed"], f"{function.__name__} on {num_ranks} ranks: {outcome['failed']}"
        return outcome["results"]

    def end(self) -> None:
        """End the process. It is told to: another child of this one may hold its input open, which then has no end."""
        assert self._server.stdin is not None
        if self._server.poll() is None:
            self._server.stdin.write("\n")
            self._server.stdin.flush()
        self._server.wait(30)


def serve() -> None:
    """Fork one gang after another, as standard input asks for them."""
    from megatron_prism.parallel import host

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    host.install()
    importlib.import_module("megatron.core.models.gpt")  # once, not in each rank
    while line := sys.stdin.readline().strip():
        module, name, num_ranks, timeout_s, folder, arguments = json.loads(line)
        function = getattr(importlib.import_module(module), name)
        print(json.dumps(gang(function, num_ranks, timeout_s, Path(folder), arguments)), file=answers, flush=True)


def free_port() -> int:
    """Return a port below those that Linux gives to whoever asks for any: one of those may be taken before rank 0 listens."""
    for _ in range(1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000))) as free:
            return free.getsockname()[1]
    raise RuntimeError("no free port from 20000 to 32000")


def gang(function: Callable[..., Any], num_ranks: int, timeout_s: float, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of one gang and wait for them; the first that fails, or the time, ends all."""
    os.environ.update(WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo")
    alive: dict[int, int] = {}  # rank by process
    failed: dict[int, str] = {}  # by rank
    for rank in range(num_ranks):
        if (child := os.fork()) == 0:
            run_rank(function, rank, timeout_s, folder, arguments)
        alive[child] = rank
    ends = time.monotonic() + timeout_s
    while alive and time.monotonic() < ends:
        time.sleep(0.01)
        for child, rank in list(alive.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del alive[child]
            if ended and status:
                failed[rank] = f"exit code {os.waitstatus_to_exitcode(status)}"
                ends = min(ends, time.monotonic() + 2)  # for the others to say what they met
    if alive and not failed:
        failed = dict.fromkeys(alive.values(), f"still running after {timeout_s:g} s")
    for child in alive:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    first = sorted(failed, key=lambda rank: failed_at(folder, rank))  # the others fail because it is gone
    said = [f"rank {rank}: {failed[rank]}\n{(folder / f'{rank}.txt').read_text()[-4000:]}" for rank in first]
    return {
        "failed": "\n".join(said),
        "results": [] if failed else [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)],
    }


def failed_at(folder: Path, rank: int) -> float:
    path = folder / f"{rank}.failed"
    return float(path.read_text()) if path.is_file() else time.monotonic()


def run_rank(function: Callable[..., Any], rank: int, timeout_s: float, folder: Path, arguments: dict[str, Any]) -> None:
    """Be one rank: run the function, leave RANK.json, and in RANK.txt what was printed and the traceback. Does not return."""
    code = 1
    try:
        output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        from megatron_prism.core.config import GangConfig, ParallelConfig
        from megatron_prism.parallel import groups

        with groups.gang(GangConfig(parallel=ParallelConfig(**arguments.pop("parallel", {})), seed=0), timeout_s=timeout_s) as grid:
            try:
                result = function(grid, **arguments)
            except BaseException:
                (folder / f"{rank}.failed").write_text(str(time.monotonic()))  # before the end of the process group, which fails the others
                raise
        (folder / f"{rank}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
