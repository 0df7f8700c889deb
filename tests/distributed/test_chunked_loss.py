"""Logits and loss in chunks: the same log-probabilities, gradients and logits as whole, on every kind of layout; never more logits than asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_prism.core.config import AlgorithmConfig, GangConfig, ModelConfig
from megatron_prism.core.load import build as read
from tests.conftest import SIZES

MODEL = {
    "family": "granite",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": SIZES["vocab_size"] - 1,  # padded: a row that must not be seen
    "max_position_embeddings": 64,
    "logits_scaling": 4.0,
    "tie_word_embeddings": True,
}
MAMBA = {"num_heads": 8, "head_dim": 8, "state_dim": 8, "num_groups": 2, "conv_kernel": 4, "chunk_size": 8}
HYBRID = {
    **MODEL,
    "family": "nemotron_h",
    "num_layers": 4,
    "layer_pattern": "M-*-",
    "mamba": MAMBA,
    "activation": "relu2",
    "position_embedding": "none",
    "tie_word_embeddings": False,
    "logits_scaling": 1.0,
}
LAYOUTS = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "dp2": {},
}
TOLERANCE = 2e-6


def compared(grid: Any, model: dict[str, Any], layout: dict[str, Any], chunk_tokens: int, packed: bool, is_wrong: bool) -> dict[str, Any]:
    """On a rank: the differences between a model that computes its loss in chunks and the same one that does not."""
    from megatron_prism.models import build, chunked_loss, forward
    from megatron_prism.parallel import groups as gangs
    from megatron_prism.train import optim, step
    from megatron_prism.train.objective import CROSS_ENTROPY
    from megatron_prism.train.timers import Timers

    settings = {"precision": "fp32", "parallel": {**layout, "distributed_optimizer": False}}
    architecture = read(model, ModelConfig, str)
    configs = [read({**settings, "logits_chunk_tokens": chunk}, GangConfig, str) for chunk in (None, chunk_tokens)]
    whole, chunked = (build.build(architecture, grid, config) for config in configs)
    for source, target in zip(whole, chunked, strict=True):
        target.load_state_dict(source.state_dict())
    draw = torch.Generator().manual_seed(grid.dp_rank)
    tokens_BS = torch.randint(0, model["vocab_size"], (2, 16), generator=draw)
    batch = {
        "tokens": tokens_BS,
        "labels": tokens_BS.roll(-1, 1),
        "position_ids": torch.arange(16).expand(2, 16),
        "loss_mask": (torch.rand(2, 16, generator=draw) > 0.3).float(),
    } | ({"document_ids": (torch.arange(16) >= 5).int().expand(2, 16)} if packed else {})
    if is_wrong:
        stack = mock.patch.object(chunked_loss.DeferredLogits, "values", _of_shuffled_labels(chunked_loss.DeferredLogits.values))
    else:
        stack = mock.patch.object(build, "DTYPES", build.DTYPES)
    rows: list[int] = []
    last = build.unwrap(chunked[-1])
    if last.post_process:
        last.output_layer.register_forward_hook(lambda layer, args, output: rows.append(output[0].shape[0] * output[0].shape[1]))
    results = []
    with stack:
        for bare, config in zip((whole, chunked), configs, strict=True):
            chunks = optim.wrap(bare, config)
            means, _ = step.read(step.forward_backward(chunks, [batch, batch], CROSS_ENTROPY, grid, Timers()))
            gradients = torch.cat([parameter.main_grad.flatten() for chunk in chunks for parameter in chunk.parameters()])
            most = max(rows, default=0)
            scores = forward.log_probs(chunks, [batch], grid)[0]
            with_entropy = torch.stack(forward.log_probs_and_entropies(chunks, [batch], grid)[0])
            text = forward.logits(chunks, tokens_BS[0].tolist(), grid) if grid.cp == 1 else None
            results.append((torch.tensor(means.loss), gradients, scores, with_entropy, torch.zeros(1) if text is None else text))
    differences = [float((one - other).abs().max() / one.abs().max().clamp_min(1e-9)) for one, other in zip(*results, strict=True)]
    return {"differences": [max(gangs.gather(each)) for each in differences], "most": max(gangs.gather(most))}


def _of_shuffled_labels(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrong(self: Any, labels_BS: torch.Tensor, loss_of: Any, chunk_tokens: int) -> torch.Tensor:
        size_B, size_S = labels_BS.shape
        return loss(self, labels_BS.view(size_B, size_S // 2, 2).transpose(1, 2).reshape(size_B, size_S), loss_of, chunk_tokens)

    return wrong


@pytest.mark.parametrize(
    ("layout", "model", "chunk_tokens", "packed"),
    [
        ("one", MODEL, 6, False),
        ("one", MODEL, 6, True),
        ("one", HYBRID, 1, False),
        ("one", MODEL, 1000, False),
        pytest.param("tp2", MODEL, 7, False, marks=pytest.mark.slow),
        ("tp2_sp", MODEL, 12, False),
        pytest.param("tp2_sp", HYBRID, 8, True, marks=pytest.mark.slow),
        ("pp2", MODEL, 6, False),
        pytest.param("cp2", MODEL, 6, False, marks=pytest.mark.slow),
        pytest.param("dp2", HYBRID, 6, False, marks=pytest.mark.slow),
    ],
)
def test_a_loss_in_chunks_is_the_whole_ones(
    run_distributed: Callable[..., list[Any]], layout: str, model: dict[str, Any], chunk_tokens: int, packed: bool
) -> None:
    parallel = LAYOUTS[layout]
    arguments = {"model": model, "layout": parallel, "chunk_tokens": chunk_tokens, "packed": packed, "is_wrong": False}
    num_ranks = 1 if layout == "one" else 2
    told = run_distributed(compared, num_ranks, parallel=parallel, **arguments)[0]
    print(layout, chunk_tokens, told["differences"])
    assert max(told["differences"]) < (TOLERANCE if chunk_tokens < 32 else 1e-30), told  # one chunk: the same bits
    assert 0 < told["most"] <= max(chunk_tokens, 2 * parallel.get("tp", 1))


def test_a_wrong_order_of_labels_is_seen(run_distributed: Callable[..., list[Any]]) -> None:
    arguments = {"model": MODEL, "layout": {}, "chunk_tokens": 6, "packed": False, "is_wrong": True}
    loss, gradients, scores, *_ = run_distributed(compared, 1, **arguments)[0]["differences"]
    assert min(gradients, scores) > 100 * TOLERANCE and loss > 10 * TOLERANCE


class Made(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation makes, in forward and backward passes: no view, and nothing written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, tensor.numel())
        return outputs


ROWS, ROW_TOKENS, CHUNK = 8, 16, 40
WIDE = {"vocab_size": 2047}  # wide enough that no gradient and no attention scores are larger than a chunk's logits


def largest(grid: Any, model: dict[str, Any], layout: dict[str, Any], chunk_tokens: int | None, is_packed: bool) -> dict[str, float]:
    """On a rank: the largest tensor of each pass of an RL step, as a share of the rank's logits of a microbatch."""
    from megatron_prism.core.check.model import padded_vocab_size
    from megatron_prism.models import build, forward
    from megatron_prism.parallel import groups as gangs
    from megatron_prism.rl import losses
    from megatron_prism.train import optim, step
    from megatron_prism.train.timers import Timers

    settings = {"precision": "fp32", "logits_chunk_tokens": chunk_tokens, "parallel": {**layout, "distributed_optimizer": False}}
    config = read(settings, GangConfig, str)
    chunks = optim.wrap(build.build(read(model, ModelConfig, str), grid, config), config)
    shape = (ROWS, ROW_TOKENS)
    batch = {name: torch.randint(0, model["vocab_size"], shape) for name in ("tokens", "labels")}
    batch |= {name: torch.ones(shape) for name in ("loss_mask", "advantages", "sampler_log_probs")}
    batch |= {"position_ids": torch.arange(ROW_TOKENS).expand(shape)}
    batch |= {"document_ids": (torch.arange(ROW_TOKENS) >= 5).int().expand(shape)} if is_packed else {}
    whole = ROWS * ROW_TOKENS * padded_vocab_size(model["vocab_size"], grid.tp) // grid.tp
    shares = {}
    with Made() as made:
        ((old_BS, _),) = forward.log_probs_and_entropies(chunks, [batch], grid)
        shares["log_probs_and_entropies"], made.most = made.most / whole, 0
        (ref_BS,) = forward.log_probs(chunks, [batch], grid)
        shares["log_probs"], made.most = made.most / whole, 0
        ready = {**batch, "old_log_probs": old_BS, "ref_log_probs": ref_BS}
        means, _ = step.read(step.forward_backward(chunks, [ready], losses.objective(AlgorithmConfig()), grid, Timers()))
        shares["policy loss"] = made.most / whole
    assert means.reports["ratio"] == 1
    return {name: max(gangs.gather(share)) for name, share in shares.items()}


