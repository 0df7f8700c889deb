"""The hidden states of texts on any layout, pooled: of each state the mean over a text's tokens.

States are numbered as transformers numbers output_hidden_states: 0 is the embedding's output, i the output of layer i. The last one there is
behind the final norm; here both are given, the last layer's output and then that of the final norm. Hooks read them within the forward pass,
so no more than one layer's output is held. A sum over tokens is exact across sequence and context shards; padding adds nothing to it.
Shape legend: N texts, P states of a model, B texts of a microbatch, S tokens (of this rank's shard), C channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.patch import replaced
from megatron_prism.families import registry
from megatron_prism.models.batch import Batch, model_batch
from megatron_prism.models.build import unwrap
from megatron_prism.models.forward import evaluating, for_layout, schedule
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups, gather

Keep = Callable[[int, torch.Tensor], None]
MCORE_LAYER, HF_LAYER = re.compile(r"decoder\.layers\.(\d+)\."), re.compile(r"\.layers\.(\d+)\.")


def layer_ends(model: ModelConfig) -> list[int]:
    """Return the Megatron-Core layer, counted from 1, with which each Hugging Face layer ends: a layer of Granite-4.0-H is two of Megatron-Core's."""
    ends: dict[int, int] = {}
    for rule in registry.rules(model):
        own, theirs = MCORE_LAYER.match(rule.mcore), HF_LAYER.search(rule.hf[0][0])
        if own and theirs:
            ends[int(theirs[1])] = max(ends.get(int(theirs[1]), 0), int(own[1]) + 1)
    return [ends[layer] for layer in sorted(ends)]


def pooled(chunks: Sequence[Any], model: ModelConfig, texts: Sequence[Sequence[int]], groups: Groups, micro_size: int = 8) -> torch.Tensor:
    """Return the mean over each text's tokens of every state (P, N, C), fp32, on the host: 0 to L, then the final norm's output (P = L + 2).

    Every rank of the gang calls this with the same texts and gets the same values. Any TP (with sequence parallelism or without) x PP x CP x DP,
    dense and hybrid; one model chunk a rank. texts: token ids, at least one each. micro_size: the texts of a microbatch.
    """
    places = [0, *layer_ends(model), model.num_layers + 1]
    own = {place for chunk in chunks for place, _ in points(unwrap(chunk))}
    size = (len(texts), model.hidden_size)
    totals = {place: torch.zeros(size, dtype=torch.float64, device=host.device()) for place in places if place in own}
    with evaluating(chunks):
        for rows, microbatches in _calls(texts, groups, micro_size):
            _forward(chunks, rows, microbatches, groups, totals)
    if unwrap(chunks[0]).config.sequence_parallel:
        _add_up(totals, groups.tp_group)  # each rank has a part of a text's tokens
    if groups.dp * groups.cp > 1:
        _add_up(totals, groups.dp_cp_group)  # and each replica some of the texts
    num_tokens_N1 = torch.tensor([[len(text)] for text in texts], dtype=torch.float64)
    return torch.stack([total_NC / num_tokens_N1 for total_NC in _of_all_stages(totals, places, size, groups)]).float()


def _add_up(totals: Mapping[int, torch.Tensor], group: Any) -> None:
    for total_NC in totals.values():
        dist.all_reduce(total_NC, group=group)


def _of_all_stages(
    totals: Mapping[int, torch.Tensor], places: Sequence[int], size: tuple[int, int], groups: Groups
) -> Iterator[torch.Tensor]:
    """Yield the sums of each place (N, C) on the host, from the pipeline stage that has it."""
    owners = {place: stage for stage, own in enumerate(gather(list(totals), groups.pp_group)) for place in own}
    for place in places:
        total_NC = totals[place] if place in totals else torch.empty(size, dtype=torch.float64, device=host.device())
        if groups.pp > 1:
            dist.broadcast(total_NC, group_src=owners[place], group=groups.pp_group)
        yield total_NC.cpu()


