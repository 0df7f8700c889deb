"""What a contained program may use, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ended = Literal["exit", "time", "output", "cpu", "signal", "fault"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of one program; the memory is the address space of its one process, beside disk_bytes of files in /tmp.

    What a program may compute is bounded by its CPU-seconds, which a busy machine does not lengthen; wall_s ends one that sleeps.
    """

    wall_s: float = 20.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    num_threads: int = 32

    def inside(self, counts_threads: bool) -> dict[str, int]:
        """Return the resource limits by their names in the module `resource`. counts_threads: as in Backend."""
        return {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_FSIZE": self.disk_bytes,
            "RLIMIT_CORE": 0,
            "RLIMIT_NOFILE": 64,
            **({"RLIMIT_NPROC": self.num_threads} if counts_threads else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """A program's end.

    exit_code: None where it was killed. ended: of itself (exit), or by a limit, a signal, a fault. is_fault: the sandbox or the machine failed,
    which says nothing of the program. verdict: what a judge said of an answer (`Sandbox.judge`). why: of a fault, or the end of stderr.
    """

    stdout: bytes
    exit_code: int | None
    ended: Ended
    seconds: float
    verdict: str = ""
    why: str = ""

    @property
    def is_fault(self) -> bool:
        return self.ended == "fault"
