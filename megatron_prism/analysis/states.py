"""Pooled hidden states on the disk: a safetensors file for each model and set of prompts, named by what decides its numbers.

Shape legend: P states of a model, N prompts, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prism.core import disk
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.core.manifest import sha256_json

FOLDER, TENSOR, FORM = "states", "states_PNC", 1


@dataclass(frozen=True)
class Kept:
    """The states that an analysis has computed, in `states/` of its folder."""

    root: Path

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.root / FOLDER / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Say whether a key's states were computed: a file is renamed into place when it is whole."""
        return self.path(key).is_file()

    def write(self, key: str, states_PNC: torch.Tensor, about: Mapping[str, str]) -> None:
        """Write states. about: what they are of, for a reader of the file."""
        from safetensors.torch import save

        path = self.path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with disk.writing(self.root):
            path.parent.mkdir(exist_ok=True)
            try:
                temporary.write_bytes(save({TENSOR: states_PNC.contiguous()}, metadata=dict(about)))
                disk.sync([temporary])
                temporary.replace(path)
                disk.sync([path.parent])
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, key: str) -> torch.Tensor:
        """Return states (P, N, C), fp32. Raises: CheckpointError for a file that is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path(key))[TENSOR]
        except (SafetensorError, KeyError, OSError) as error:
            found = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                Problem(str(self.path(key)), found, "the states that were written", "delete it: it is computed again")
            ) from None


def key_of(weights: Mapping[str, Any], tokens: Sequence[Sequence[int]], precision: str) -> str:
    """Return the key of a model's states on prompts. weights: what stands for them. The layout and micro_size change rounding alone."""
    return sha256_json({"form": FORM, "weights": dict(weights), "tokens": [list(text) for text in tokens], "precision": precision})[:32]
