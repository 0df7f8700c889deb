"""What is raised while a checkpoint is written: the machine's and a library's errors name the folder, a defect of ours stays what it is."""

from __future__ import annotations

import errno
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import saving
from megatron_prism.core.errors import EnvironmentFault


def in_module(function: Callable[[], Any], module: str) -> Callable[[], Any]:
    """Return a function that stands in another module, as a traceback tells it."""
    return types.FunctionType(function.__code__, {**function.__globals__, "__name__": module}, closure=function.__closure__)


def a_full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def a_key() -> None:
    {}["absent"]


@pytest.mark.parametrize(
    ("function", "module", "raised"),
    [
        (a_full_disk, "megatron_prism.checkpoint.saving", EnvironmentFault),
        (a_key, "megatron.core.dist_checkpointing", EnvironmentFault),
        (a_key, "megatron_prism.checkpoint.saving", KeyError),
    ],
)
def test_a_defect_in_a_save_is_told_from_a_fault(tmp_path: Path, function: Callable[[], Any], module: str, raised: type) -> None:
    cleaned: list[str] = []
    with pytest.raises(raised), saving._faults_named(tmp_path / "step", lambda: cleaned.append("once")):
        in_module(function, module)()
    assert cleaned == ["once"]
