"""Pooled hidden states on the disk: a safetensors file for each model and set of prompts, named by its number and what decides its values.

Shape legend: P states of a model, N prompts, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prism.core import disk
from megatron_prism.core.check.cka import STATES
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.core.manifest import sha256_json

TENSOR, FORM = "states_PNC", 1
ABOUT = "about"  # the one entry of a file's metadata: safetensors writes several in any order


@dataclass(frozen=True)
class Kept:
    """The states that an analysis has computed, in `states/` of its folder."""

    root: Path

    def path(self, key: str) -> Path | None:
        """Return the file of a key. None: its states are not computed yet; a file is renamed into place when it is whole."""
        return next((path for path in self._files() if path.stem.partition("_")[2] == key), None)

    def _files(self) -> list[Path]:
        return sorted((self.root / STATES).glob("[0-9]*_*.safetensors"))

    def write(self, key: str, states_PNC: torch.Tensor, about: Mapping[str, str]) -> None:
        """Write states. about: what they are of, for a reader of the file."""
        from safetensors.torch import save

        path = self.root / STATES / f"{len(self._files()):06d}_{key}.safetensors"
        with disk.writing(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk.replacing(path) as (temporary,):
                temporary.write_bytes(save({TENSOR: states_PNC.contiguous()}, metadata={ABOUT: json.dumps(dict(about))}))
            disk.sync([path.parent])

    def read(self, key: str) -> torch.Tensor:
        """Return states (P, N, C), fp32. Raises: CheckpointError for a file that is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(key)
        assert path is not None, f"no states of {key}"
        try:
            return load_file(path)[TENSOR]
        except (SafetensorError, KeyError, OSError) as error:
            found = f"{type(error).__name__}: {error}"
            raise CheckpointError(Problem(str(path), found, "the states that were written", "delete it: it is computed again")) from None


def key_of(weights: Mapping[str, Any], tokens: Sequence[Sequence[int]], precision: str) -> str:
    """Return the key of a model's states on prompts. weights: what stands for them. The layout and micro_size change rounding alone."""
    return sha256_json({"form": FORM, "weights": dict(weights), "tokens": [list(text) for text in tokens], "precision": precision})[:32]
