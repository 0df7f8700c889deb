"""Known traps of reinforcement learning, by number (docs/RL.md, Traps): those that need no model. The rest of the table stands elsewhere."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.rl import check_rl
from megatron_prism.core.config import AlgorithmConfig, RLConfig
from megatron_prism.core.config.rl import Advantage
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.generate.engine import Rollout, Sampling, ids_of, logprobs_of
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.rl import batches, losses, rewards, rollout
from megatron_prism.rl.advantages import advantages, group_of, is_kept
from megatron_prism.rl.ahead import Ahead, Taken, lag_of
from megatron_prism.rl.prompts import Prompt
from megatron_prism.rl.rollout import Encoded, Response, Sampler
from megatron_prism.rl.sample import Sample

ROOT = Path(__file__).resolve().parents[3]
ADVANTAGES = get_args(Advantage)


def sample(outcome: Any, number: int = 0, num_tokens: int = 3, **fields: Any) -> Sample:
    ids = tuple(range(20 + 10 * number, 20 + 10 * number + num_tokens))
    known = {"prompt_id": "p", "domain": "math", "prompt_tokens": (5, 6), "ended": "end_token", "weights_step": 0, "reward": 0.0}
    known |= {"token_ids": ids_of(ids), "logprobs": logprobs_of((-1.0,) * num_tokens), "reward": float(outcome == "right")}
    return Sample(**{**known, "sample": number, "outcome": outcome, **fields})


def config(**changes: Any) -> RLConfig:
    values: dict[str, Any] = {
        "run_dir": "run",
        "prompts": "prompts",
        "steps": 1,
        "init": {"checkpoint": "ckpt"},
        "rollout": {"num_prompts": 2, "num_samples": 3, "max_tokens": 8},
        "batch": {"seq_length": 32},
    }
    return build({**values, **changes}, RLConfig, str)


def test_trap_1_a_masked_row_is_out_of_its_groups_statistics() -> None:
    """Its group's mean with the fault in it would give [.5, .5, -.5, -.5]."""
    rows = [sample("right"), sample("fault", reward=1.0), sample("wrong"), sample("wrong")]
    (values,) = advantages([group_of(rows, AlgorithmConfig())], AlgorithmConfig(advantage="dr_grpo"))
    assert values.tolist() == pytest.approx([2 / 3, 0, -1 / 3, -1 / 3])


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("outcome", ["right", "wrong"])
def test_trap_2_penalties_teach_nothing_where_outcomes_agree(advantage: Any, outcome: Any) -> None:
    """The rewards of such a group have a deviation, all of it penalties."""
    keys = AlgorithmConfig(advantage=advantage, overlong="shape", overlong_tokens=4, stop_penalty=0.3, repetition_penalty=0.5)
    rows = []
    for number, (num_tokens, ended) in enumerate([(2, "end_token"), (7, "end_token"), (8, "max_tokens")]):
        one = sample(outcome, number, num_tokens, ended=ended)
        rows.append(sample(outcome, number, num_tokens, ended=ended, reward=rewards.reward(outcome, one.ended, one.token_ids, 8, keys)))
    group = group_of(rows, keys)
    assert group.rewards_G.std() > 0.1
    mixed = group_of([sample("right"), sample("wrong")], keys)
    assert len(set(advantages([group, mixed], keys)[0].tolist())) == 1
    assert is_kept(group, keys) == (advantage == "reinforce++")


