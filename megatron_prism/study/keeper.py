"""The keeper of a stage: a small process between the study and the stage, run as a script without this package.

    python keeper.py COMMAND...

It starts the command, forwards the signals that ask to stop, and ends with the command's exit code (128 + N where signal N killed it). Nothing that
the command started outlives it: orphans become the keeper's children, wherever they put themselves, and are killed when the command has ended. When
the study itself is gone, which the keeper sees by the end of its standard input, it kills everything at once. If the keeper is killed, the kernel
kills the command.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_MS = 200  # a stage that ends wakes the keeper at once; this is for what a signal may have missed
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main(command: list[str]) -> int:
    """Run a command, and return its exit code once nothing of it is left."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    keeper = os.getpid()

    def die_with_keeper() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(128 + signal.SIGKILL)

    # the command's group is its own: a signal that it sends to its group does not reach the keeper
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_keeper, process_group=0)
    for name in FORWARDED:
        signal.signal(name, lambda number, frame: child.send_signal(number))
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while child.poll() is None:
        for fd, _ in poll.poll(POLL_MS):
            if not os.read(fd, 512) and fd == 0:
                child.kill()
                end_orphans()
                return 128 + signal.SIGKILL
    end_orphans()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end_orphans() -> None:
    """Kill what is left of the command until nothing is, and reap it: its processor time is then the keeper's."""
    while (left := list(descendants(os.getpid()))) or has_children():
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)


def has_children() -> bool:
    """Say whether a child is left that has not been reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes below a process."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii").split()):
                yield from descendants(child)
                yield child


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
