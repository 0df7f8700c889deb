"""What is raised while a checkpoint is written: the machine's and a library's errors name the folder, a defect of ours stays what it is."""

from __future__ import annotations

import errno
import threading
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prism.checkpoint import saving
from megatron_prism.core.config import SaveConfig
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


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> saving.Saving:
    """Return a save that one of two ranks has begun, and whose writer has failed on the other."""
    monkeypatch.setattr(saving.groups, "total", lambda value: 2 * value)
    monkeypatch.setattr(saving.groups, "agree", list)
    monkeypatch.setattr(saving.groups, "gather", lambda value: [value, "state/__1_0.distcp: File too large"])
    save = object.__new__(saving.Saving)
    (tmp_path / ".step.tmp").mkdir()
    save.target, save._temporary, save._is_first = tmp_path / "step", tmp_path / ".step.tmp", True
    save._writers = SimpleNamespace(poll=lambda wait_s: False, kill=lambda: None, failure=None)  # type: ignore[assignment]
    return save


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (lambda save: save._check_space(1 << 60), "no space left on device"),
        (lambda save: save.finish(), "File too large; step was not saved"),
    ],
)
def test_what_no_rank_can_save_is_said_once(
    begun: saving.Saving, tmp_path: Path, fails: Callable[[saving.Saving], None], said: str
) -> None:
    """All ranks raise it: 128 of them would say it 128 times."""
    with pytest.raises(EnvironmentFault, match=said) as caught:
        fails(begun)
    assert caught.value.is_agreed and list(tmp_path.iterdir()) == []


def test_a_save_waits_for_the_room_of_what_is_being_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is told to stop right after a save begins the next one while the oldest checkpoint still goes."""
    goes_on, alive = threading.Event(), []
    monkeypatch.setattr(saving.run_folder, "remove", lambda path: goes_on.wait(0.3))
    monkeypatch.setattr(saving.sharded, "training_state", lambda *_, **__: {})
    monkeypatch.setattr(saving.frozen, "in_full", lambda state, _: state)
    saver = saving.Saver(tmp_path, SaveConfig(), SimpleNamespace(write=print), [], None, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(saving, "Saving", lambda *_: alive.append([removal.is_alive() for removal in saver._removals]))
    saver._remove([tmp_path / ".step_00000001.old"])
    saver.begin(3, {})
    assert alive == [[False]]
