"""Containment without namespaces: Landlock, capabilities and the filter of system calls, from within the process.

Its text is run in the names of `inside.py`, inside the sandbox; nothing imports it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def contain(readable: list[str], seccomp: bytes) -> None:
    """Give up, for good, every file but the readable ones, every capability, and the filter's system calls.

    Raises: OSError: the kernel refuses a part of it.
    """
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: Any) -> int:
        given = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
        got = getattr(libc, name)(*given)
        if got < 0:
            raise OSError(ctypes.get_errno(), f"{name} {arguments[:2]}")
        return int(got)

    abi = call("syscall", 444, None, 0, 1)
    fs = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    handled = struct.pack("=QQQ", fs, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = call("syscall", 444, handled, len(handled), 0)
    for path in readable:
        fd = os.open(path, os.O_PATH)
        rights = 4 | 8 if os.path.isdir(path) else 4  # READ_FILE, READ_DIR
        call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("syscall", 446, ruleset, 0)
    os.close(ruleset)
    capset = 126 if os.uname().machine == "x86_64" else 91
    call("syscall", capset, struct.pack("=II", 0x20080522, 0), bytes(24))
    call("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    buffer = ctypes.create_string_buffer(seccomp, len(seccomp))
    fprog = struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(buffer))
    call("prctl", 22, 2, fprog, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
