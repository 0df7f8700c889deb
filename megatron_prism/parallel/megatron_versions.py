"""The differences between Megatron-Core 0.16 (Python 3.11) and 0.19 (Python 3.12). No other module knows them."""

from __future__ import annotations

import inspect
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prism.core.patch import replaced


def core_version() -> tuple[int, int]:
    """Return Megatron-Core's (major, minor)."""
    import megatron.core

    major, minor = megatron.core.__version__.split(".")[:2]
    return int(major), int(minor)


def check_supported() -> None:
    """Refuse a Megatron-Core outside the supported range.

    Raises: EnvironmentFault naming the version found.
    """
    from megatron_prism.core.errors import EnvironmentFault

    if not (0, 16) <= core_version() < (0, 20):
        raise EnvironmentFault(f"megatron-core {'.'.join(map(str, core_version()))} found; required >=0.16.1,<0.20")


@dataclass(frozen=True)
class HybridClasses:
    """A hybrid model's class, its stack's class and spec, and how its constructor names the spec and the layer pattern."""

    model: Any
    stack: Any
    submodules: Any
    spec_key: str
    pattern_key: str

    @contextmanager
    def final_norm(self, norm: Any) -> Iterator[None]:
        """Make the stack build `norm` as its final norm, where its code names Transformer Engine's."""
        with replaced(sys.modules[self.stack.__module__], "TENorm", norm):
            yield


def hybrid_classes() -> HybridClasses:
    """Return MambaModel (0.16), or HybridModel, which replaced it in 0.19."""
    if core_version() >= (0, 18):
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridClasses(HybridModel, HybridStack, HybridStackSubmodules, "hybrid_stack_spec", "hybrid_layer_pattern")
    from megatron.core.models.mamba.mamba_model import MambaModel
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules

    return HybridClasses(MambaModel, MambaStack, MambaStackSubmodules, "mamba_stack_spec", "hybrid_override_pattern")


def weight_name(name: str) -> str:
    """Return a parameter's name as in 0.16 and in checkpoints. In 0.19 a mixer's convolution is not a module of its own."""
    return name.replace("mixer.conv1d_", "mixer.conv1d.")


def save_arguments() -> dict[str, Any]:
    """Return the arguments of dist_checkpointing.save that choose mcore's own writer.

    0.19 defaults to a writer of another package (nvidia-resiliency-ext).
    """
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def write_results_in_memory() -> None:
    """Give Megatron-Core's checkpoint writer a plain queue. Otherwise it spawns a server process that imports torch again (10 s and more).

    This process both fills and reads the queue. Forked writers report through pipes instead.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def batch_of_context_rank(batch: dict[str, torch.Tensor], group: torch.distributed.ProcessGroup) -> dict[str, torch.Tensor]:
    """Return this context-parallel rank's part of a batch. In 0.19 a missing cp_group means WORLD, so it is always passed."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    extra = {"is_hybrid_cp": False} if "is_hybrid_cp" in known else {}
    return get_batch_on_this_cp_rank(batch, cp_group=group, **extra)


def packed_sequences(cu_seqlens: torch.Tensor, max_seqlen: int, num_tokens: int) -> Any:
    """Return the PackedSeqParams of documents packed into a row. cu_seqlens: int32, the start of each document, and the end.

    0.19's Mamba mixer separates documents only if the row's number of tokens is given too. Otherwise its state silently crosses documents.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    known = inspect.signature(PackedSeqParams).parameters
    extra = {"total_tokens": num_tokens} if "total_tokens" in known else {}
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_kv=max_seqlen, **extra
    )
