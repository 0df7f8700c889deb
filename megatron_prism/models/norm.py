"""RMSNorm for the local layer spec. Megatron-Core's own refuses sequence parallelism and keeps its weight in fp32."""

from __future__ import annotations

from typing import Any

import torch


class LocalNorm(torch.nn.RMSNorm):
    """RMSNorm in params_dtype, with its weight marked for sequence parallelism as Transformer Engine's is.

    Without the mark the norms' gradients would silently not be summed over the tensor-parallel ranks.
    Source: megatron/core/extensions/transformer_engine.py, TENorm; megatron/core/distributed/finalize_model_grads.py.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float | None = None, **kwargs: Any):
        eps = config.layernorm_epsilon if eps is None else eps
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LocalFinalNorm(LocalNorm):
    """The final norm, with TE's (empty) extra state. So a checkpoint saved without TE loads strictly with TE."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        return None
