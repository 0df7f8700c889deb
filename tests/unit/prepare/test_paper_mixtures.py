"""configs/mixtures: the paper's sources and weights, planned without data at its budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prism.core.check.data import check_prepare
from megatron_prism.core.config import KeepConfig, PrepareConfig, SampleConfig
from megatron_prism.core.load import load
from megatron_prism.jobs import prepare

MIXTURES = Path(__file__).resolve().parents[3] / "configs" / "mixtures"
EPOCHS = {  # the paper's Table 1 at 26.21 billion tokens
    "math": {"megamath_web_pro": 0.98, "mot_math": 4.37, "nemotron_pt_v1_math": 0.07, "chat": 2.88, "dclm_edu": 0.04},
    "math_code": {
        "megamath_web_pro": 0.49,
        "mot_math": 4.37,
        "nemotron_pt_v1_math": 0.07,
        "chat": 1.44,
        "dclm_edu": 0.01,
        "starcoder2": 0.01,
        "refinecode": 0.02,
        "opencodereasoning_2": 2.34,
        "mot_code": 1.11,
    },
    "math_code_science": {
        "megamath_web_pro": 0.36,
        "mot_math": 3.06,
        "nemotron_pt_v1_math": 0.07,
        "chat": 1.44,
        "dclm_edu": 0.01,
        "starcoder2": 0.01,
        "refinecode": 0.02,
        "opencodereasoning_2": 2.34,
        "mot_code": 0.67,
        "openthoughts3_science": 2.78,
        "mot_science": 2.96,
    },
    "longctx": {
        "megamath_web_pro": 0.24,
        "nemotron_pt_v1_math": 0.24,
        "starcoder2": 0.05,
        "xenarcai_codex": 0.05,
        "dclm_edu": 0.19,
    },  # ours
}
DOMAINS = {  # the rings of the paper's project page, in percent
    "math": {"math": 75, "general": 25},
    "math_code": {"math": 47.5, "code": 42.5, "general": 10},
    "math_code_science": {"math": 37, "code": 40.5, "science": 12.5, "general": 10},
    "longctx": {"math": 47.5, "code": 42.5, "general": 10},  # ours
}


@pytest.mark.parametrize("name", EPOCHS)
def test_a_papers_mixture_is_planned_without_data(name: str) -> None:
    plan = prepare.run(load(MIXTURES / f"{name}.yaml", PrepareConfig), dry_run=True)
    assert {part["name"]: round(part["epochs"], 2) for part in plan["sources"]} == EPOCHS[name]
    assert sum(part["tokens"] for part in plan["sources"]) == (1_000 * 36 * 131_072 if name == "longctx" else 25_000 * 128 * 8192)
    assert all(part["share"] * 100 == pytest.approx(part["weight"], abs=1e-6) for part in plan["sources"])


def test_what_is_said_of_a_source_is_checked() -> None:
    config = load(MIXTURES / "math.yaml", PrepareConfig)
    first, *others = config.sources
    problems = check_prepare(replace(config, sources=(replace(first, available_tokens=0), *others)))
    assert [problem.where for problem in problems] == ["sources.0.available_tokens"]


@pytest.mark.parametrize("name", DOMAINS)
def test_domains_are_those_of_the_papers_rings(name: str) -> None:
    found: Counter[str] = Counter()
    for source in load(MIXTURES / f"{name}.yaml", PrepareConfig).sources:
        assert source.domain
        found[source.domain] += source.weight
    assert found == DOMAINS[name]


def test_the_papers_preprocessing_stands_in_the_sources() -> None:
    """Section 3.1, step by step."""
    by_name = {source.name: source for name in EPOCHS for source in load(MIXTURES / f"{name}.yaml", PrepareConfig).sources}
    assert len(by_name) == 12  # the eleven of Table 1, and the long-context mixture's own
    assert by_name["dclm_edu"].keep == (KeepConfig(field="edu_int_score", at_least=3),)
    reasoning = by_name["opencodereasoning_2"].parts
    assert len(reasoning) == 2 and all(part.sample == SampleConfig(counts={"all": 60_000}) for part in reasoning)
    right = (KeepConfig(field="judgement", equals="right"), KeepConfig(field="pass_rate", not_equals=-1))
    assert all(part.keep == right and part.text.count("\n") == 1 for part in reasoning)
    wild, *others = by_name["chat"].parts
    assert wild.keep == (KeepConfig(field="model", starts_with="gpt-4"),) and not any(part.keep for part in others)
    assert all(part.turns and part.turns.prefix for part in by_name["chat"].parts)
    for name in ("mot_math", "mot_code", "mot_science", "openthoughts3_science", "nemotron_pt_v1_math"):
        assert by_name[name].turns and not by_name[name].turns.prefix and by_name[name].dedup != "none"
    for name in EPOCHS:
        assert not prepare._check_parts(config := load(MIXTURES / f"{name}.yaml", PrepareConfig)) and config.decontaminate


def test_every_mixture_is_listed_here() -> None:
    assert {path.stem for path in MIXTURES.glob("*.yaml")} == set(EPOCHS)
