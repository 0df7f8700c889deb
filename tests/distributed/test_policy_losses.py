"""Policy losses on every layout, packed and not, whole and in chunks, as in one process; on-policy each ratio is exactly 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.core.config import AlgorithmConfig, BatchConfig, DataConfig, InitConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_prism.generate.engine import ids_of, logprobs_of
from megatron_prism.models import forward
from megatron_prism.models.batch import Batch
from megatron_prism.parallel.groups import Groups, gather
from megatron_prism.rl import batches, losses
from megatron_prism.rl.sample import Sample
from megatron_prism.train import optim
from megatron_prism.train.objective import Objective, Terms
from megatron_prism.train.step import forward_backward, read
from megatron_prism.train.timers import Timers
from tests.distributed.objectives import bare_model, wrapped

pytestmark = pytest.mark.slow

TOLERANCE, STEPS, NUM_SAMPLES, SEQ_LENGTH = 1e-5, 2, 12, 48
ALGORITHMS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "gspo": {"loss": "gspo", "normalization": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "dr_grpo": {"loss": "cispo", "normalization": "constant", "constant_tokens": 30, "kl_estimator": "k2", "clip_high": 0.01},
}
TP2, PP2 = {"tp": 2, "sequence_parallel": True}, {"pp": 2}
# name: (model, ranks, layout, packed)
RUNS: dict[str, tuple[str, int, dict[str, Any], bool]] = {
    "one": ("tiny", 1, {}, False),
    "one packed": ("tiny", 1, {}, True),
    "tp2": ("tiny", 2, TP2, False),
    "tp2 packed": ("tiny", 2, TP2, True),
    "pp2": ("tiny", 2, PP2, False),
    "pp2 packed": ("tiny", 2, PP2, True),
    "dp2": ("tiny", 2, {}, False),
    "dp2 packed": ("tiny", 2, {}, True),
    "cp2 dp2": ("tiny", 4, {"cp": 2}, False),
    "hybrid one": ("nemotron", 1, {}, False),
    "hybrid one packed": ("nemotron", 1, {}, True),
    "hybrid tp2 packed": ("nemotron", 2, TP2, True),
    "one packed chunked": ("tiny", 1, {}, True),
    "tp2 packed chunked": ("tiny", 2, TP2, True),
    "pp2 chunked": ("tiny", 2, PP2, False),
    "dp2 packed chunked": ("tiny", 2, {}, True),
    "cp2 chunked": ("tiny", 2, {"cp": 2}, False),
    "hybrid tp2 packed chunked": ("nemotron", 2, TP2, True),
    "granite": ("granite", 1, {}, False),
    "granite tp2 packed chunked": ("granite", 2, TP2, True),
}
CHUNK_TOKENS = 20  # of the chunked runs: no divisor of a microbatch's tokens
# name: (run, the only algorithm)
FAULTS = {
    "mean of means": ("dp2 packed", "the paper's"),
    "shifted": ("one packed", "the paper's"),
    "leaking": ("one packed", "the paper's"),
    "unclipped": ("one packed", "gspo"),
}


def samples() -> list[tuple[Sample, float]]:
    """Return samples with their advantages: random tokens, and what a sampler of other weights would say of them."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for number in range(NUM_SAMPLES):
        prompt, response = int(torch.randint(1, 9, (), generator=generator)), int(torch.randint(1, 12, (), generator=generator))
        response += 20 * (number in (0, 5))
        tokens = tuple(torch.randint(3, 384, (prompt + response,), generator=generator).tolist())
        logprobs = tuple((-6 + 0.5 * torch.randn(response, generator=generator)).tolist())
        known = {"prompt_id": str(number), "sample": 0, "domain": "math", "ended": "end_token", "weights_step": 0, "outcome": "right"}
        sample = Sample(
            **known, prompt_tokens=tokens[:prompt], token_ids=ids_of(tokens[prompt:]), logprobs=logprobs_of(logprobs), reward=1.0
        )  # type: ignore[arg-type]
        made.append((sample, float(torch.randn((), generator=generator))))
    return made


