"""Known traps of reinforcement learning, by number (docs/RL.md, Traps): those that need a model. Each has its fault built in as a control."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_prism.checkpoint import folder, sharded
from megatron_prism.core.config import AlgorithmConfig, GangConfig, ParallelConfig, ReferenceConfig
from megatron_prism.core.errors import ResultFailure
from megatron_prism.generate import weights
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Sampling, ids_of, logprobs_of
from megatron_prism.models import build, forward
from megatron_prism.parallel.groups import Groups, gather
from megatron_prism.rl import batches, gate, losses
from megatron_prism.rl.batches import Shape
from megatron_prism.rl.reference import Reference
from megatron_prism.rl.sample import Sample
from megatron_prism.train import optim
from megatron_prism.train.step import forward_backward, read
from megatron_prism.train.timers import Timers

pytestmark = pytest.mark.slow
PROMPTS = [[5, 9, 14, 200, 31, 7], [1], [60, 61, 62, 63, 64, 65, 66, 67]]
DRAWN, SHAPE = Sampling(max_tokens=12, temperature=1.0), Shape(seq_length=48)
HYBRIDS = ("nemotron_checkpoint", "granite_h_checkpoint")
CONV_ALIASES = (
    "conv1d_cp1",
    "conv1d_weight_cp1",
    "conv1d_bias_cp1",
)  # of a mixer's context parallelism: Megatron-Core 0.16's, and the two of 0.19


def sample(prompt: list[int], response: list[int], number: int = 0) -> Sample:
    known = {"domain": "math", "ended": "end_token", "weights_step": 0, "outcome": "right", "reward": 1.0}
    ids = {"prompt_tokens": tuple(prompt), "token_ids": ids_of(response), "logprobs": logprobs_of((-1.0,) * len(response))}
    return Sample(**known, **ids, prompt_id=str(number), sample=number)  # type: ignore[arg-type]


def loaded(checkpoint: str, groups: Groups) -> tuple[Any, list[Any]]:
    """Return a checkpoint's architecture, and its weights in wrapped chunks, as a run holds them."""
    config = GangConfig(parallel=ParallelConfig(distributed_optimizer=False), precision="fp32")
    model = folder.read(Path(checkpoint)).model
    chunks = build.build(model, groups, config)
    sharded.load_weights(Path(checkpoint), chunks)
    return model, optim.wrap(chunks, config)


def stopped(engine: Cached, chunks: list[Any], groups: Groups) -> bool:
    """Say whether the trust gate stops this sampler."""
    trust = gate.measure(engine, chunks, PROMPTS, 2, DRAWN, SHAPE, groups)
    try:
        gate.require(trust, gate.BOUNDS["fp32"])
    except ResultFailure:
        return True
    return False


def unscaled(groups: Groups, checkpoint: str) -> dict[str, Any]:
    model, chunks = loaded(checkpoint, groups)
    right, wrong = Cached(chunks, model, groups), Cached(chunks, dataclasses.replace(model, logits_scaling=1.0), groups)
    greedy = [engine.generate(PROMPTS, 1, Sampling(max_tokens=12), [1, 2, 3]) for engine in (right, wrong)]
    ids, logprobs = ([[list(getattr(one, name)) for one in rollouts] for rollouts in greedy] for name in ("token_ids", "logprobs"))
    return {"ids": ids, "logprobs": logprobs, "stopped": [stopped(engine, chunks, groups) for engine in (right, wrong)]}


def test_trap_4_a_missing_logits_scaling_shows_in_no_greedy_token(
    run_distributed: Callable[..., list[Any]], granite_checkpoint: Path
) -> None:
    told = run_distributed(unscaled, 1, checkpoint=granite_checkpoint)[0]
    assert told["ids"][0] == told["ids"][1]
    right, sharp = (torch.tensor(each).mean() for each in told["logprobs"])
    assert sharp > 0.6 * right, "a scale that is hardly seen tests nothing"  # log-probabilities: nearer to 0
    assert told["stopped"] == [False, True]


def second_of_two(groups: Groups, checkpoint: str, is_masked: bool) -> list[list[float]]:
    """Return the second sample's log-probabilities in one row with either of two first ones, and alone."""
    _, chunks = loaded(checkpoint, groups)
    second, scores = sample([9, 8, 7], [30, 31, 32, 33], 1), []
    for first in ([sample([4] * 9, [50] * 8)], [sample([90] * 9, [120] * 8)], []):
        plan = batches.plan([*first, second], SHAPE, 1)
        rows = batches.microbatches(plan, 0, [*first, second], [0.0] * (len(first) + 1), {})
        rows = rows if is_masked else [{name: value for name, value in row.items() if name != "document_ids"} for row in rows]
        assert len(rows) == 1
        scores.append(batches.by_sample(plan, 0, forward.log_probs(chunks, rows, groups))[len(first)].tolist())
    return scores


@pytest.mark.parametrize("name", HYBRIDS)
def test_trap_5_no_state_leaks_between_packed_samples(
    run_distributed: Callable[..., list[Any]], request: pytest.FixtureRequest, name: str
) -> None:
    checkpoint = request.getfixturevalue(name)
    one, other, alone = run_distributed(second_of_two, 1, checkpoint=checkpoint, is_masked=True)[0]
    assert one == other == pytest.approx(alone, abs=1e-5)
    one, other, _ = run_distributed(second_of_two, 1, checkpoint=checkpoint, is_masked=False)[0]
    assert one != pytest.approx(other, abs=1e-3)


def scores_of(chunks: list[Any], groups: Groups) -> torch.Tensor:
    samples = [sample([3, 4, 5], [6, 7, 8, 9, 10, 11])]
    return gate.trainer_log_probs(chunks, samples, SHAPE, groups)[0]


