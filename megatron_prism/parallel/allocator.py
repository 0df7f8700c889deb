"""Let the C library keep the memory that a process frees: a CPU's step frees tensors of the same sizes that the next one takes."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 1  # bytes at the heap's end
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep what this process frees for its next allocations. Return whether the C library does so.

    By default glibc gives large blocks back to the kernel and faults them in again, page by page. It is left as it is where the user has set it
    (MALLOC_*, GLIBC_TUNABLES), and where the C library is not glibc.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, NEVER))
