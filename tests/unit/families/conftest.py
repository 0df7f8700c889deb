"""The keys that a dense family's config.json needs."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def needed() -> dict[str, Any]:
    """Return the keys without which no dense family reads a config.json."""
    return {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 256,
    }
