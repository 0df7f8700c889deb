"""A seccomp filter as bytes, in classic BPF: what `syscalls.py` lists fails with EPERM, in this architecture's own system calls alone."""

from __future__ import annotations

import platform
import struct

from megatron_prism.grade.sandbox import syscalls

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMN = {"x86_64": 0, "aarch64": 1}
LOAD, AND, RETURN = 0x20, 0x54, 0x06  # BPF_LD+W+ABS, BPF_ALU+AND+K, BPF_RET+K
EQUAL, GREATER, AT_LEAST, ANY_BIT = 0x15, 0x25, 0x35, 0x45  # BPF_JMP+{JEQ,JGT,JGE,JSET}+K
ALLOW, KILL, REFUSE, ABSENT = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # the last two: EPERM, and ENOSYS
NUMBER_AT, ARCH_AT = 0, 4  # in struct seccomp_data
X32 = 0x40000000
KILLED = 128 + 9  # the exit code by which bubblewrap tells of SIGKILL: no program ends with it itself
CLONE_THREAD, CLONE_NAMESPACES = 0x00010000, 0x7E020080
SETS_A_SIGNAL = (8, 10, 15)  # fcntl's F_SETOWN, F_SETSIG, F_SETOWN_EX
REACHES_A_TERMINAL_OR_PROCESS = (0x5412, 0x541C, 0x8901, 0x8902)  # ioctl's TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP
SETS_THE_DEATH_SIGNAL = (1,)  # prctl's PR_SET_PDEATHSIG: a program that took it back would outlive a grader that was killed
# open's O_TRUNC without O_WRONLY or O_RDWR empties a file all the same, and Landlock before Linux 6.2 takes it for reading
ACCESS_AND_TRUNC, EMPTIES_UNSEEN = 0x203, (0x200, 0x203)

Step = tuple[int, int, int, int]  # operation, jump if true, jump if false, constant


def _argument(number: int) -> Step:
    return (LOAD, 0, 0, 16 + 8 * number)  # its low 32 bits: both architectures are little-endian


def _refuse_values(call: int, argument: int, values: tuple[int, ...], bits: int = 0xFFFFFFFF) -> list[Step]:
    """Refuse a call whose argument is one of values, of these bits of it alone; allow it otherwise."""
    last = len(values)
    tests = [(EQUAL, last - index, 0, value) for index, value in enumerate(values)]
    read = [_argument(argument), (AND, 0, 0, bits)]
    return [(EQUAL, 0, last + 4, call), *read, *tests, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]


def steps(machine: str) -> list[Step]:
    """Return the filter's steps for x86_64 or aarch64.

    Raises: KeyError: another architecture.
    """
    column = COLUMN[machine]
    program: list[Step] = [(LOAD, 0, 0, ARCH_AT), (EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER_AT)]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    program += [(GREATER, 0, 1, syscalls.NEWEST), (RETURN, 0, 0, ABSENT)]
    for in_memory in (syscalls.CLONE3, syscalls.OPENAT2):  # where their flags lie; programs then take clone and openat
        program += [(EQUAL, 0, 1, in_memory[column]), (RETURN, 0, 0, ABSENT)]
    program += [  # clone: threads, and nothing else
        (EQUAL, 0, 5, syscalls.CLONE[column]),
        _argument(0),
        (ANY_BIT, 1, 0, CLONE_NAMESPACES),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    program += _refuse_values(syscalls.FCNTL[column], 1, SETS_A_SIGNAL)
    program += _refuse_values(syscalls.IOCTL[column], 1, REACHES_A_TERMINAL_OR_PROCESS)
    program += _refuse_values(syscalls.PRCTL[column], 0, SETS_THE_DEATH_SIGNAL)
    for flags_at, call in ((1, syscalls.OPEN[column]), (2, syscalls.OPENAT[column])):
        program += [] if call is None else _refuse_values(call, flags_at, EMPTIES_UNSEEN, ACCESS_AND_TRUNC)
    # one's own limits, but for RLIMIT_CPU (0): a program that lowered it would be killed as one is whose machine has no memory left
    program += _refuse_values(syscalls.SETRLIMIT[column], 0, (0,))
    program += [
        (EQUAL, 0, 6, syscalls.PRLIMIT64[column]),
        _argument(0),
        (EQUAL, 0, 3, 0),
        _argument(1),
        (EQUAL, 1, 0, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    for ends in (syscalls.EXIT, syscalls.EXIT_GROUP):
        program += [(EQUAL, 0, 5, ends[column]), _argument(0), (AND, 0, 0, 0xFF), (EQUAL, 1, 0, KILLED)]
        program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    for numbers in syscalls.REFUSED.values():
        number = numbers[column]
        if number is not None:
            program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    return [*program, (RETURN, 0, 0, ALLOW)]


def filter_bytes(machine: str = "") -> bytes:
    """Return the filter as an array of struct sock_filter, for this machine where none is named."""
    return b"".join(struct.pack("=HBBI", *step) for step in steps(machine or platform.machine()))