@pytest.mark.parametrize("outcomes", [["right", "right"], ["wrong", "no_format"]])
def test_trap_3_a_group_without_variance_has_the_kl_gradient_alone(outcomes: list[str]) -> None:
    """It is dropped, so that it has none; kept if asked for, and then each token's gradient is kl_beta times the KL's."""
    beta = 0.05
    dropping, keeping = AlgorithmConfig(kl_beta=beta), AlgorithmConfig(kl_beta=beta, keep_zero_variance=True)
    rows = [sample(outcome, number) for number, outcome in enumerate(outcomes)]
    assert not is_kept(group_of(rows, dropping), dropping) and is_kept(group_of(rows, keeping), keeping)
    (values,) = advantages([group_of(rows, keeping)], keeping)
    plan = batches.plan(rows, batches.Shape(seq_length=16), 1)
    apart = [torch.tensor([-1.5, -1.0, -0.2])] * 2  # the reference's; the policy's and the old ones are the sampler's, -1
    more = {"old_log_probs": [torch.full((3,), -1.0)] * 2, "ref_log_probs": apart}
    (batch,) = batches.microbatches(plan, 0, rows, values.tolist(), more)
    gradients = []
    for used in (keeping, AlgorithmConfig(kl_beta=0.0, keep_zero_variance=True)):
        nll = torch.ones_like(batch["loss_mask"]).requires_grad_()
        gradients.append(torch.autograd.grad(losses.objective(used).terms(nll, batch).loss, nll)[0])
    mask = batch["loss_mask"] > 0
    expected = -beta * (1 - (apart[0] + 1).exp())  # k3, by the negative log-likelihood
    assert gradients[0][mask].tolist() == pytest.approx([*expected.tolist()] * 2) and not gradients[0][~mask].any()
    assert gradients[0][mask].abs().max() > 0.01 and not gradients[1].any()


def test_trap_7_a_distribution_that_the_trainer_does_not_compute_is_refused() -> None:
    """Temperature 0 and below are out of bounds, any other than 1 is refused, and there is no key for top-p or top-k."""
    assert [problem.where for problem in check_rl(config(), 1)] == []
    for temperature in (-1.0, 0.0, 0.7):
        wrong = config(rollout={"num_prompts": 2, "num_samples": 3, "max_tokens": 8, "temperature": temperature})
        problems = [*check_bounds(wrong, ""), *check_rl(wrong, 1)]
        assert "rollout.temperature" in [problem.where for problem in problems], temperature
    for key, value in {"top_p": 0.9, "top_k": 5}.items():
        with pytest.raises(InputError, match=key):
            config(rollout={"num_prompts": 2, "num_samples": 3, "max_tokens": 8, key: value})


class Spelled:
    """An engine that answers each prompt with the same ids, its sample's number of them fewer."""

    def __init__(self, ids: Sequence[int], end_id: int):
        self.ids, self.end_id = ids, end_id

    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return the rollouts."""
        made = []
        for prompt in range(len(prompts)):
            for number in range(num_samples):
                ids = ids_of((*self.ids[: len(self.ids) - number], self.end_id))
                logprobs = logprobs_of(-0.5 * (at + 1) for at in range(len(ids)))
                made.append(Rollout(prompt, number, seeds[prompt], ids, logprobs, "end_token"))
        return made


class Told:
    """A grader that says what it is told of each text, in an order of its own; what it is told nothing of it leaves out."""

    def __init__(self, outcomes: dict[str, str]):
        self.outcomes = outcomes

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        """Return the outcomes by id."""
        known = [item for item in items if item.response in self.outcomes]
        return {item.id: Graded(id=item.id, outcome=self.outcomes[item.response], why=item.response) for item in reversed(known)}  # type: ignore[arg-type]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what rank 0 says be this process's."""
    monkeypatch.setattr(rollout, "from_first", lambda value: value)
    monkeypatch.setattr(rollout, "shared", lambda make, values: [make(value) for value in values])


def sampled(spec: TokenizerSpec, prompt: Sequence[int], ids: Sequence[int], outcomes: dict[str, str]) -> list[rollout.Group]:
    """Return the groups of two prompts with these tokens."""
    prompts = [Encoded(Prompt(id=f"p{n}", domain="math", kind="math", prompt="?", gold="1"), tuple(prompt)) for n in range(2)]
    sampler = Sampler(config(), Spelled(ids, spec.end_ids[0]), spec, Told(outcomes))
    return list(sampler.grade(sampler.sample(prompts, 3, [1, 2], 0)).groups())


def pieces_of_a_token(spec: TokenizerSpec) -> list[int]:
    """Return the ids of one longer token's characters."""
    vocabulary = json.loads((spec.folder / "tokenizer.json").read_text())["model"]["vocab"]
    text = max((token for token in vocabulary if token.isalpha()), key=len)
    return [vocabulary[character] for character in text]


