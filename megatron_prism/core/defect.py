"""Decide whether an unexpected exception is the fault of the machine, of a library, or ours."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import BrokenExecutor
from types import TracebackType

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
REPORT = "a defect in megatron_prism: please report it to the project's issue tracker, with this traceback and `prism doctor --json FILE`"
OURS = ("megatron_prism", "__main__")  # __main__ starts our code
MACHINE = (OSError, MemoryError, BrokenExecutor, subprocess.SubprocessError)


def is_defect(error: BaseException) -> bool:
    """Say whether an exception that is not a PrismError is a defect of megatron_prism.

    It is not a defect where its type points to the machine or a library: an error of the operating system, a dead process, a package that
    cannot be imported, or a library's own class (such as torch's out-of-memory, accelerator and distributed errors). A built-in exception
    (RuntimeError, ValueError, KeyError, ...) belongs to the package whose Python code raised it, or called the native code that raised it.
    Code of the standard library counts as its caller's.
    """
    if isinstance(error, MACHINE):
        return False
    if isinstance(error, ImportError):
        return _package(error.name or "") in OURS
    return not _is_library(type(error).__module__) and not _is_library(raised_in(error.__traceback__))


def raised_in(trace: TracebackType | None) -> str:
    """Return the module of a traceback's innermost frame outside the standard library, or an empty text."""
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
