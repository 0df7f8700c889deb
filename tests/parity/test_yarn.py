"""yarn on every family with rotary positions, beyond the original positions: logits, gradients, packed documents, the cached engine.

Negative controls leave out the attention factor, or all of yarn, and must be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import generate_worker
from .test_families import DOCUMENTS, GRADIENT, GRADIENT_SPLIT, LOGITS, LOSS, SEQ_LENGTH
from .tiny import SIZES, random_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WITHOUT_FACTOR = {"yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.0}}
HYBRID = {"position_embedding_type": "rope"}  # Granite-4.0-H's class may have rotary positions, and Megatron-Core's MambaModel has no yarn
FAMILIES: dict[str, dict[str, Any]] = {name: {} for name in ("llama", "mistral", "mistral_small", "granite", "granite_micro", "qwen2")} | {
    "granite_h_micro": HYBRID
}
SPLIT = ("llama", "mistral", "granite")
LOGPROB = 1e-5


@pytest.fixture(scope="module")
def yarns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return, by family, a folder with hf/ and ckpt/ of a model with yarn."""
    from megatron_prism.jobs import convert

    roots = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, root in roots.items():
        random_model(name, rope_parameters=YARN, max_position_embeddings=128, **FAMILIES[name]).save_pretrained(root / "hf")
        convert.run_import(root / "hf", root / "ckpt", dry_run=False)
    return roots


@pytest.fixture(scope="module")
def case(yarns: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    tokens = [(7 * index * index + 3) % SIZES["vocab_size"] for index in range(SEQ_LENGTH)]

    def make(name: str, family: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "hf": str(yarns[family] / "hf"), "ckpt": str(yarns[family] / "ckpt"), "tokens": tokens, **more}

    return make


@pytest.fixture(scope="module")
def results(compare: Callable, case: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = [case(name, name) for name in FAMILIES]
    cases += [case(f"{name} packed", name, documents=DOCUMENTS) for name in ("llama", "granite_h_micro")]
    cases += [case(f"{name} without the factor", name, replace=WITHOUT_FACTOR) for name in FAMILIES]
    cases += [case("llama without yarn", "llama", replace={"yarn": None})]
    cases += [case("llama packed without the factor", "llama", documents=DOCUMENTS, replace=WITHOUT_FACTOR)]
    return compare(tmp_path_factory.mktemp("yarn"), cases)


@pytest.mark.parametrize("name", [*FAMILIES, "llama packed", "granite_h_micro packed"])
def test_logits_and_gradients_are_those_of_transformers(results: dict[str, dict[str, Any]], name: str) -> None:
    """The documents are up to 41 tokens long, the original positions 32."""
    assert results[name]["logits"] <= LOGITS and results[name]["loss"] <= LOSS
    assert results[name]["gradient"] <= GRADIENT, results[name]["parameter"]


@pytest.mark.parametrize(
    "name", [*(f"{name} without the factor" for name in FAMILIES), "llama without yarn", "llama packed without the factor"]
)
def test_what_is_left_out_is_seen(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["logits"] > 20 * LOGITS  # Granite divides its logits by 16
    assert results[name]["gradient"] > 100 * GRADIENT


@pytest.mark.slow
def test_on_two_tensor_parallel_ranks(compare: Callable, case: Callable, tmp_path_factory: pytest.TempPathFactory) -> None:
    layout = {"tp": 2, "sequence_parallel": True}
    found = compare(tmp_path_factory.mktemp("gang"), [case(family, family, parallel=layout) for family in SPLIT], 2)
    for family in SPLIT:
        assert found[family]["logits"] <= LOGITS
        assert found[family]["gradient"] <= GRADIENT_SPLIT, found[family]["parameter"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_cached_engine_generates_what_the_training_forward_pass_does(
    run_distributed: Callable[..., list[Any]], yarns: dict[str, Path], family: str
) -> None:
    """Prompts and continuations cross the 32 original positions; a cache without the factor is seen."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (1, 30, 75)]
    shared = {"family": family, "ckpt": str(yarns[family] / "ckpt"), "precision": "fp32", "prompts": prompts, "num_samples": 1}
    shared |= {"sampling": {"max_tokens": 40}, "replace": {}, "control": None, "engine": "cached", "limits": {}}
    cases = [{**shared, "name": "cached", "limits": {"num_rows": 2, "prefill_tokens": 16}}]
    cases += [{**shared, "name": "recompute", "engine": "recompute"}, {**shared, "name": "without", "replace": WITHOUT_FACTOR}]
    (found,) = run_distributed(generate_worker.run, 1, layout={}, cases=cases)
    cached, recomputed, without = (found[name] for name in ("cached", "recompute", "without"))
    assert [row[1] for row in cached] == [row[1] for row in recomputed] and all(len(row[1]) == 40 for row in cached)
    assert distance(cached, recomputed) <= LOGPROB < 100 * LOGPROB < distance(without, recomputed)


def distance(some: list[Any], others: list[Any]) -> float:
    """Return the largest difference of the first tokens' log-probabilities, before which a control's continuation cannot part."""
    return max(abs(some_row[2][0] - other_row[2][0]) for some_row, other_row in zip(some, others, strict=True))
