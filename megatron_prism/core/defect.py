"""Decide whether an unexpected exception is the fault of the machine, of a library, or ours."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from types import TracebackType

from megatron_prism.core.errors import PrismError

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
REPORT = "a defect in megatron_prism: please report it to the project's issue tracker, with this traceback and `prism doctor --json FILE`"
OURS = ("megatron_prism", "__main__", "__mp_main__")  # __main__ starts our code; __mp_main__ is what a spawned process calls it
MACHINE = (OSError, MemoryError, BrokenExecutor, subprocess.SubprocessError)


class WorkerDefect(Exception):
    """A defect that a worker process met: the traceback's text, since the frames by which it was judged stay in the worker."""


class WorkerFault(Exception):
    """A library's error that a worker process met: the traceback's text."""


@contextmanager
def judged_here() -> Iterator[None]:
    """In a worker process: judge an unexpected exception while its frames are there. One whose type says whose it is stays as it is."""
    try:
        yield
    except (PrismError, KeyboardInterrupt, SystemExit, *MACHINE):
        raise
    except BaseException as error:
        raise (WorkerDefect if is_defect(error) else WorkerFault)(f"in a worker process:\n{traceback.format_exc()}") from None


def is_defect(error: BaseException) -> bool:
    """Say whether an exception that is not a PrismError is a defect of megatron_prism.

    It is not a defect where its type points to the machine or a library: an error of the operating system, a dead process, a package that
    cannot be imported, or a library's own class (such as torch's out-of-memory, accelerator and distributed errors). A built-in exception
    (RuntimeError, ValueError, KeyError, ...) belongs to the package whose Python code raised it, or called the native code that raised it.
    Code of the standard library counts as its caller's.
    """
    if isinstance(error, (WorkerDefect, WorkerFault)):
        return isinstance(error, WorkerDefect)
    if isinstance(error, MACHINE):
        return False
    if isinstance(error, ImportError):
        return _package(error.name or "") in OURS
    return not _is_library(type(error).__module__) and not _is_library(raised_in(error.__traceback__))


def raised_in(trace: TracebackType | None) -> str:
    """Return the module of a traceback's innermost frame outside the standard library, or an empty text. A torch function mode counts as its caller."""
    module = ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        hands_on = trace.tb_frame.f_code.co_name == "__torch_function__"  # host.py's, between an operation and its caller
        if not hands_on and (_package(name) in OURS or _is_library(name)):
            module = name
        trace = trace.tb_next
    return module


def _is_library(module: str) -> bool:
    package = _package(module)
    return bool(package) and package not in OURS and package not in sys.stdlib_module_names and package != "builtins"


def _package(module: str) -> str:
    return module.partition(".")[0]