def policy(
    groups: Groups, checkpoint: str, layout: dict[str, Any], is_packed: bool, chunk_tokens: int | None, fault: str | None, only: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Take steps of each algorithm. Return its means at each, and last each response's summed log-probability under the new weights."""
    config = TrainConfig(
        run_dir=Path("none"),
        steps=STEPS,
        data=DataConfig(prepared=Path("none"), seq_length=SEQ_LENGTH),
        batch=BatchConfig(global_size=8),
        init=InitConfig(checkpoint=Path(checkpoint)),
        optimizer=OptimizerConfig(lr=3e-4),
        parallel=ParallelConfig(**layout),
        precision="fp32",
        logits_chunk_tokens=chunk_tokens,
    )
    names = [only] if only else [name for name in ALGORITHMS if groups.cp == 1 or name != "gspo"]
    return {name: steps(config, groups, AlgorithmConfig(**ALGORITHMS[name]), is_packed, fault) for name in names}


def steps(config: TrainConfig, groups: Groups, algorithm: AlgorithmConfig, is_packed: bool, fault: str | None) -> list[dict[str, Any]]:
    of, advantages = zip(*samples(), strict=True)
    multiple = 4 if groups.tp * groups.cp > 1 else 1
    shape = batches.Shape(seq_length=SEQ_LENGTH - 1, micro_size=2, is_packed=is_packed, token_multiple=multiple)
    plan = batches.plan(of, shape, groups.dp)
    generator = torch.Generator().manual_seed(7)
    reference = [-6 + 0.3 * torch.randn(len(sample.token_ids), generator=generator) for sample in of]
    microbatches = batches.microbatches(plan, groups.dp_rank, of, advantages, {"ref_log_probs": reference})
    if fault == "leaking":
        microbatches = [{name: value for name, value in each.items() if name != "document_ids"} for each in microbatches]
    chunks, optimizer = wrapped(config, bare_model(config, groups))
    old = forward.log_probs(chunks, microbatches, groups)
    ready = [{**each, "old_log_probs": values.roll(int(fault == "shifted"), 1)} for each, values in zip(microbatches, old, strict=True)]
    objective = probed(losses.objective(algorithm), is_mean=fault == "mean of means")
    if fault == "unclipped":
        object.__setattr__(algorithm, "clip_high", 1e9)
        object.__setattr__(algorithm, "clip_low", 1.0)
    taken = []
    for _ in range(STEPS):
        means, _ = read(forward_backward(chunks, ready, objective, groups, Timers()))
        grad_norm = optim.measure(optimizer)
        optim.apply(optimizer, grad_norm, config.optimizer.lr, config.optimizer.weight_decay)
        taken.append({"loss": means.loss, "weight": means.weight, "grad_norm": float(grad_norm), **means.reports})
    with optim.settled(chunks, config.parallel):
        new = batches.by_sample(plan, groups.dp_rank, forward.log_probs(chunks, microbatches, groups))
    mine = [[number, float(values.sum())] for number, values in new.items()]
    return [*taken, {"log_probs": dict(sorted(pair for pairs in gather(mine) for pair in pairs))}]


def probed(objective: Objective, is_mean: bool) -> Objective:
    """Report off_policy too: the size of the ratios' logarithms. `is_mean`, a fault: each microbatch is averaged by itself."""

    def terms(nll_BS: torch.Tensor, batch: Batch, of: Callable[[torch.Tensor, Batch], Terms]) -> Terms:
        found = of(nll_BS, batch)
        off_BS = ((nll_BS + batch["old_log_probs"]) * batch["loss_mask"]).abs().detach()
        sums = {**found.sums, "off_policy": off_BS.sum()}
        return (
            Terms(found.loss / found.weight.clamp(min=1), (found.weight > 0).float(), sums)
            if is_mean
            else Terms(found.loss, found.weight, sums)
        )

    return Objective(partial(terms, of=objective.terms), objective.needs, (*objective.reports, "off_policy"))


@pytest.fixture(scope="module")
def results(run_distributed: Callable[..., list[Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    def run(name: str, fault: str | None = None, only: str | None = None) -> dict[str, Any]:
        model, ranks, layout, is_packed = RUNS[name]
        checkpoint = str(request.getfixturevalue(f"{model}_checkpoint"))
        chunk_tokens = CHUNK_TOKENS if "chunked" in name else None
        how = {
            "checkpoint": checkpoint,
            "layout": layout,
            "is_packed": is_packed,
            "chunk_tokens": chunk_tokens,
            "fault": fault,
            "only": only,
        }
        return run_distributed(policy, ranks, timeout_s=240, parallel=layout, **how)[0]

    return {name: run(name, only="the paper's" if RUNS[name][0] != "tiny" else None) for name in RUNS} | {
        fault: run(name, fault, only) for fault, (name, only) in FAULTS.items()
    }


def apart(run: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest difference of each mean over the steps, and of a response's log-probability after them; relative to values above 1."""
    *steps, last = run
    *reference_steps, reference_last = reference
    pairs = {name: [(one[name], other[name]) for one, other in zip(steps, reference_steps, strict=True)] for name in steps[0]}
    pairs["log_probs"] = list(zip(last["log_probs"].values(), reference_last["log_probs"].values(), strict=True))
    return {name: max(abs(one - other) / max(1.0, abs(other)) for one, other in values) for name, values in pairs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_layout_equals_one_process_without_packing(results: dict[str, Any], name: str) -> None:
    reference = results[{"tiny": "one", "nemotron": "hybrid one", "granite": "granite"}[RUNS[name][0]]]
    for algorithm, run in results[name].items():
        differences = apart(run, reference[algorithm])
        assert max(differences.values()) <= TOLERANCE, (algorithm, differences)
        assert list(run[-1]["log_probs"]) == [str(number) for number in range(NUM_SAMPLES)]


@pytest.mark.parametrize("name", RUNS)
def test_on_policy_every_ratio_is_exactly_one(results: dict[str, Any], name: str) -> None:
    """Log-probabilities of forward-only are the training pass's, bit for bit, in chunks too: both passes cut the same ones."""
    for run in results[name].values():
        first, *later = run[:-1]
        assert first["off_policy"] == first["clipped"] == 0 and first["ratio"] == 1
        assert all(step["off_policy"] > 0 for step in later)
        assert any(step["clipped"] > 0 for step in later) or "granite" in name  # its scaled logits move too little


def test_tokens_are_counted_over_all_ranks(results: dict[str, Any]) -> None:
    num_tokens = sum(len(sample.token_ids) for sample, _ in samples())
    for name in RUNS:
        weights = [results[name][algorithm][0]["weight"] for algorithm in results[name]]
        assert weights == pytest.approx([num_tokens, *[NUM_SAMPLES] * (len(weights) - 1)])


def test_faults_are_seen(results: dict[str, Any]) -> None:
    """Each microbatch's own mean; old log-probabilities of other tokens; responses that see each other; no clipping."""
    one = results["one"]
    assert apart(results["mean of means"]["the paper's"], one["the paper's"])["grad_norm"] > 100 * TOLERANCE
    assert results["shifted"]["the paper's"][0]["off_policy"] > 0.1
    assert apart(results["leaking"]["the paper's"], one["the paper's"])["loss"] > 100 * TOLERANCE
    assert apart(results["unclipped"]["gspo"], one["gspo"])["log_probs"] > 100 * TOLERANCE
