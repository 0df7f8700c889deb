"""The cached engine against transformers on every family: greedy tokens, log-probabilities, layouts, batch sizes; and negative controls.

transformers is asked once for a whole continuation (its forward pass over prompt and continuation): a token is greedy where it is the
likeliest after the tokens before it, so continuations agree token for token where each of their tokens does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from . import generate_worker
from .tiny import FAMILIES

LOGPROB = 1e-5  # fp32: the largest difference from transformers' own
SEEN = 5 * LOGPROB  # and what a fault moves it by, at least
TIE = 2e-5  # two logits as near as that are equally likely
LENGTHS = [1, 75, 36, 23, 2, 18, 5, 33]  # shorter and longer than a window (16), a Mamba chunk (32), a prefill's forward pass (72)
BF16 = 0.02  # the mean difference from training's forward pass: both round, at different places
IN_BF16 = ("llama", "mistral", "granite_h_micro", "nemotron_h")
RECOMPUTED = ("llama", "nemotron_h")
HYBRIDS = ("granite_h_micro", "nemotron_h")
LAYOUTS: dict[str, dict[str, Any]] = {  # on four ranks
    "dp4": {},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp4": {"pp": 4},  # Nemotron-H's five layers: uneven stages, some without attention
}
SPLITS = [
    (family, layout)
    for layout in LAYOUTS
    for family in FAMILIES
    if (family == "nemotron_h" if layout == "pp4" else family != "granite_h_micro" or layout in ("dp4", "pp2"))
]  # granite_h_micro has one group of heads: tp 1
LONG = {("llama", "dp4"), ("nemotron_h", "tp2_sp"), ("nemotron_h", "pp2"), ("llama", "tp2_pp2")}  # 200 tokens also on a layout
GREEDY, DRAWN = {"max_tokens": 200}, {"max_tokens": 24, "temperature": 0.8, "end_ids": [7, 11, 90, 200]}
LIMITS = {"num_rows": 6, "prefill_tokens": 72}
CONTROLS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # the families that a fault touches, and a wrong value of the architecture
    "positions one off": (("llama", "granite"), {}),
    "keys not turned": (("llama",), {}),
    "states in bf16": (HYBRIDS, {}),
    "time passes in padding": (HYBRIDS, {}),
    "a token not copied": (("llama", "nemotron_h"), {}),
    "no window": (("mistral",), {"window_size": None}),
    "window off by one": (("mistral",), {"window_size": 17}),
    "no softmax scale": (("granite", "granite_h_micro"), {"attention_multiplier": None}),
    "no residual multiplier": (("granite_micro", "granite_h_micro"), {"residual_multiplier": 1.0}),
    "no embedding multiplier": (("granite",), {"embedding_multiplier": 1.0}),
    "no logits scaling": (("granite",), {"logits_scaling": 1.0}),
}
CONTROLLED = [(control, family) for control, (families, _) in CONTROLS.items() for family in families]
Row = tuple[int, list[int], list[float], str]  # prompt, tokens, log-probabilities, why it ended


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def cases_of(folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the cases by layout, those of a model next to each other."""

    def case(name: str, family: str, **more: Any) -> dict[str, Any]:
        plain = {
            "precision": "fp32",
            "engine": "cached",
            "limits": LIMITS,
            "replace": {},
            "control": None,
            "prompts": prompts(),
            "num_samples": 1,
        }
        return {"name": f"{family} {name}", "family": family, "ckpt": str(folders[family] / "ckpt"), **plain, **more}

    alone: list[dict[str, Any]] = []
    for family in FAMILIES:
        alone.append(case("greedy", family, sampling=GREEDY))
        alone.append(case("drawn", family, sampling=DRAWN, num_samples=2))
        alone.append(case("drawn one by one", family, sampling=DRAWN, num_samples=2, limits={"num_rows": 1, "prefill_tokens": 16}))
        alone += [
            case(control, family, sampling={"max_tokens": 24, "temperature": 1.0}, control=None if replace else control, replace=replace)
            for control, (families, replace) in CONTROLS.items()
            if family in families
        ]
        if family in RECOMPUTED:
            alone.append(case("drawn by oneDNN", family, sampling=DRAWN, num_samples=2, control="every product by oneDNN"))
            short = {"sampling": {**DRAWN, "max_tokens": 8, "top_p": 0.9}, "num_samples": 2, "prompts": prompts()[2:5]}
            alone += [case("nucleus", family, **short), case("nucleus by recompute", family, engine="recompute", limits={}, **short)]
    alone += [case("bf16", family, precision="bf16", sampling={"max_tokens": 32, "temperature": 1.0}) for family in IN_BF16]
    by_layout: dict[str, list[dict[str, Any]]] = {"alone": alone} | {layout: [] for layout in LAYOUTS}
    for family, layout in SPLITS:
        greedy = {"max_tokens": 200 if (family, layout) in LONG else 24}
        drawn = case("drawn", family, sampling=DRAWN, num_samples=2, prompts=prompts()[:4])
        by_layout[layout] += [case("greedy", family, sampling=greedy), drawn]
    return by_layout


