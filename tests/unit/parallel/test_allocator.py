"""What a process frees, it keeps: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SIZE = 64 << 20
SCRIPT = f"""
import resource, sys
import torch
from megatron_prism.parallel.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(12):  # an aligned block does not fit into the first ones
    torch.ones({SIZE // 4})
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones({SIZE // 4})
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> tuple[str, int]:
    """Return what keep_freed_memory said, and the page faults of four tensors of 64 MiB after twelve."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_") and key != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], env=clean | environment, capture_output=True, text=True, check=True)
    kept, number = done.stdout.split()
    return kept, int(number)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_not_faulted_in_again() -> None:
    kept, number = faults("keep")
    assert kept == "True" and number < 500, number
    kept, number = faults("as it is")  # the control: each tensor's pages are new, in huge pages at the least
    assert kept == "None" and number >= 4 * SIZE // (2 << 20), number


def test_a_users_own_setting_is_left_alone() -> None:
    kept, _ = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
