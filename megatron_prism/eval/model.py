"""The model that is evaluated: a checkpoint, a Hugging Face folder whose weights go straight into the ranks' shards, or one served elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import at_rest, folder, integrity, sharded
from megatron_prism.checkpoint.at_rest import AtRest
from megatron_prism.checkpoint.folder import Checkpoint
from megatron_prism.core.config import EvaluatedConfig, ModelConfig
from megatron_prism.core.errors import CheckpointError, InputError, Problem
from megatron_prism.core.manifest import sha256_file, sha256_json
from megatron_prism.data import tokenizer
from megatron_prism.generate import handover


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate. source: its checkpoint, or its Hugging Face folder. assets: the folder with tokenizer and config.json."""

    source: Checkpoint | AtRest

    @property
    def root(self) -> Path:
        return self.source.root

    @property
    def model(self) -> ModelConfig:
        return self.source.model

    @property
    def assets(self) -> Path:
        return self.source.assets

    def tokenizer_sha256(self) -> str | None:
        """Return the sum of the model's tokenizer. None: it has none."""
        path = self.assets / tokenizer.FILE
        return sha256_file(path) if path.is_file() else None

    def identity(self) -> dict[str, Any]:
        """Return what the evaluation is of: sha256 stands for the weights. It reads a Hugging Face folder whole.

        Raises: InputError where a checkpoint has no sums.
        """
        if isinstance(self.source, Checkpoint):
            sums = self.root / integrity.SUMS
            if not sums.is_file():
                raise InputError(Problem("model.checkpoint", f"{self.root} without {integrity.SUMS}", "a whole checkpoint"))
            known = {"step": self.source.step, "tokens": self.source.tokens, "sha256": sha256_file(sums)}
            return {"kind": "checkpoint", "path": str(self.root), **known}
        files = [at_rest.CONFIG, *(shard.file for shard in self.source.plan.shards)]
        with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
            sums_of = dict(zip(files, pool.map(lambda file: sha256_file(self.root / file), files), strict=True))
        return {"kind": "hf", "path": str(self.root), "sha256": sha256_json(sums_of), "files": sums_of}


def read(config: EvaluatedConfig) -> Evaluated:
    """Return the model that a config names, its weights unread. Raises: CheckpointError where it is none, or of the other kind."""
    if config.checkpoint is not None:
        return Evaluated(folder.read(config.checkpoint))
    assert config.hf is not None
    return Evaluated(at_rest.read_hf(config.hf))


def load(evaluated: Evaluated, chunks: Sequence[Any]) -> None:
    """Load a model's weights into the chunks, in place; every rank of the gang calls this.

    Raises: CheckpointError where they are damaged, or do not fit.
    """
    if isinstance(evaluated.source, Checkpoint):
        sharded.require_whole(evaluated.root)
        sharded.load_weights(evaluated.root, chunks)
    else:
        load_hf(evaluated.source, chunks)


def load_hf(folder: AtRest, chunks: Sequence[Any]) -> None:
    """Read a Hugging Face folder's weights into the chunks' own shards, as `fill` does.

    Raises: CheckpointError for a tensor that the rules or the model lack, or that holds a NaN or an inf.
    """
    with at_rest.opened([folder]) as (opened,):
        fill(chunks, folder, opened.mcore)


@torch.no_grad()
def fill(chunks: Sequence[Any], model: AtRest, whole_of: Callable[[str], torch.Tensor]) -> None:
    """Copy tensors into the chunks' own shards. Memory holds one whole tensor beside them; nothing goes to the disk.

    whole_of: a tensor of the model, whole, by Megatron-Core's name. Each rank asks for the tensors of its stage, and keeps its rows and
    columns. A vocabulary's padding is 0. Raises: CheckpointError for a tensor that the model lacks.
    """
    shards = handover.shards_of(chunks)
    if lost := [key for key in shards if key not in model.rules]:
        raise CheckpointError([Problem(f"{model.root}: {key}", "no such tensor", "every tensor of the model") for key in lost])
    for key, own in shards.items():
        whole = whole_of(key)
        for shard in own:
            _fill(shard, whole)


def _fill(shard: Any, whole: torch.Tensor) -> None:
    """Copy a shard's part of a tensor into it. What lies beyond the tensor is the padding of a vocabulary."""
    first, *rest = (slice(at, at + size) for at, size in zip(shard.global_offset, shard.data.shape, strict=True))
    part = whole[(first, *rest)]
    shard.data[: part.shape[0]].copy_(part)
    shard.data[part.shape[0] :].zero_()
