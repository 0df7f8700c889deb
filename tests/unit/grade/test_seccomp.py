"""The filter of system calls: the numbers of both architectures against the kernel's headers and libseccomp, and each verdict by running the filter."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prism.grade.sandbox import seccomp, syscalls

MACHINES = ("x86_64", "aarch64")
NAMED = {
    name.lower(): getattr(syscalls, name)
    for name in ("CLONE", "CLONE3", "FCNTL", "IOCTL", "PRLIMIT64", "PRCTL", "EXIT", "EXIT_GROUP", "SETRLIMIT", "OPEN", "OPENAT", "OPENAT2")
} | syscalls.REFUSED
HARMLESS = {
    "read": (0, 63),
    "write": (1, 64),
    "openat": (257, 56),
    "mmap": (9, 222),
    "futex": (202, 98),
    "brk": (12, 214),
    "getrandom": (318, 278),
}


def of_headers(machine: str) -> dict[str, int]:
    """Return the numbers of the kernel's own headers (Debian's linux-libc-dev), where they are installed."""
    if machine == "aarch64":
        paths = [Path("/usr/include/asm-generic/unistd.h")]  # which aarch64's includes, with __ARCH_WANT_RENAMEAT and 64 bits
    else:
        paths = [*Path("/usr/include").glob("*/asm/unistd_64.h"), *Path("/usr/include").glob("asm/unistd_64.h")]
    text = "".join(path.read_text() for path in paths if path.exists())
    return {name: int(number) for name, number in re.findall(r"^#define __NR(?:3264)?_(\w+)\s+([0-9]+)$", text, re.MULTILINE)}


def of_libseccomp(machine: str) -> Callable[[str], int] | None:
    """Return libseccomp's own look-up, where the library is there. A call that the architecture lacks is negative."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    return lambda name: int(library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(seccomp.AUDIT_ARCH[machine]), name.encode()))


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_the_kernel_s(machine: str) -> None:
    column, headers, resolve = seccomp.COLUMN[machine], of_headers(machine), of_libseccomp(machine)
    if not headers and resolve is None:
        pytest.skip("neither the kernel's headers nor libseccomp.so.2 is on this machine")
    ours = {name: numbers[column] for name, numbers in {**NAMED, **HARMLESS}.items()}
    if headers:
        assert {name: headers.get(name) for name in ours} == ours
    if resolve is not None:
        assert {name: number if (number := resolve(name)) >= 0 else None for name in ours} == ours
        assert resolve("kill") != seccomp.AUDIT_ARCH[machine] and resolve("no_such_call") < 0


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """Run the filter's bytes as the kernel does on one call."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number, seccomp.AUDIT_ARCH[machine] if arch is None else arch, 0, *padded)
    program = list(struct.iter_unpack("=HBBI", seccomp.filter_bytes(machine)))
    at, value = 0, 0
    while True:
        operation, if_true, if_false, constant = program[at]
        at += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif operation == 0x54:
            value &= constant
        elif operation == 0x06:
            return int(constant)
        else:
            tests = {0x15: value == constant, 0x25: value > constant, 0x35: value >= constant, 0x45: bool(value & constant)}
            at += if_true if tests[operation] else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_each_call_gets_its_verdict(machine: str) -> None:
    column = seccomp.COLUMN[machine]
    for name, numbers in syscalls.REFUSED.items():
        number = numbers[column]
        assert number is None or verdict(machine, number) == seccomp.REFUSE, name
    for name, (*numbers,) in HARMLESS.items():
        assert verdict(machine, numbers[column]) == seccomp.ALLOW, name
        assert verdict(machine, numbers[column], arch=0x40000003) == seccomp.KILL  # i386's numbers
    refused: dict[tuple[int, ...], list[tuple[int, ...]]] = {
        syscalls.CLONE: [(17,), (0x10000 | 0x10000000,)],
        syscalls.FCNTL: [(0, 8), (0, 10), (0, 15)],
        syscalls.IOCTL: [(0, 0x5412), (0, 0x8901)],
        syscalls.PRLIMIT64: [(1, 7), (0, 0)],
        syscalls.PRCTL: [(1, 0), (1, 9)],
        syscalls.SETRLIMIT: [(0,)],
        syscalls.EXIT: [(137,), (137 + 256,)],
        syscalls.EXIT_GROUP: [(137,)],
        syscalls.OPENAT: [(0, 0, 0o1000), (0, 0, 0o1003 | 0o100000)],
    }
    for numbers, calls in refused.items():
        assert {verdict(machine, numbers[column], *call) for call in calls} == {seccomp.REFUSE}, numbers
    allowed = {syscalls.CLONE: (0x10000,), syscalls.FCNTL: (0, 1), syscalls.IOCTL: (0, 0x5401), syscalls.PRLIMIT64: (0, 7)}
    allowed |= {syscalls.PRCTL: (15,), syscalls.SETRLIMIT: (7,), syscalls.EXIT_GROUP: (1,), syscalls.OPENAT: (0, 0, 0o1101)}
    assert {verdict(machine, numbers[column], *call) for numbers, call in allowed.items()} == {seccomp.ALLOW}
    assert verdict(machine, syscalls.CLONE3[column]) == verdict(machine, syscalls.NEWEST + 1) == seccomp.ABSENT
    assert verdict(machine, syscalls.OPENAT2[column]) == seccomp.ABSENT
    if machine == "x86_64":
        assert (verdict(machine, 2, 0, 0o1000), verdict(machine, 2, 0, 0o1102)) == (seccomp.REFUSE, seccomp.ALLOW)
        assert verdict(machine, 1 | seccomp.X32) == seccomp.KILL
