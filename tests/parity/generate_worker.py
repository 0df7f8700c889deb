"""One rank of a gang that generates the cases of test_generate.py.

A case: {"name", "family", "ckpt", "precision", "engine": "cached" or "recompute", "limits": the engine's, "replace":
wrong values of the architecture, "control": a fault to build in, or None, "prompts", "num_samples", "sampling"}. A result: its rollouts, which
every rank must have found; under bf16 with the log-probabilities of the training forward pass too. Beside the cases: what is refused, and whether training goes on with the same bits after a generation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.checkpoint import folder, sharded
from megatron_prism.core import load
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig
from megatron_prism.core.errors import InputError
from megatron_prism.generate import blocks, lane
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Sampling, seed_of
from megatron_prism.generate.recompute import Recompute
from megatron_prism.models import build
from megatron_prism.models.forward import logits
from megatron_prism.parallel.groups import Groups, gather

ENGINES = {"cached": Cached, "recompute": Recompute}
Case = dict[str, Any]


def run(groups: Groups, layout: dict[str, Any], cases: list[Case]) -> dict[str, Any]:
    """Return the results of a layout's cases by name, on rank 0. Those of one model stand next to each other."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for (family, ckpt, precision), of_model in itertools.groupby(
        cases, lambda case: [case[key] for key in ("family", "ckpt", "precision")]
    ):
        gang = GangConfig(parallel=ParallelConfig(**layout), precision=precision, seed=0)
        chunks = chunks_of(Path(ckpt), groups, gang)
        results |= {case["name"]: rollouts(case, chunks, groups) for case in of_model}
        if precision == "fp32" and family == "nemotron_h":
            results["refused"] = refusals(chunks, folder.read(Path(ckpt)).model, groups)
        if precision == "fp32" and family in ("llama", "nemotron_h") and groups.pp == 1:
            results[f"{family} training"] = [trained_bits(Path(ckpt), groups, gang, generates) for generates in (False, True)]
    return results if groups.rank == 0 else {}


def chunks_of(ckpt: Path, groups: Groups, gang: GangConfig) -> list[Any]:
    chunks = build.build(folder.read(ckpt).model, groups, gang)
    sharded.load_weights(ckpt, chunks)
    return chunks


def rollouts(case: Case, chunks: list[Any], groups: Groups) -> list[Any]:
    model = load.build({**load.to_dict(folder.read(Path(case["ckpt"])).model), **case["replace"]}, ModelConfig, str)
    sampling = Sampling(**{**case["sampling"], "end_ids": tuple(case["sampling"].get("end_ids", ()))})
    engine = ENGINES[case["engine"]](chunks, model, groups, **case["limits"])
    seeds = [seed_of(1, prompt) for prompt in range(len(case["prompts"]))]
    with fault(case["control"]):
        made = engine.generate(case["prompts"], case["num_samples"], sampling, seeds)
    assert [(rollout.prompt, rollout.sample) for rollout in made] == list(
        itertools.product(range(len(case["prompts"])), range(case["num_samples"]))
    )
    assert all(others == made for others in gather(made)), "not the same rollouts on every rank"
    rows = [[rollout.prompt, rollout.token_ids.tolist(), rollout.logprobs.tolist(), rollout.ended] for rollout in made]
    return [[*row, full_pass(case, row, chunks, groups)] for row in rows] if case["precision"] == "bf16" else rows