@torch.no_grad()
def moved(chunks: list[Any]) -> None:
    """Change every parameter, as a step of the optimizer does: in place."""
    generator = torch.Generator().manual_seed(0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def mixers(chunks: list[Any]) -> list[Any]:
    return [module for module in build.unwrap(chunks[0]).modules() if type(module).__name__ == "MambaMixer"]


@contextmanager
def fault_of(name: str | None, chunks: list[Any]) -> Iterator[None]:
    """Build in what other engines did. It takes effect when the weights move."""
    read, blocks = weights.read, weights._mamba

    def twice(layer: Any, *arguments: Any) -> Any:
        layer["mixer.A_log"] = layer["mixer.A_log"].exp()
        return blocks(layer, *arguments)

    def with_old_head(*arguments: Any) -> Any:
        parts, outside, positions = read(*arguments)
        return parts, outside | {"output": old_head}, positions

    old_head = build.unwrap(chunks[0]).shared_embedding_or_output_weight()
    old_head = None if old_head is None else old_head.detach().clone()
    kept = [(mixer.cp, alias, getattr(mixer.cp, alias)) for mixer in mixers(chunks) for alias in CONV_ALIASES if hasattr(mixer.cp, alias)]
    if name == "conv alias lost":
        for cp, alias, conv in kept:
            setattr(cp, alias, copy.deepcopy(conv))
    instead = {"stale head": ("read", with_old_head), "A_log twice": ("_mamba", twice)}
    try:
        if name in instead:
            attribute, function = instead[name]
            with mock.patch.object(weights, attribute, function):
                yield
        else:
            yield
    finally:
        for cp, alias, conv in kept:
            setattr(cp, alias, conv)


def reloaded(groups: Groups, checkpoint: str) -> dict[str, Any]:
    """Move the weights and load them again. Return what sampler and trainer say each time, and whether each fault is stopped."""
    model, chunks = loaded(checkpoint, groups)
    engine = Cached(chunks, model, groups)

    def said() -> list[Any]:
        rollouts = engine.generate(PROMPTS, 2, DRAWN, [1, 2, 3])
        return [[[*one.token_ids, *one.logprobs] for one in rollouts], scores_of(chunks, groups).tolist(), stopped(engine, chunks, groups)]

    reference = Reference(chunks, ReferenceConfig())
    told: dict[str, Any] = {"first": said()}
    moved(chunks)
    told["moved"] = said()
    with reference.in_place():
        told["in place"] = said()
    told["moved again"] = said()
    for number in range(2):
        sharded.load_weights(Path(checkpoint), chunks)
        told[f"loaded {number}"] = said()
    told["faults"] = {}
    for fault in ("conv alias lost", "A_log twice", *(("stale head",) if model.tie_word_embeddings else ())):
        with fault_of(fault, chunks):
            moved(chunks)
            told["faults"][fault] = stopped(engine, chunks, groups)
        assert not stopped(engine, chunks, groups), fault
    return told


@pytest.mark.parametrize("name", HYBRIDS)
def test_trap_6_a_hybrids_weights_are_read_anew(
    run_distributed: Callable[..., list[Any]], request: pytest.FixtureRequest, name: str
) -> None:
    """After a step, with the reference in their place, and loaded once and twice: sampler and trainer have the bits of these weights."""
    told = run_distributed(reloaded, 1, timeout_s=240, checkpoint=request.getfixturevalue(name))[0]
    assert told["first"] == told["in place"] == told["loaded 0"] == told["loaded 1"]
    assert told["moved"] == told["moved again"] and told["moved"][0] != told["first"][0] and told["moved"][1] != told["first"][1]
    assert not told["first"][2] and not told["moved"][2]
    assert set(told["faults"].values()) == {True} and len(told["faults"]) == (3 if name == "granite_h_checkpoint" else 2), told["faults"]


def finalised(groups: Groups, checkpoint: str) -> dict[str, Any]:
    """Return how often gradients are finalised in two steps of several microbatches, the weights of the means, and the gradients' norms."""
    from megatron.core import distributed

    _, chunks = loaded(checkpoint, groups)
    samples = [sample([3, 4, 5], [6 + number] * (2 + number), number) for number in range(7)]
    plan = batches.plan(samples, Shape(seq_length=12, is_packed=False), groups.dp)
    rows = batches.microbatches(plan, groups.dp_rank, samples, [1.0] * 7, {})
    rows = [{**row, "old_log_probs": row["sampler_log_probs"]} for row in rows]
    objective = losses.objective(AlgorithmConfig(kl_beta=0.0, tis_cap=None))
    with mock.patch.object(distributed, "finalize_model_grads", wraps=distributed.finalize_model_grads) as finalize:
        means = [read(forward_backward(chunks, rows, objective, groups, Timers()))[0] for _ in range(2)]
        number = finalize.call_count
    norm = torch.cat([parameter.main_grad.flatten() for parameter in chunks[0].parameters()]).norm()
    return {
        "number": number,
        "num_microbatches": len(rows),
        "means": [[one.loss, one.weight] for one in means],
        "norms": gather(float(norm)),
    }


def test_trap_11_gradients_are_finalised_once_a_step(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path) -> None:
    """However many microbatches; and the step's tokens are those of all ranks."""
    one, two = (run_distributed(finalised, ranks, checkpoint=tiny_checkpoint)[0] for ranks in (1, 2))
    assert [told["num_microbatches"] for told in (one, two)] == [7, 4] and one["number"] == two["number"] == 2
    assert one["means"][0] == one["means"][1] and one["means"][0] == pytest.approx(two["means"][0], rel=1e-6)
    assert one["means"][0][1] == sum(range(2, 9)) and two["norms"] == pytest.approx(one["norms"] * 2, rel=1e-5)
