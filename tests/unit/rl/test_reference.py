"""The reference: it begins as the policy, follows it by soft updates, and gives the policy's parameters back after each use."""

from __future__ import annotations

import pytest
import torch

from megatron_prism.core.config import ReferenceConfig
from megatron_prism.rl.reference import Reference


def chunk() -> torch.nn.Module:
    """Return a layer whose values are 1, and which a second module shares."""
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(first.weight)
    second.weight = first.weight  # as tied embeddings
    return torch.nn.Sequential(first, second)


def train(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        model[0].weight.fill_(value)  # type: ignore[index]


def value(model: torch.nn.Module) -> float:
    return float(model[0].weight.detach().mean())  # type: ignore[index]


def referred(reference: Reference, model: torch.nn.Module) -> float:
    with reference.in_place():
        return value(model)


def test_it_is_what_the_run_began_with_and_the_policy_comes_back() -> None:
    model = chunk()
    reference = Reference([model], ReferenceConfig())
    weight, data = model[0].weight, model[0].weight.data_ptr()
    train(model, 3.0)
    with reference.in_place():
        assert value(model) == 1.0 and float(model[1].weight.detach().mean()) == 1.0 and model[0].weight is weight
    assert value(model) == 3.0 and model[0].weight.data_ptr() == data  # the optimizer holds this memory


def test_the_policy_comes_back_after_an_error_too() -> None:
    model = chunk()
    reference = Reference([model], ReferenceConfig())
    train(model, 3.0)
    with pytest.raises(RuntimeError, match="inside"), reference.in_place():
        raise RuntimeError("inside")
    assert value(model) == 3.0 and referred(reference, model) == 1.0


def test_a_soft_update_is_alpha_of_the_policy() -> None:
    model = chunk()
    reference = Reference([model], ReferenceConfig(alpha=0.25, interval=1))
    expected = 1.0
    for step, policy in enumerate((3.0, 5.0, -1.0), start=1):
        train(model, policy)
        reference.update(step)
        expected = 0.25 * policy + 0.75 * expected
        assert referred(reference, model) == pytest.approx(expected) and value(model) == policy


@pytest.mark.parametrize(("interval", "moved"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_it_moves_every_interval_steps(interval: int, moved: list[int]) -> None:
    model = chunk()
    reference = Reference([model], ReferenceConfig(alpha=0.5, interval=interval))
    train(model, 3.0)
    steps = []
    for step in range(1, 5):
        before = referred(reference, model)
        reference.update(step)
        if referred(reference, model) != before:
            steps.append(step)
    assert steps == moved


def test_alpha_1_is_the_policy_and_alpha_0_the_start() -> None:
    for alpha, expected in ((1.0, 3.0), (0.0, 1.0)):
        model = chunk()
        reference = Reference([model], ReferenceConfig(alpha=alpha))
        train(model, 3.0)
        reference.update(1)
        assert referred(reference, model) == expected


def test_in_bf16_it_arrives_at_the_policy_and_does_not_leave_it() -> None:
    """At RL's learning rates a changed bf16 weight is one unit in the last place away. Two roundings would leave a quarter of them behind for ever."""
    model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.uniform_(model.weight, 0.5, 2.0)
    reference = Reference([model], ReferenceConfig())
    with torch.no_grad():
        model.weight[::2] += model.weight[::2] * 2**-7  # the other half stays
    policy = model.weight.detach().clone()
    for step in range(1, 20):
        reference.update(step)
    with reference.in_place():
        assert torch.equal(model.weight, policy)