def _add(
    totals: Mapping[int, torch.Tensor],
    place: int,
    hidden_SBC: torch.Tensor,
    is_token_BS: torch.Tensor,
    rows_B: torch.Tensor,
    groups: Groups,
) -> None:
    """Add a microbatch's output of one layer to the sums. A row of -1 is no text."""
    if place not in totals:  # within a layer of Hugging Face's
        return
    is_token_SB = is_token_BS.t()
    if len(hidden_SBC) < len(is_token_SB):  # sequence parallelism
        is_token_SB = is_token_SB.chunk(groups.tp)[groups.tp_rank]
    sum_BC = (hidden_SBC * is_token_SB[..., None].to(hidden_SBC.dtype)).sum(0, dtype=torch.float64)
    is_text_B = rows_B >= 0
    totals[place][rows_B[is_text_B]] = sum_BC[is_text_B]


def _calls(texts: Sequence[Sequence[int]], groups: Groups, micro_size: int) -> Iterator[tuple[list[torch.Tensor], list[Batch]]]:
    """Yield this replica's texts, the short ones first: for each pass the rows of its microbatches, and the microbatches, of one shape."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))[groups.dp_rank :: groups.dp]
    each = micro_size * groups.pp
    for first in range(0, len(order), each):
        rows = order[first : first + each]
        longest, size_B = max(len(texts[row]) for row in rows), min(micro_size, len(rows))
        rows += [-1] * (-len(rows) % size_B)
        parts = [rows[start : start + size_B] for start in range(0, len(rows), size_B)]
        yield (
            [torch.tensor(part) for part in parts],
            [_microbatch([texts[row] if row >= 0 else () for row in part], longest) for part in parts],
        )


def _microbatch(texts: Sequence[Sequence[int]], size_S: int) -> Batch:
    """Return texts as rows of one length; is_token is 0 on padding. Models are causal, so no token of a text sees it."""
    tokens_BS = torch.tensor([[*text, *[0] * (size_S - len(text))] for text in texts])
    lengths_B = torch.tensor([[len(text)] for text in texts])
    position_ids_BS = torch.arange(size_S).expand(len(texts), -1).contiguous()
    return {"tokens": tokens_BS, "position_ids": position_ids_BS, "is_token": (position_ids_BS < lengths_B).long()}


def _forward(
    chunks: Sequence[Any], rows: Sequence[torch.Tensor], microbatches: Sequence[Batch], groups: Groups, totals: Mapping[int, torch.Tensor]
) -> None:
    """Compute the microbatches, and add their states to `totals`."""
    longer = for_layout(microbatches, chunks, groups)
    held = [
        {**batch, "is_token": _padded(own["is_token"], batch), "rows": rows_B}
        for batch, own, rows_B in zip(longer, microbatches, rows, strict=True)
    ]

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        microbatch = next(iterator)
        batch = model_batch(microbatch, ("tokens", "position_ids", "is_token"), groups)
        keep = partial(_add, totals, is_token_BS=batch["is_token"], rows_B=microbatch["rows"].to(host.device()), groups=groups)
        with tapped(model, keep):
            output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda output, non_loss_data: None

    schedule(chunks, forward_step, held, forward_only=True, collect=True)


def _padded(is_token_BS: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.pad(is_token_BS, (0, batch["tokens"].shape[1] - is_token_BS.shape[1]))


def points(inner: Any) -> list[tuple[int, torch.nn.Module]]:
    """Return the places of a chunk's states and the modules that put them out: 0 the embedding, i Megatron-Core's layer i, L + 1 the final norm."""
    first = [(0, inner.embedding)] if inner.pre_process else []
    layers = [(layer.layer_number, layer) for layer in inner.decoder.layers]
    if not inner.post_process:
        return [*first, *layers]
    norm = inner.decoder.final_norm if hasattr(inner.decoder, "final_norm") else inner.decoder.final_layernorm
    return [*first, *layers, (inner.config.num_layers + 1, norm)]


@contextmanager
def tapped(chunk: Any, keep: Keep) -> Iterator[None]:
    """Within the block, call keep(place, hidden_SBC) with the output of each of a chunk's points, and leave out the output layer.

    Source: megatron/core/models/gpt/gpt_model.py, _postprocess: without post_process the decoder's output is the model's.
    """
    inner = unwrap(chunk)
    handles = [module.register_forward_hook(partial(_hand, keep, place)) for place, module in points(inner)]
    try:
        with replaced(inner, "post_process", False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hand(keep: Keep, place: int, module: torch.nn.Module, args: Any, output: Any) -> None:
    keep(place, output[0] if isinstance(output, tuple) else output)
