"""The presets of configs/models: each reads, and has exactly its model's parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prism.core.check import check_architecture
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.load import build, merge, read_layers
from megatron_prism.families import find

MODELS = Path(__file__).resolve().parents[3] / "configs" / "models"
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-small-24b": 23_572_403_200,
    "granite-3.3-8b": 8_170_864_640,
    "granite-4.0-micro": 3_402_836_480,
    "granite-4.0-h-micro": 3_191_396_096,
    "nemotron-h-8b": 8_100_852_736,
}


def preset(name: str) -> ModelConfig:
    return build(merge(read_layers(MODELS / f"{name}.yaml", ()))["model"], ModelConfig, str)


def test_every_preset_is_listed_here() -> None:
    assert {path.stem for path in MODELS.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name: str) -> None:
    model = preset(name)
    assert check_architecture(model) == []
    assert find.num_parameters(model) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_a_family_writes_it_reads_back(name: str) -> None:
    model = preset(name)
    written = find.of_model(model).write_config(model)
    assert find.of_hf(written, "config").read_config(written, "config") == model
