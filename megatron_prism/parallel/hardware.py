"""The facts of this rank's machine, which core/check/precision.py checks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

import torch

from megatron_prism.core.check.precision import Machine, Version
from megatron_prism.parallel import host


def read() -> Machine:
    """Return the facts of this rank's device. This starts nothing on it and imports no heavy package.

    Raises: EnvironmentFault where this rank has no CUDA device and was given some.
    """
    if not host.has_cuda():
        host.require_named_devices()
        return Machine(has_cuda=False)
    return Machine(
        has_cuda=True,
        capability=torch.cuda.get_device_capability(host.device_index()),
        cuda=version(torch.version.cuda),
        transformer_engine=_transformer_engine(),
    )


def version(text: str | None) -> Version | None:
    """Return (major, minor) of a version text: `12.9` and `2.11.0+abc` give (12, 9) and (2, 11)."""
    match = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(match[1]), int(match[2])) if match else None


def _transformer_engine() -> Version | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        return version(importlib.metadata.version("transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        return None
