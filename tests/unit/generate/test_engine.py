"""What generate() is asked for: bad arguments are named, all at once; seeds; what a layout cannot have."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from megatron_prism.generate.cached import Cached, unsupported
from megatron_prism.generate.engine import Sampling, problems, seed_of


def said(prompts: list[list[int]], num_samples: int = 1, num_seeds: int | None = None, **sampling: float) -> str:
    seeds = [0] * (len(prompts) if num_seeds is None else num_seeds)
    how = Sampling(**{"max_tokens": 4, **sampling})  # type: ignore[arg-type]
    return "\n".join(map(str, problems(prompts, num_samples, how, seeds, vocab_size=10, max_context=6)))


def test_good_arguments_are_let_pass() -> None:
    assert said([[1], [9] * 5], 3, temperature=0.5, top_p=0.0, top_k=1) == said([]) == ""


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens: found 0"),
        ({"temperature": -1.0}, "sampling.temperature: found -1.0"),
        ({"temperature": float("nan")}, "sampling.temperature: found nan"),
        ({"top_p": 1.5}, "sampling.top_p: found 1.5"),
        ({"top_k": 0}, "sampling.top_k: found 0"),
    ],
)
def test_a_bad_setting_is_named(sampling: dict[str, float], name: str) -> None:
    assert name in said([[1]], **sampling)


def test_bad_prompts_are_named_and_counted() -> None:
    text = said([[], [1] * 6, [3, 10], [-1, 4]], num_samples=0, num_seeds=1)
    for part in ("num_samples: found 0", "seeds: found 1 seeds; required one for each of 4", "prompts[0]: found 0 tokens"):
        assert part in text
    assert "prompts[1]: found 6 tokens; required 1 to 5" in text and "prompts[2]: found token ids 3 to 10; required 0 to 9" in text
    assert "prompts[3]: found token ids -1 to 4" in text
    assert "prompts: found 12 problems more" in said([[]] * 20)


def test_a_seed_is_of_all_its_numbers() -> None:
    seeds = [seed_of(*numbers) for numbers in itertools.product(range(5), range(5))] + [seed_of(0), seed_of(1), seed_of(12), seed_of(1, 2)]
    assert len(set(seeds)) == len(seeds) - 1 and seed_of(1, 2) == seed_of(1, 2) and all(0 <= seed < 2**63 for seed in seeds)


def test_what_a_layout_cannot_have() -> None:
    assert unsupported(None, 1, False) == []
    assert [problem.where for problem in unsupported(2, 2, True)] == ["parallel.vpp", "parallel.cp", "fp8"]


@pytest.mark.parametrize(("cache_tokens", "longest", "num_rows"), [(None, 50, 64), (400, 50, 8), (400, 1, 64), (400, 9000, 4), (30, 50, 1)])
def test_rows_that_a_cache_has_no_room_for_wait(cache_tokens: int | None, longest: int, num_rows: int) -> None:
    """A row grows to the model's 100 positions at most, and one row there always is."""
    chunk, groups = SimpleNamespace(config=SimpleNamespace(fp8=None)), SimpleNamespace(vpp=None, cp=1)
    engine = Cached([chunk], SimpleNamespace(max_position_embeddings=100), groups)  # type: ignore[arg-type]
    assert engine.within(cache_tokens, longest).num_rows == num_rows
