"""What test_objectives.py lets every rank of a gang compute: (config, grid) -> a JSON value, of which rank 0's is kept.

The batches are made here of random tokens, the same global batch whatever the layout; each data-parallel rank takes its part.
The config's data.document_mask says whether documents are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_prism.checkpoint import folder, sharded
from megatron_prism.core.config import TrainConfig
from megatron_prism.models import build, forward
from megatron_prism.models.batch import Batch
from megatron_prism.parallel.groups import Groups, gather
from megatron_prism.train import optim
from megatron_prism.train.objective import CROSS_ENTROPY, Objective, Terms
from megatron_prism.train.step import forward_backward, read
from megatron_prism.train.timers import Timers

VOCABULARY, STEPS = 384, 5
Model = tuple[list[Any], Any]


def clipped(nll_BS: torch.Tensor, batch: Batch, low: float, high: float, is_whole: bool = False) -> Terms:
    """PPO's clipped ratio as GRPO has it: an advantage, an old log-probability and a weight for each token.

    `is_whole`, a fault: a weight is cut to a whole number, as Megatron's own count of tokens would.
    """
    weight_BS, advantage_BS = batch["weights"], batch["advantages"]
    ratio_BS = (-nll_BS - batch["old_log_probs"]).exp()
    clipped_BS = ratio_BS.clamp(1 - low, 1 + high)
    loss_BS = -torch.minimum(ratio_BS * advantage_BS, clipped_BS * advantage_BS)
    weight = weight_BS.sum()
    sums = {"clipped": (weight_BS * (ratio_BS != clipped_BS)).sum(), "off_policy": ((ratio_BS - 1).abs() * weight_BS).sum()}
    return Terms((loss_BS * weight_BS).sum(), weight.int() if is_whole else weight, sums)


def objective(**settings: Any) -> Objective:
    return Objective(partial(clipped, **settings), ("weights", "advantages", "old_log_probs"), ("clipped", "off_policy"))


OBJECTIVES = {
    "clipped": objective(low=0.2, high=0.28),
    "unclipped": objective(low=1.0, high=1e9),
    "whole weights": objective(low=0.2, high=0.28, is_whole=True),
}


def global_batch(config: TrainConfig) -> Batch:
    """Return all sequences of a step: an advantage and a share for each sequence, shared by its tokens but the prompt."""
    generator = torch.Generator().manual_seed(5)
    size_B, size_S = config.batch.global_size, config.data.seq_length
    text = torch.randint(3, VOCABULARY, (size_B, size_S + 1), generator=generator)
    positions_BS = torch.arange(size_S).expand(size_B, size_S)
    prompt_B = torch.randint(2, size_S // 2, (size_B, 1), generator=generator)
    mask_BS = (positions_BS >= prompt_B).float()
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "position_ids": positions_BS,
        "loss_mask": mask_BS,
        "weights": mask_BS / mask_BS.sum(1, keepdim=True) * (0.2 + torch.rand((size_B, 1), generator=generator)),
        "advantages": torch.randn((size_B, 1), generator=generator).expand(size_B, size_S),
    }
    if not config.data.document_mask:
        return batch
    ids_BS = (positions_BS >= prompt_B).int()  # two documents a sequence
    return batch | {"document_ids": ids_BS, "position_ids": positions_BS - prompt_B * ids_BS}


def microbatches(config: TrainConfig, grid: Groups) -> list[Batch]:
    """Return this rank's part of the global batch."""
    whole, size = global_batch(config), config.batch.micro_size
    per_rank = config.batch.global_size // grid.dp
    first = grid.dp_rank * per_rank
    return [{name: tensor[at : at + size] for name, tensor in whole.items()} for at in range(first, first + per_rank, size)]


def bare_model(config: TrainConfig, grid: Groups) -> list[Any]:
    assert config.init.checkpoint is not None
    chunks = build.build(folder.read(config.init.checkpoint).model, grid, config)
    sharded.load_weights(config.init.checkpoint, chunks)
    return chunks


def wrapped(config: TrainConfig, bare: list[Any]) -> Model:
    chunks = optim.wrap(bare, config)
    return chunks, optim.build(chunks, config.optimizer, config)


