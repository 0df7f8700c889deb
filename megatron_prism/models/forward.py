"""A text's logits through the training forward pass, on any TP x PP layout: what generation and verification look at.

Not under sequence parallelism where a text's length does not divide by tp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups


@torch.no_grad()
def logits(chunks: Sequence[torch.nn.Module], tokens: Sequence[int], groups: Groups, last_only: bool = False) -> torch.Tensor | None:
    """Return the logits (S, padded vocabulary) of a text, or of its last token (1, V); None but on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens_BS = torch.tensor([tokens], device=host.device())
    positions_BS = torch.arange(len(tokens), device=host.device())[None]

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return model(tokens_BS, positions_BS, None), lambda output, non_loss_data: output[0, -1:] if last_only else output[0]

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=groups.pp if len(chunks) > 1 else 1,  # interleaving wants its microbatches in multiples of pp
        seq_length=len(tokens),
        micro_batch_size=1,
        decoder_seq_length=len(tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return gather_from_tensor_model_parallel_region(outputs[0]) if outputs else None
