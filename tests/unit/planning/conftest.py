"""Full-size architectures that planning is tried on: the presets'."""

from __future__ import annotations

import pytest

from megatron_prism.core.config import ModelConfig


@pytest.fixture(scope="session")
def llama_8b(presets: dict[str, ModelConfig]) -> ModelConfig:
    return presets["llama-3.1-8b"]


@pytest.fixture(scope="session")
def nemotron_h_8b(presets: dict[str, ModelConfig]) -> ModelConfig:
    return presets["nemotron-h-8b"]
