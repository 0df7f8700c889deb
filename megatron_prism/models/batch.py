"""A microbatch as a model takes it: per-token tensors by name, folded into one row where documents are masked, on this rank's device.

Shape legend: B sequences of a microbatch, S tokens of a sequence, T = B * S tokens of all its documents in one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_prism.parallel import host, megatron_versions
from megatron_prism.parallel.groups import Groups

Batch = Mapping[str, torch.Tensor]  # per token (B, S): tokens, position_ids, labels, what an objective needs; document_ids where masked
INPUTS = ("tokens", "position_ids", "labels")


def model_batch(batch: Batch, names: Sequence[str], groups: Groups) -> dict[str, torch.Tensor]:
    """Return a microbatch's named tensors as this rank's model takes them: (B, S), or (1, T) where documents are masked.

    Under context parallelism they are this rank's part of each sequence (B, S / cp), all cut alike.
    Raises: ValueError where one is absent or not of one value a token, and for masked documents under context parallelism.
    """
    size_BS = batch["tokens"].shape
    wrong = {name: tuple(batch[name].shape) if name in batch else "absent" for name in names}
    wrong = {name: shape for name, shape in wrong.items() if shape != tuple(size_BS)}
    if wrong:
        raise ValueError(f"a batch of {tuple(size_BS)} tokens needs one value a token of each of {', '.join(names)}; found {wrong}")
    if groups.cp > 1 and "document_ids" in batch:
        raise ValueError(f"documents are not split over context-parallel ranks (cp {groups.cp})")
    rows = {name: batch[name].reshape(1, -1) if "document_ids" in batch else batch[name] for name in names}
    moved = {name: tensor.to(host.device(), non_blocking=True) for name, tensor in rows.items()}
    return megatron_versions.batch_of_context_rank(moved, groups.cp_group) if groups.cp > 1 else moved


def packed_documents(batch: Batch) -> Any:
    """Return Megatron's PackedSeqParams of a microbatch's documents; None where they are not masked. A sequence's end is a document's."""
    if "document_ids" not in batch:
        return None
    ids_BS = batch["document_ids"]
    begins_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = ids_BS.diff() != 0
    size_S, size_T = ids_BS.shape[1], ids_BS.numel()
    cu_seqlens = torch.cat([begins_BS.view(-1).nonzero()[:, 0], torch.tensor([size_T])]).int()
    longest = int(cu_seqlens.diff().max())
    # A bound, of few values: Megatron keeps 32 rotary tables by length. And never size_T: thd then counts positions through the row.
    bound = min(1 << (longest - 1).bit_length(), size_S) + 1
    return megatron_versions.packed_sequences(cu_seqlens.to(host.device(), non_blocking=True), bound, size_T)


def padded_batch(batch: Batch, multiple: int) -> Batch:
    """Return what a model takes of a microbatch, its sequences a multiple of so many tokens: token 0 behind their ends, a document of its own.

    Models are causal: no token of a sequence sees what is added.
    """
    size_S = batch["tokens"].shape[1]
    extra = -size_S % multiple
    longer = {name: torch.nn.functional.pad(batch[name], (0, extra)) for name in (*INPUTS, "document_ids") if name in batch}
    if extra and "document_ids" in longer:
        longer["document_ids"][:, size_S:] = longer["document_ids"][:, size_S - 1 : size_S] + 1
    return longer
