"""Which of Megatron-Core's layers end those of Hugging Face: the paper's layer axes, 0 to 40 and 0 to 52."""

from __future__ import annotations

import pytest

from megatron_prism.core.config import ModelConfig
from megatron_prism.models import hidden


@pytest.mark.parametrize(
    ("name", "num_layers", "each"),
    [
        ("granite-3.3-8b", 40, 1),
        ("llama-3.1-8b", 32, 1),
        ("nemotron-h-8b", 52, 1),
        ("granite-4.0-micro", 40, 1),
        ("granite-4.0-h-micro", 40, 2),
    ],
)
def test_a_layer_of_granite_h_is_two_of_megatrons(name: str, num_layers: int, each: int, presets: dict[str, ModelConfig]) -> None:
    assert hidden.layer_ends(presets[name]) == [each * layer for layer in range(1, num_layers + 1)]
