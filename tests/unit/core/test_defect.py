"""Whose fault an exception is: by its type, then by the package whose code raised it."""

from __future__ import annotations

import errno
import importlib
import json
import subprocess
import traceback
import types
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.defect import WorkerDefect, WorkerFault, is_defect, judged_here
from megatron_prism.core.errors import InputError


def raised_by(function: Callable[[], Any], module: str) -> BaseException:
    """Return what a function raises that stands in a module of that name."""
    placed = types.FunctionType(function.__code__, {**function.__globals__, "__name__": module}, closure=function.__closure__)
    with pytest.raises(BaseException) as caught:
        placed()
    return caught.value


def throw(kind: type[BaseException], *args: Any) -> Callable[[], Any]:
    def raise_it() -> None:
        raise kind(*args)

    return raise_it


def recur() -> None:
    (lambda itself: itself(itself))(lambda itself: itself(itself))


def a_library(name: str) -> Any:
    return importlib.import_module(name)


DEFECTS: dict[str, Callable[[], Any]] = {
    "a key": lambda: {}["a"],
    "an assertion": throw(AssertionError),
    "a value, in native code": lambda: int("x"),
    "the standard library's code is its caller's": lambda: json.loads("x"),
    "a recursion": recur,
    "shapes, in torch's native code": lambda: a_library("torch").ones(2, 3) @ a_library("torch").ones(2),
    "shapes, in numpy's native code": lambda: a_library("numpy").ones(2).reshape(3),
    "a module of ours": lambda: importlib.import_module("megatron_prism.core.absent"),
    "a bare exception": throw(Exception, "a"),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "a full disk": throw(OSError, errno.ENOSPC, "No space left on device"),
    "a file that is gone": lambda: Path("absent/file").read_text(),
    "a peer's socket": throw(ConnectionResetError),
    "memory": throw(MemoryError),
    "a worker that died": throw(BrokenProcessPool),
    "a command that failed": lambda: subprocess.run(["false"], check=True),
    "a command that hangs": throw(subprocess.TimeoutExpired, ["a"], 1.0),
    "a package that is absent": lambda: importlib.import_module("absent_package"),
    "a package that is broken": throw(ImportError, "libcudart.so.13: cannot open shared object file"),
    "a device's memory": lambda: throw(a_library("torch").OutOfMemoryError, "CUDA out of memory")(),
    "a device": lambda: throw(a_library("torch").AcceleratorError, "CUDA error: uncorrectable ECC error")(),
    "NCCL": lambda: throw(a_library("torch.distributed").DistBackendError, "NCCL error")(),
    "the store of the ranks": lambda: throw(a_library("torch.distributed").DistNetworkError, "timed out")(),
    "torch's checkpoints, no Exception": lambda: throw(a_library("torch.distributed.checkpoint.api").CheckpointException, "read", {})(),
    "shapes, in torch's own Python code": lambda: a_library("torch").nn.Linear(2, 2)(a_library("torch").ones(3)),
    "a value, in numpy's own Python code": lambda: a_library("numpy").stack([]),
    "a type of safetensors, native": lambda: a_library("safetensors").deserialize(b"x"),
    "a type of pyarrow, native": lambda: a_library("pyarrow").ipc.open_file(b"x"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_what_our_code_raises_is_a_defect_and_in_a_library_it_is_not(name: str) -> None:
    assert is_defect(raised_by(DEFECTS[name], "megatron_prism.train.loop"))
    assert name == "a module of ours" or not is_defect(raised_by(DEFECTS[name], "megatron.core.optimizer"))


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_machine_or_a_library_raises_is_none(name: str) -> None:
    assert not is_defect(raised_by(OTHERS[name], "megatron_prism.train.loop"))


def test_what_a_spawned_process_calls_its_main_module_is_ours() -> None:
    assert is_defect(raised_by(DEFECTS["a key"], "__mp_main__"))


@pytest.mark.parametrize("name", ["a value, in numpy's own Python code", "a full disk", "a key"])
def test_a_worker_judges_where_the_frames_are(name: str) -> None:
    def run() -> None:
        with judged_here():
            raise raised_by({**DEFECTS, **OTHERS}[name], "megatron_prism.data.loader")

    error = raised_by(run, "megatron_prism.prepare.pool").with_traceback(None)  # with the frames lost
    assert is_defect(error) == (name in DEFECTS)
    assert type(error) is (WorkerDefect if name in DEFECTS else OSError if name == "a full disk" else WorkerFault)


def test_a_worker_leaves_an_error_for_the_user_as_it_is() -> None:
    with pytest.raises(InputError), judged_here():
        raise InputError("a")


def test_a_torch_function_mode_counts_as_its_caller() -> None:
    """On a host every operation of torch goes through one of ours (parallel/host.py)."""
    torch = a_library("torch")

    def hand_on(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    code, place = (
        hand_on.__code__.replace(co_name="__torch_function__"),
        {**hand_on.__globals__, "__name__": "megatron_prism.parallel.host"},
    )
    function = types.FunctionType(code, place, argdefs=hand_on.__defaults__)
    mode = type("Mode", (torch.overrides.TorchFunctionMode,), {"__torch_function__": function})
    shapes = DEFECTS["shapes, in torch's native code"]
    with mode():
        assert code in [frame.f_code for frame, _ in traceback.walk_tb(raised_by(shapes, "a").__traceback__)]
        assert not is_defect(raised_by(shapes, "megatron.core.optimizer"))
        assert is_defect(raised_by(shapes, "megatron_prism.train.loop"))
