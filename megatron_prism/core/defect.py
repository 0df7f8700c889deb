"""Whose fault is an exception that nothing expected: the machine's, a library's, or ours?"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import BrokenExecutor
from types import TracebackType

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
REPORT = "a defect in megatron_prism: please report it to the project's issue tracker, with this traceback and `prism doctor --json FILE`"
OURS = ("megatron_prism", "__main__")  # __main__ is what starts us
MACHINE = (OSError, MemoryError, BrokenExecutor, subprocess.SubprocessError)


def is_defect(error: BaseException) -> bool:
    """Say whether an exception that is no PrismError is a defect of megatron_prism.

    It is none where its type says machine or library: what the operating system answers, a process that died, a package that cannot be
    imported, or a class that a library defines (torch's out-of-memory, accelerator and distributed errors among them). A built-in
    exception (RuntimeError, ValueError, KeyError, ...) belongs to the package whose Python code raised it, or called the native code that
    did. The standard library's code is its caller's.
    """
    if isinstance(error, MACHINE):
        return False
    if isinstance(error, ImportError):
        return _package(error.name or "") in OURS
    return not _is_library(type(error).__module__) and not _is_library(raised_in(error.__traceback__))


def raised_in(trace: TracebackType | None) -> str:
    """Return the module of the innermost frame of a traceback that is not the standard library's; empty where there is none."""
    module = ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        if _package(name) in OURS or _is_library(name):
            module = name
        trace = trace.tb_next
    return module


def _is_library(module: str) -> bool:
    package = _package(module)
    return bool(package) and package not in OURS and package not in sys.stdlib_module_names and package != "builtins"


def _package(module: str) -> str:
    return module.partition(".")[0]