def full_pass(case: Case, row: list[Any], chunks: list[Any], groups: Groups) -> list[float]:
    """Return the log-probabilities of a continuation's tokens by the training forward pass, at temperature 1."""
    prompt, token_ids = case["prompts"][row[0]], row[1]
    logits_SV = logits(chunks, [*prompt, *token_ids], groups)
    assert logits_SV is not None
    logprob_TV = logits_SV[len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprob_TV.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    """Build a known fault into the engine: a parity test must see it."""
    decode, states, turn, copy_rows = blocks.decode, blocks.Mamba.states, blocks.rotate, lane.Cache.copy_rows

    def one_off(positions: list[int], rules: blocks.Positions, device: torch.device) -> blocks.Call:
        moved = dataclasses.replace(rules, inverse_F=None)
        cos_TP, sin_TP = rules.angles(torch.tensor(positions, device=device) + 1)
        return dataclasses.replace(decode(positions, moved, device), cos_TP=cos_TP, sin_TP=sin_TP)

    def in_bf16(self: blocks.Mamba, size_K: int) -> tuple[blocks.State, ...]:
        return tuple(dataclasses.replace(state, dtype=torch.bfloat16) for state in states(self, size_K))

    def key_unturned(x_TGJP: torch.Tensor, call: blocks.Call) -> torch.Tensor:
        return torch.cat([turn(x_TGJP, call)[:, :, :-1], x_TGJP[:, :, -1:]], 2)

    def one_short(self: Any, rows: Any, source: Any, source_rows: Any, num_tokens: int) -> None:
        copy_rows(self, rows, source, source_rows, num_tokens - 1)

    faults: dict[str | None, tuple[Any, str, Any]] = {
        None: (blocks, "decode", decode),
        "positions one off": (blocks, "decode", one_off),
        "keys not turned": (blocks, "rotate", key_unturned),
        "states in bf16": (blocks.Mamba, "states", in_bf16),
        "time passes in padding": (blocks, "NO_TIME", 1.0),
        "every product by oneDNN": (blocks, "LARGE", 0),  # no fault
        "a token not copied": (lane.Cache, "copy_rows", one_short),
    }
    with mock.patch.object(*faults[name]):
        yield


def refusals(chunks: list[Any], model: Any, groups: Groups) -> dict[str, str]:
    """Return what is said of weights still to come, of a parameter that nobody knows, and of ranks that disagree."""
    said, sampling = {}, Sampling(max_tokens=1)

    def refused(name: str, chunk: Any, seed: int) -> None:
        try:
            Cached([chunk], model, groups).generate([[1]], 1, sampling, [seed])
        except InputError as error:
            said[name] = str(error)

    late = torch.nn.Module()
    late.module, late.config, late.remove_forward_pre_hook_handles = chunks[0], chunks[0].config, {"a module": "a hook"}
    refused("late", late, 0)
    layer = build.unwrap(chunks[0]).decoder.layers[0]
    layer.register_parameter("gate", torch.nn.Parameter(torch.zeros(1)))
    refused("unknown", chunks[0], 0)
    del layer.gate
    refused("ranks", chunks[0], groups.rank)
    return said


def trained_bits(ckpt: Path, groups: Groups, gang: GangConfig, generates: bool) -> list[float]:
    """Return a sum over all weights after each of two training steps, the second one after a generation or not."""
    chunks, model = chunks_of(ckpt, groups, gang), folder.read(ckpt).model
    optimizer, sums = torch.optim.SGD(chunks[0].parameters(), lr=0.1), []
    tokens_BS = (torch.arange(64) * 7 % 290).view(2, 32)
    for step in range(2):
        if generates and step:
            asked = [[5, 6, 7], [8]], 2, Sampling(max_tokens=4, temperature=1.0), [1, 2]
            made = Cached(chunks, model, groups).generate(*asked)
            if groups.world_size == 1:  # the weights are those after the first step
                oracles = Recompute(chunks, model, groups).generate(*asked)
                assert [rollout.token_ids for rollout in made] == [rollout.token_ids for rollout in oracles]
        optimizer.zero_grad()
        loss_BS = chunks[0](tokens_BS, torch.arange(32).expand(2, -1), None, labels=tokens_BS.roll(-1, 1))
        loss_BS.mean().backward()
        optimizer.step()
        sums.append(sum(float(parameter.double().sum()) for parameter in chunks[0].parameters()))
    return sums
