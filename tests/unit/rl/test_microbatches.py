"""Samples as microbatches: what stands in a row, on which rank, and back again."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from megatron_prism.generate.engine import ids_of, logprobs_of
from megatron_prism.rl import batches
from megatron_prism.rl.batches import Plan, Shape
from megatron_prism.rl.sample import Sample

SHAPES = {
    "packed": Shape(seq_length=24, micro_size=2),
    "plain": Shape(seq_length=24, micro_size=2, is_packed=False),
    "padded": Shape(seq_length=23, micro_size=1, token_multiple=8, microbatch_multiple=4),
}


def samples(number: int) -> list[Sample]:
    """Return samples whose tokens are all distinct, each with a prompt of 1 to 9 tokens and 1 to 15 sampled ones."""
    lot, made, token = random.Random(number), [], 1
    for index in range(number):
        prompt, response = lot.randint(1, 9), lot.randint(1, 15)
        ids = tuple(range(token, token + prompt + response))
        token += len(ids)
        log_probs = logprobs_of(-float(one) for one in ids[prompt:])
        known = {"prompt_id": f"p{index}", "sample": 0, "domain": "math", "ended": "end_token", "weights_step": 0, "outcome": "right"}
        made.append(Sample(**known, prompt_tokens=ids[:prompt], token_ids=ids_of(ids[prompt:]), logprobs=log_probs, reward=1.0))  # type: ignore[arg-type]
    return made


def all_of(plan: Plan, of: list[Sample], dp: int) -> list[list[dict[str, torch.Tensor]]]:
    advantages = [float(index + 1) for index in range(len(of))]
    old = {"old_log_probs": [torch.tensor(sample.logprobs) - 0.5 for sample in of]}
    return [batches.microbatches(plan, rank, of, advantages, old) for rank in range(dp)]


@pytest.mark.parametrize("dp", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_every_sampled_token_is_trained_on_once(name: str, dp: int) -> None:
    shape, of = SHAPES[name], samples(17)
    plan = batches.plan(of, shape, dp)
    ranks = all_of(plan, of, dp)
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) % shape.microbatch_multiple == 0
    assert {tuple(tensor.shape) for rank in ranks for each in rank for tensor in each.values()} == {(shape.micro_size, 24)}
    seen = []
    for each in (each for rank in ranks for each in rank):
        mask = each["loss_mask"] > 0
        assert ("document_ids" in each) == shape.is_packed
        for label, log_prob, old, advantage, share, name_of, position, token in zip(
            *(
                each[key][mask].tolist()
                for key in (
                    "labels",
                    "sampler_log_probs",
                    "old_log_probs",
                    "advantages",
                    "sequence_shares",
                    "sequence_ids",
                    "position_ids",
                    "tokens",
                )
            ),
            strict=True,
        ):
            (index,) = [index for index, sample in enumerate(of) if label in sample.token_ids]
            sample = of[index]
            assert token == label - 1 and log_prob == -label and old == log_prob - 0.5 and advantage == index + 1
            assert share == pytest.approx(1 / len(sample.token_ids)) and 0 <= name_of < each["tokens"].numel()
            assert position == token - sample.prompt_tokens[0], "positions begin with the prompt"
            seen.append((label, index, name_of))
        for key in ("advantages", "sampler_log_probs", "old_log_probs", "sequence_shares"):
            assert not each[key][~mask].any()
        names = {(index, name_of) for label, index, name_of in seen if label in each["labels"][mask]}
        assert len({index for index, _ in names}) == len({name_of for _, name_of in names}) == len(names), "one name a response"
    assert sorted(label for label, _, _ in seen) == sorted(token for sample in of for token in sample.token_ids)


def test_a_rank_looks_at_no_other_ranks_samples() -> None:
    of = samples(17)
    plan = batches.plan(of, SHAPES["packed"], 3)
    for rank, whole in enumerate(all_of(plan, of, 3)):
        mine = {place.sample for place in plan.places[rank]}
        others = [one if index in mine else replace(one, logprobs="?" * len(one.logprobs)) for index, one in enumerate(of)]  # type: ignore[arg-type]
        again = batches.microbatches(plan, rank, others, [float(index + 1) for index in range(len(of))], {})
        assert all(each[name].equal(one[name]) for each, one in zip(again, whole, strict=True) for name in each)


def test_a_packed_row_is_its_samples_as_documents() -> None:
    of = samples(3)[:2]
    plan = batches.plan(of, Shape(seq_length=40), 1)
    ((each,),) = all_of(plan, of, 1)
    ids = each["document_ids"][0]
    sizes = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    longest_first = sorted(of, key=lambda sample: -len(sample.prompt_tokens) - len(sample.token_ids))
    lengths = [len(sample.prompt_tokens) + len(sample.token_ids) - 1 for sample in longest_first]
    assert sizes == [*lengths, 40 - sum(lengths)]
    assert each["position_ids"][0].tolist() == [position for size in sizes for position in range(size)]
    whole = each["tokens"][0].split(sizes)
    for document, sample in zip(whole, longest_first, strict=False):
        assert document.tolist() == [*sample.prompt_tokens, *sample.token_ids][:-1]
    assert not whole[-1].any() and not each["loss_mask"][0, sum(lengths) :].any()


def test_packing_takes_fewer_rows_and_depends_on_lengths_alone() -> None:
    of = samples(40)
    packed, plain = (batches.plan(of, SHAPES[name], 2) for name in ("packed", "plain"))
    assert packed == batches.plan(of, SHAPES["packed"], 2) and packed.num_rows < 0.8 * plain.num_rows
    assert packed != batches.plan(of[::-1], SHAPES["packed"], 2)


def test_ranks_without_samples_have_weight_0() -> None:
    for number in (0, 1):
        of = samples(number)
        ranks = all_of(batches.plan(of, SHAPES["padded"], 3), of, 3)
        assert [sum(float(each["loss_mask"].sum()) for each in rank) for rank in ranks] == [len(of[0].token_ids) if of else 0, 0, 0]
        assert [len(rank) for rank in ranks] == [4, 4, 4]


@pytest.mark.parametrize("name", SHAPES)
def test_values_of_tokens_come_back_to_their_samples(name: str) -> None:
    of = samples(17)
    plan = batches.plan(of, SHAPES[name], 2)
    back = {}
    for rank, each in enumerate(all_of(plan, of, 2)):
        back |= batches.by_sample(plan, rank, [-microbatch["labels"].float() for microbatch in each])
    assert sorted(back) == list(range(17))
    assert all(back[index].tolist() == list(sample.logprobs) for index, sample in enumerate(of))
    off_by_one = batches.by_sample(plan, 0, [-microbatch["tokens"].float() for microbatch in all_of(plan, of, 2)[0]])
    assert all(values.tolist() != list(of[index].logprobs) for index, values in off_by_one.items())


def test_a_sample_that_is_too_long_is_refused() -> None:
    of = samples(17)
    longest = max(len(sample.prompt_tokens) + len(sample.token_ids) - 1 for sample in of)
    batches.plan(of, Shape(seq_length=longest), 1)
    for multiple in (1, longest + 1):  # a row's padding is no room: packing would cut the sample in two
        with pytest.raises(ValueError, match=f"a sample takes {longest} tokens"):
            batches.plan(of, Shape(seq_length=longest - 1, token_multiple=multiple), 1)
