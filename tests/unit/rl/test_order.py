"""The order of prompts: each epoch draws every prompt once, a resumed run continues, and a draw can be found again."""

from __future__ import annotations

import hashlib

import pytest

from megatron_prism.rl.order import Order


@pytest.mark.parametrize("num_prompts", [1, 2, 7, 64, 1000])
def test_every_epoch_draws_each_prompt_once(num_prompts: int) -> None:
    order = Order(num_prompts, seed=3)
    for epoch in range(3):
        drawn = order.draw(epoch * num_prompts, num_prompts)
        assert {draw.epoch for draw in drawn} == {epoch}
        assert sorted(draw.prompt for draw in drawn) == list(range(num_prompts))


def test_a_resumed_run_draws_what_the_unbroken_one_draws() -> None:
    order = Order(50, seed=1)
    whole = order.draw(0, 170)
    parts, num_drawn = [], 0
    for count in (16, 16 + 5, 16, 1, 40, 61, 15):  # a refill of 5 in the second step
        parts += Order(50, seed=1).draw(num_drawn, count)
        num_drawn += count
    assert parts == whole


def test_a_draw_is_found_again() -> None:
    order = Order(37, seed=9)
    assert all(order.number(draw.epoch, draw.prompt) == draw.number for draw in order.draw(0, 150))


def test_seeds_and_epochs_differ() -> None:
    def indices(seed: int, epoch: int) -> list[int]:
        return [draw.prompt for draw in Order(100, seed).draw(100 * epoch, 100)]

    orders = [indices(seed, epoch) for seed in (0, 1, 10) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 6
    fixed = [sum(place == index for place, index in enumerate(order)) for order in orders]
    assert max(fixed) < 10  # about one place of a random permutation is fixed; the identity would have 100


def test_the_order_stays_the_same_on_every_machine() -> None:
    text = ",".join(str(draw.prompt) for draw in Order(1000, seed=1234).draw(0, 2500))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "286001ea781792d5"
