"""What a process frees, it keeps: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SIZE = 64 << 20
HUGE_PAGES = 4 * SIZE // (2 << 20)  # of the four tensors: the fewest faults that new memory takes
SCRIPT = f"""
import resource, sys
import torch
from megatron_prism.parallel.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
least = None
for _ in range(8):  # an aligned block does not fit into the first ones
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones({SIZE // 4})
    number = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    least = number if least is None else min(least, number)
print(kept, least)
"""


def faults(mode: str, **environment: str) -> tuple[str, int]:
    """Return what keep_freed_memory said, and the page faults of four tensors of 64 MiB: the fewest of eight times."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_") and key != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], env=clean | environment, capture_output=True, text=True, check=True)
    kept, number = done.stdout.split()
    return kept, int(number)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_not_faulted_in_again() -> None:
    kept, number = faults("keep")
    assert kept == "True" and number < HUGE_PAGES // 2, number
    kept, number = faults("as it is")  # the control: each tensor's pages are new
    assert kept == "None" and number >= HUGE_PAGES, number


def test_a_users_own_setting_is_left_alone() -> None:
    kept, _ = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