@pytest.mark.parametrize(
    ("layout", "model", "is_packed"),
    [
        ("one", MODEL, True),
        ("one", HYBRID, True),
        ("tp2_sp", MODEL, True),
        pytest.param("tp2", HYBRID, False, marks=pytest.mark.slow),
        pytest.param("pp2", MODEL, True, marks=pytest.mark.slow),
        pytest.param("pp2", HYBRID, False, marks=pytest.mark.slow),
    ],
)
def test_no_pass_of_an_rl_step_makes_the_whole_logits(
    run_distributed: Callable[..., list[Any]], layout: str, model: dict[str, Any], is_packed: bool
) -> None:
    """The largest tensor holds the logits of a chunk. Control: without chunks it holds those of all tokens."""
    parallel = LAYOUTS[layout]
    how = {"parallel": parallel, "model": {**model, **WIDE}, "layout": parallel, "is_packed": is_packed}
    chunked, whole = (run_distributed(largest, 1 if layout == "one" else 2, chunk_tokens=chunk, **how)[0] for chunk in (CHUNK, None))
    print(layout, chunked, whole)
    assert len(chunked) == 3 and set(chunked.values()) == {CHUNK / (ROWS * ROW_TOKENS)}, chunked
    assert set(whole.values()) == {1.0}, whole