@pytest.fixture(scope="module")
def results_on(run_distributed: Callable[..., list[Any]], folders: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    """Return a function that gives what the ranks of a layout found, by case: four of them, or one alone."""
    cases = cases_of(folders)

    @cache
    def run(layout: str) -> dict[str, Any]:
        parallel = {**LAYOUTS.get(layout, {}), "distributed_optimizer": False}
        num_ranks = 1 if layout == "alone" else 4
        return run_distributed(generate_worker.run, num_ranks, timeout_s=300, parallel=parallel, layout=parallel, cases=cases[layout])[0]

    return run


@pytest.fixture(scope="module")
def results(results_on: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return results_on("alone")


@lru_cache(maxsize=1)
def oracle(hf: Path) -> Any:
    from megatron_prism.checkpoint import reference

    return reference.load(hf, torch.float32)


@cache
def full_pass(hf: Path, prompt: int, tokens: tuple[int, ...], temperature: float) -> tuple[torch.Tensor, float]:
    """Return transformers' log-probability of each token of a continuation, and how much likelier than it another one is, at most."""
    text = prompts()[prompt]
    with torch.no_grad():
        logits_TV = oracle(hf)(torch.tensor([[*text, *tokens]])).logits[0, len(text) - 1 : -1]
    chosen_T1 = torch.tensor(tokens)[:, None]
    behind = (logits_TV.amax(-1) - logits_TV.gather(1, chosen_T1)[:, 0]).max().item()
    return (logits_TV / temperature).log_softmax(-1).gather(1, chosen_T1)[:, 0], behind


def worst(hf: Path, rows: list[Row], temperature: float) -> float:
    """Return the largest difference between the engine's log-probabilities and those of transformers."""
    return max(
        (full_pass(hf, prompt, tuple(tokens), temperature)[0] - torch.tensor(logprobs)).abs().max().item()
        for prompt, tokens, logprobs, _ in rows
    )


def tokens_of(rows: list[Row]) -> list[list[int]]:
    return [row[1] for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(results: dict[str, Any], folders: dict[str, Path], family: str) -> None:
    """200 tokens after ragged prompts; and once its own generate(), which keeps a cache too."""
    rows, hf = results[f"{family} greedy"], folders[family] / "hf"
    assert [len(row[1]) for row in rows] == [200] * len(LENGTHS) and {row[3] for row in rows} == {"max_tokens"}
    assert max(full_pass(hf, row[0], tuple(row[1]), 1.0)[1] for row in rows) <= TIE
    assert worst(hf, rows, 1.0) <= LOGPROB
    text = torch.tensor([prompts()[2]])
    own = oracle(hf).generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=999
    )
    assert own[0, text.shape[1] :].tolist() == rows[2][1][:40]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_full_forward_pass(results: dict[str, Any], folders: dict[str, Path], family: str) -> None:
    """At temperature 0.8: of the logits divided by it. Some rows end early, and others take their place."""
    rows = results[f"{family} drawn"]
    assert worst(folders[family] / "hf", rows, 0.8) <= LOGPROB
    assert {row[3] for row in rows} == {"end_token", "max_tokens"}
    assert all((row[1][-1] in DRAWN["end_ids"]) == (row[3] == "end_token") for row in rows)
    assert not any(token in DRAWN["end_ids"] for row in rows for token in row[1][:-1])
    assert len({tuple(tokens) for tokens in tokens_of(rows)}) == len(rows)  # the samples of a prompt differ


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_at_a_time_draws_the_same(results: dict[str, Any], family: str) -> None:
    """Batches of one, prefills of 16 tokens."""
    assert tokens_of(results[f"{family} drawn one by one"]) == tokens_of(results[f"{family} drawn"])


@pytest.mark.parametrize("family", RECOMPUTED)
def test_large_products_draw_the_same(results: dict[str, Any], folders: dict[str, Path], family: str) -> None:
    rows = results[f"{family} drawn by oneDNN"]
    assert tokens_of(rows) == tokens_of(results[f"{family} drawn"]) and worst(folders[family] / "hf", rows, 0.8) <= LOGPROB


@pytest.mark.parametrize("family", RECOMPUTED)
def test_recomputing_the_whole_text_draws_the_same(results: dict[str, Any], family: str) -> None:
    ours, oracles = results[f"{family} nucleus"], results[f"{family} nucleus by recompute"]
    assert tokens_of(ours) == tokens_of(oracles)
    assert all(abs(a - b) <= LOGPROB for mine, other in zip(ours, oracles, strict=True) for a, b in zip(mine[2], other[2], strict=True))


@pytest.mark.parametrize("family", IN_BF16)
def test_bf16_is_near_training_in_bf16(results: dict[str, Any], family: str) -> None:
    differences = [abs(a - b) for row in results[f"{family} bf16"] for a, b in zip(row[2], row[4], strict=True)]
    assert 0 < sum(differences) / len(differences) <= BF16


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), SPLITS)
def test_a_layout_finds_the_same(
    results: dict[str, Any], results_on: Callable[[str], dict[str, Any]], folders: dict[str, Path], family: str, layout: str
) -> None:
    """Four ranks: what the layout leaves of them shares out the prompts, and every rank has all rollouts."""
    alone, split = results[f"{family} greedy"], results_on(layout)[f"{family} greedy"]
    assert all(mine[1] == other[1][: len(mine[1])] for mine, other in zip(split, alone, strict=True))
    drawn = results_on(layout)[f"{family} drawn"]
    assert tokens_of(drawn) == tokens_of(results[f"{family} drawn"])[: len(drawn)]
    assert worst(folders[family] / "hf", drawn, 0.8) <= LOGPROB


@pytest.mark.parametrize(("control", "family"), CONTROLLED)
def test_control_is_seen(results: dict[str, Any], folders: dict[str, Path], control: str, family: str) -> None:
    assert worst(folders[family] / "hf", results[f"{family} {control}"], 1.0) > SEEN


@pytest.mark.parametrize("layout", ["alone", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("dp4", "tp2_sp"))])
@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_training_goes_on_with_the_same_bits(results_on: Callable[[str], dict[str, Any]], family: str, layout: str) -> None:
    without, generated = results_on(layout)[f"{family} training"]
    assert without == generated and without[0] != without[1]


def test_what_it_cannot_serve_is_refused(results: dict[str, Any]) -> None:
    assert "parallel.overlap_param_gather: found weights that arrive" in results["refused"]["late"]
    assert "decoder.layers.0.gate: found a parameter that generation does not know" in results["refused"]["unknown"]


@pytest.mark.slow
def test_ranks_that_ask_for_different_things_are_refused(results_on: Callable[[str], dict[str, Any]]) -> None:
    assert "generate(): found other arguments on another rank" in results_on("tp2_sp")["refused"]["ranks"]
