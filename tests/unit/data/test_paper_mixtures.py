"""configs/mixtures: the paper's sources and weights, planned without data at its budget."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_every_mixture_is_listed_here() -> None:
    assert {path.stem for path in MIXTURES.glob("*.yaml")} == set(EPOCHS)
