"""A microbatch as a model's input: per-token tensors by name on this rank's device. Masked documents are folded into one row.

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
    """Return a microbatch's named tensors as this rank's model input: (B, S), or (1, T) where documents are masked.

    Under context parallelism each is this rank's part of the sequences (B, S / cp), all cut the same way.
    Raises: ValueError where a tensor is absent or does not hold one value per token, and for masked documents under context parallelism.
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
    """Return Megatron's PackedSeqParams of a microbatch's documents, None where they are not masked. A document ends with its sequence."""
    if "document_ids" not in batch:
        return None
    ids_BS = batch["document_ids"]
    begins_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = ids_BS.diff() != 0
    size_S, size_T = ids_BS.shape[1], ids_BS.numel()
    cu_seqlens = torch.cat([begins_BS.view(-1).nonzero()[:, 0], torch.tensor([size_T])]).int()
    longest = int(cu_seqlens.diff().max())
    # An upper bound with few distinct values: Megatron caches 32 rotary tables by length. Never size_T: thd would then count positions
    # through the whole row.
    bound = min(1 << (longest - 1).bit_length(), size_S) + 1
    bound += bound == size_T
    packed = megatron_versions.packed_sequences(cu_seqlens, bound, size_T)  # 0.19 numbers the tokens then: on a device that waits for it
    packed.cu_seqlens_q = packed.cu_seqlens_kv = _to_device(cu_seqlens)
    if getattr(packed, "seq_idx", None) is not None:
        packed.seq_idx = _to_device(packed.seq_idx)
    return packed


def _to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return a host tensor on this rank's device. A copy from memory that is not pinned may wait for the device."""
    return (tensor.pin_memory() if host.has_cuda() else tensor).to(host.device(), non_blocking=True)


def padded_batch(batch: Batch, multiple: int) -> Batch:
    """Return a microbatch's model inputs with sequences padded to a multiple of `multiple` tokens. The padding (token 0) is its own document.

    Models are causal, so no token of a sequence sees the padding.
    """
    size_S = batch["tokens"].shape[1]
    extra = -size_S % multiple
    longer = {name: torch.nn.functional.pad(batch[name], (0, extra)) for name in (*INPUTS, "document_ids") if name in batch}
    if extra and "document_ids" in longer:
        longer["document_ids"][:, size_S:] = longer["document_ids"][:, size_S - 1 : size_S] + 1
    return longer
