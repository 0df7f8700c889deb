"""Transformer Engine on a machine without CUDA: its layers can be CONSTRUCTED and looked at, never run.

Real: all Python of the package `transformer-engine`, and Megatron-Core's wrappers of it. A stand-in: the compiled bindings
(`transformer_engine_torch`), and the modules of TE that need Triton or onnxscript. A stand-in has every name it is asked for; the name
has every member (an enum's, numbered in the order in which they are asked for) and raises when it is called.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ABSENT = (
    "transformer_engine_torch",
    "transformer_engine.pytorch.onnx_extensions",
    "transformer_engine.pytorch.triton",
    *(f"transformer_engine.pytorch.triton.{name}" for name in ("cross_entropy", "pad", "permutation")),
)
H100 = types.SimpleNamespace(name="pretended H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)


class _Name(type):
    """A class, an enum or a function of the bindings, whatever is asked of it; but not its work."""

    def __getattr__(cls, member: str) -> int:
        if member.startswith("__"):
            raise AttributeError(member)
        setattr(cls, member, len(vars(cls)))
        return getattr(cls, member)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{cls.__name__} is a stand-in: Transformer Engine was constructed without its compiled half, and cannot run")


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Name(name, (), {}))
        return getattr(self, name)


def install(folder: Path) -> None:
    """Make `import transformer_engine` give the package in `folder`. To be called before megatron.core is imported."""
    assert "megatron.core" not in sys.modules
    bring(folder)


def bring(folder: Path) -> None:
    """Import Transformer Engine from `folder`. A megatron.core that was imported before goes on without it."""
    sys.path.insert(0, str(folder))
    sys.modules.update({name: _Module(name) for name in ABSENT})
    vars(sys.modules[ABSENT[0]])["get_cudnn_version"] = lambda: 91200  # attention asks when it is constructed
    # TE's own switches: common loads no CUDA library; the package says nothing of pytorch, whose bindings it does not find
    with mock.patch.dict(os.environ, NVTE_PROJECT_BUILDING="1", NVTE_FRAMEWORK="none"):
        import transformer_engine
        import transformer_engine.common as common

        common.load_framework_extension = lambda framework: None
        transformer_engine.pytorch = importlib.import_module("transformer_engine.pytorch")


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let torch.cuda answer as one H100, as TE's constructors want."""
    answers = {"is_available": True, "get_device_capability": (H100.major, H100.minor), "get_device_properties": H100}
    with mock.patch.multiple(torch.cuda, **{name: lambda *args, answer=answer: answer for name, answer in answers.items()}):
        yield
