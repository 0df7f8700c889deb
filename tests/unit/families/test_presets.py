"""The presets of configs/models: each reads, and has exactly its model's parameters."""

from __future__ import annotations

from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.config import ModelConfig
from megatron_prism.families import registry

Presets = dict[str, ModelConfig]


def test_every_preset_has_its_number(presets: Presets, preset_parameters: dict[str, int]) -> None:
    assert presets.keys() == preset_parameters.keys()


def test_parameters_are_exact(presets: Presets, preset_parameters: dict[str, int], preset_name: str) -> None:
    model = presets[preset_name]
    assert check_architecture(model) == []
    assert registry.num_parameters(model) == preset_parameters[preset_name]


def test_what_a_family_writes_it_reads_back(presets: Presets, preset_name: str) -> None:
    model = presets[preset_name]
    written = registry.of_model(model).write_config(model)
    assert registry.of_hf(written, "config").read_config(written, "config") == model
