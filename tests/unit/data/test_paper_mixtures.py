"""configs/mixtures: the paper's sources and weights, planned without data at its budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prism.core.check_data import check_prepare
from megatron_prism.core.config import PrepareConfig
from megatron_prism.core.load import load
from megatron_prism.jobs import prepare

MIXTURES = Path(__file__).resolve().parents[3] / "configs" / "mixtures"
EPOCHS = {  # the paper's Table 1 at 26.21 billion tokens
    "math": {"megamath_web_pro": 0.98, "mot_math": 4.37, "nemotron_pt_v1_math": 0.07, "chat": 2.88, "dclm_edu": 0.04},
    "math_code": {"megamath_web_pro": 0.49, "mot_math": 4.37, "nemotron_pt_v1_math": 0.07, "chat": 1.44, "dclm_edu": 0.01, "starcoder2": 0.01,
                  "refinecode": 0.02, "opencodereasoning_2": 2.34, "mot_code": 1.11},
    "math_code_science": {"megamath_web_pro": 0.36, "mot_math": 3.06, "nemotron_pt_v1_math": 0.07, "chat": 1.44, "dclm_edu": 0.01,
                          "starcoder2": 0.01, "refinecode": 0.02, "opencodereasoning_2": 2.34, "mot_code": 0.67, "openthoughts3_science": 2.78,
                          "mot_science": 2.96},
}  # fmt: skip


@pytest.mark.parametrize("name", EPOCHS)
def test_a_papers_mixture_is_planned_without_data(name: str) -> None:
    plan = prepare.run(load(MIXTURES / f"{name}.yaml", PrepareConfig), dry_run=True)
    assert {part["name"]: round(part["epochs"], 2) for part in plan["sources"]} == EPOCHS[name]
    assert sum(part["tokens"] for part in plan["sources"]) == 25_000 * 128 * 8192
    assert all(part["share"] * 100 == pytest.approx(part["weight"], abs=1e-6) for part in plan["sources"])


def test_what_is_said_of_a_source_is_checked_and_changes_no_result() -> None:
    config = load(MIXTURES / "math.yaml", PrepareConfig)
    first, *others = config.sources
    said = replace(config, sources=(replace(first, hf_id="another", available_tokens=7), *others))
    other = replace(config, sources=(replace(first, text="{body}"), *others))
    assert prepare._config_sha256(said) == prepare._config_sha256(config) != prepare._config_sha256(other)
    problems = check_prepare(replace(config, sources=(replace(first, available_tokens=0), *others)))
    assert [problem.where for problem in problems] == ["sources.0.available_tokens"]


def test_every_mixture_is_listed_here() -> None:
    assert {path.stem for path in MIXTURES.glob("*.yaml")} == set(EPOCHS)
