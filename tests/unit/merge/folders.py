"""Folders of tiny models: read, changed, moved at random."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[str, torch.Tensor], torch.Tensor]


def tensors(root: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    return {name: value for file in sorted(root.glob("*.safetensors")) for name, value in load_file(file).items()}


def changed(root: Path, change: Change) -> None:
    """Change each tensor of a folder in place."""
    for file in root.glob("*.safetensors"):
        save_file({name: change(name, value).contiguous() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def moved(root: Path, target: Path, seed: int, by: float = 0.1) -> Path:
    """Copy a folder, its weights moved at random."""
    shutil.copytree(root, target)
    generator = torch.Generator().manual_seed(seed)
    changed(target, lambda _, value: (value.float() + by * torch.randn(value.shape, generator=generator)).to(value.dtype))
    return target