def test_trap_8_what_was_sampled_is_what_is_trained_on(tiny_tokenizer: Path, alone: None) -> None:
    """The response is spelled in other tokens than the tokenizer's, and its first merges with the prompt's last."""
    spec = tokenizer.load(tiny_tokenizer)
    first, *ids = pieces_of_a_token(spec)
    text = tokenizer.decode([first, *ids], spec)
    assert len(ids) > 2 and tokenizer.encode_text(text, spec) != [first, *ids], (
        "a tokenizer of which encode(decode(ids)) is ids tests nothing"
    )
    texts = {tokenizer.continuation([first], ids[: len(ids) - number], spec): "right" for number in range(3)}
    groups = sampled(spec, [first], ids, texts)
    samples = rollout.samples(groups)
    assert [tuple(one.token_ids) for one in samples[:3]] == [(*ids[: len(ids) - number], spec.end_ids[0]) for number in range(3)]
    plan = batches.plan(samples, batches.Shape(seq_length=32), 1)
    rows = batches.microbatches(plan, 0, samples, [1.0] * len(samples), {})
    for place in plan.places[0]:
        row, one = rows[place.row], samples[place.sample]
        assert row["tokens"][0, place.tokens].tolist() == [first, *one.token_ids[:-1]]
        assert row["labels"][0, place.labels].tolist() == [*one.token_ids]
        assert row["sampler_log_probs"][0, place.labels].tolist() == [*one.logprobs]


def test_trap_9_a_failed_extraction_shifts_no_reward(tiny_tokenizer: Path, alone: None) -> None:
    """Outcomes are joined by id, whatever their order, and one that is missing is an error."""
    spec = tokenizer.load(tiny_tokenizer)
    first, *ids = pieces_of_a_token(spec)
    texts = [tokenizer.continuation([first], ids[: len(ids) - number], spec) for number in range(3)]
    outcomes = dict(zip(texts, ("fault", "right", "no_format"), strict=True))
    groups = sampled(spec, [first], ids, outcomes)
    assert [[(response.sample.outcome, response.sample.reward, response.why) for response in group] for group in groups] == [
        [("fault", 0.0, texts[0]), ("right", 1.0, texts[1]), ("no_format", 0.0, texts[2])]
    ] * 2
    with pytest.raises(KeyError, match="0/0"):
        sampled(spec, [first], ids, {text: outcome for text, outcome in outcomes.items() if outcome != "fault"})


def test_trap_11_lag_is_counted_when_a_sample_is_trained_on() -> None:
    """Sampled for step 3 it was one update old. A step that takes it later finds it older than that, and does not train on it."""

    def taken(step: int) -> Taken:
        groups = [[Response(sample("right", number, weights_step=1), "", "", seed=0)] for number in range(2)]
        return Ahead(_groups=groups).take(step, 1, 0)

    assert [len(taken(step).groups) for step in (2, 3, 4, 5)] == [2, 2, 0, 0]
    assert lag_of(taken(3).groups[0], 3) == 1 and taken(5).figures()["discarded"] == 2


def rows_of_the_table() -> Iterator[tuple[int, str]]:
    """Yield the number and the test of each row of docs/RL.md's table of traps."""
    section = (ROOT / "docs" / "RL.md").read_text().split("\n## Traps\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if number := re.match(r"\| (\d+) \|", line):
            for node in re.findall(r"`(tests/[^`]+)`", line):
                yield int(number[1]), node


def is_a_test(node: str) -> bool:
    """Say whether a node id (path::name, with or without [parameters]) names a function of that file."""
    path, _, name = node.partition("::")
    if not (ROOT / path).is_file():
        return False
    functions = {one.name for one in ast.parse((ROOT / path).read_text()).body if isinstance(one, ast.FunctionDef)}
    return name.startswith("test_") and name.partition("[")[0] in functions


def test_each_trap_of_the_table_names_tests_that_exist() -> None:
    rows = list(rows_of_the_table())
    assert {number for number, _ in rows} == set(range(1, 12))
    assert [node for _, node in rows if not is_a_test(node)] == []
    here = Path(__file__).relative_to(ROOT)
    wrong = (f"{here}::test_trap_99_nothing", "tests/unit/rl/test_nothing.py::test_trap_1", str(here), f"{here}::sample")
    assert not any(map(is_a_test, wrong)), "the check lets pass what is no test"