def train(config: TrainConfig, grid: Groups, kind: str, shift: int) -> list[dict[str, float]]:
    """Take steps on one batch, whose old log-probabilities are the first weights'. `shift`, a fault: as if they began so many tokens later."""
    chunks, optimizer = wrapped(config, bare_model(config, grid))
    batches = microbatches(config, grid)
    old = forward.log_probs(chunks, batches, grid)
    ready = [{**batch, "old_log_probs": log_probs.roll(shift, 1)} for batch, log_probs in zip(batches, old, strict=True)]
    steps = []
    for _ in range(STEPS):
        means, _ = read(forward_backward(chunks, ready, OBJECTIVES[kind], grid, Timers()))
        grad_norm = optim.measure(optimizer)
        optim.apply(optimizer, grad_norm, config.optimizer.lr, config.optimizer.weight_decay)
        steps.append(
            {"loss": means.loss, "weight": means.weight, "num_tokens": means.num_tokens, "grad_norm": float(grad_norm), **means.reports}
        )
    return steps


def scores(config: TrainConfig, grid: Groups, length: int) -> dict[str, Any]:
    """Return what forward-only finds for all microbatches' first `length` tokens: log-probabilities alone, and with entropies."""
    chunks = bare_model(config, grid)
    batches = [
        {name: tensor[:, :length] for name, tensor in batch.items()} for batch in microbatches(config, replace(grid, dp=1, dp_rank=0))
    ]
    alone = torch.cat(forward.log_probs(chunks, batches, grid))
    both = [torch.cat(parts) for parts in zip(*forward.log_probs_and_entropies(chunks, batches, grid), strict=True)]
    assert all(chunk.training for chunk in chunks) and alone.dtype == both[1].dtype == torch.float32
    logits = None if grid.cp > 1 else forward.logits(chunks, batches[0]["tokens"][0].tolist(), grid)
    return {
        "log_probs": alone.tolist(),
        "entropies": both[1].tolist(),
        "is_equal": torch.equal(alone, both[0]),
        "ranks_agree": all(other == alone.tolist() for other in gather(alone.tolist())),
        "logits": None if logits is None else [*logits.shape],
    }


@torch.no_grad()
def oracle(config: TrainConfig, grid: Groups, length: int) -> dict[str, Any]:
    """Return the same by torch's log_softmax in fp64 over a plain model's whole logits, each document alone."""
    (chunk,) = bare_model(config, grid)
    assert config.init.checkpoint is not None
    vocab_size = folder.read(config.init.checkpoint).model.vocab_size
    whole, log_probs, entropies = global_batch(config), [], []
    for row in range(config.batch.global_size):
        tokens, labels = whole["tokens"][row, :length], whole["labels"][row, :length]
        ids = whole.get("document_ids", torch.zeros_like(whole["tokens"]))[row, :length]
        alone = tokens.split(torch.unique_consecutive(ids, return_counts=True)[1].tolist())
        logits = torch.cat([chunk(document[None], torch.arange(len(document))[None], None)[0] for document in alone])
        log_softmax = torch.log_softmax(logits[:, :vocab_size].double(), -1)
        log_probs.append(log_softmax.gather(1, labels[:, None])[:, 0].tolist())
        entropies.append((-log_softmax.exp() * log_softmax).sum(-1).tolist())
    return {"log_probs": log_probs, "entropies": entropies}


def beside_megatron(config: TrainConfig, grid: Groups) -> dict[str, Any]:
    """Train a model by measure and apply, and its copy by Megatron's own optimizer.step: say whether all weights and norms are equal.

    Ours measures a step between that is not taken.
    """
    ours, theirs = wrapped(config, bare_model(config, grid)), wrapped(config, bare_model(config, grid))
    batches = microbatches(config, grid)
    rates, norms = (config.optimizer.lr, config.optimizer.weight_decay), []
    for number in range(3):
        if number == 1:
            forward_backward(ours[0], [{**batch, "labels": batch["tokens"]} for batch in batches], CROSS_ENTROPY, grid, Timers())
            optim.measure(ours[1])
        for chunks, optimizer in (ours, theirs):
            forward_backward(chunks, batches, CROSS_ENTROPY, grid, Timers())
            if optimizer is ours[1]:
                norms.append(optim.measure(optimizer))
                optim.apply(optimizer, norms[-1], *rates)
            else:
                optim.set_rates(optimizer, *rates)
                norms.append(optimizer.step()[1])
    with optim.settled(ours[0], config.parallel), optim.settled(theirs[0], config.parallel):
        mine, others, first = ([*weights(chunks)] for chunks in (ours[0], theirs[0], bare_model(config, grid)))
    return {"are_equal": are_equal(mine, others), "have_moved": not are_equal(mine, first), "norms": [float(norm) for norm in norms]}


def weights(chunks: list[Any]) -> Iterator[torch.Tensor]:
    return (parameter for chunk in chunks for parameter in chunk.parameters())


def are_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
