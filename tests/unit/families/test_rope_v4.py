"""config.json as transformers 4 reads it: frequencies and attention factors that transformers 4.57.6's LlamaRotaryEmbedding computed.

The model has heads of 16 channels and 131,072 positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.families import rope_v4
from megatron_prism.models import rope

MODEL = ModelConfig(
    family="llama",
    num_layers=1,
    hidden_size=64,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=9,
    max_position_embeddings=131072,
    rotary_base=123.0,  # of the checkpoint's own: a v4 reader does not know it
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PLAIN = [1.0, 0.31622776, 0.1, 0.031622779, 0.0099999998, 0.0031622779, 0.001, 0.00031622779]
OF_5E5 = [1.0, 0.19392276, 0.037606031, 0.0072926651, 0.0014142134, 0.00027424819, 5.3182957e-05, 1.0313385e-05]
YARN_OF_1E6 = [1.0, 0.17782794, 0.031622779, 0.0042175599, 0.00050000002, 4.4456985e-05, 7.9056936e-06, 1.4058534e-06]
YARN_OF_131072 = [1.0, 0.17782794, 0.031622779, 0.0056234132, 0.00075000001, 8.8913963e-05, 7.9056936e-06, 1.4058534e-06]
FACTOR = 1.138629436
READ: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "rope_parameters alone are not read": ({"rope_parameters": {**YARN, "rope_theta": 1e6}}, PLAIN, 1.0),
    "rope_theta": ({"rope_theta": 5e5}, OF_5E5, 1.0),
    "and not rope_parameters": ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, OF_5E5, 1.0),
    "the base lost": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
        [1.0, 0.31622776, 0.1, 0.031622779, 0.0099999998, 0.0025693509, 0.00062500004, 0.00013834966],
        FACTOR,
    ),
    "yarn": ({"rope_scaling": YARN, "rope_theta": 1e6}, YARN_OF_1E6, FACTOR),
    "type over rope_type": ({"rope_scaling": {**YARN, "rope_type": "default", "type": "yarn"}, "rope_theta": 1e6}, YARN_OF_1E6, FACTOR),
    "yarn without the original positions": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
        YARN_OF_131072,
        FACTOR,
    ),
    "those beside are not read": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
        YARN_OF_131072,
        FACTOR,
    ),
    "yarn's options": (
        {"rope_scaling": {**YARN, "beta_fast": 16, "mscale": 0.7, "mscale_all_dim": 0.5}, "rope_theta": 1e6},
        [1.0, 0.17782794, 0.031622779, 0.0056234132, 0.00062500004, 4.4456985e-05, 7.9056936e-06, 1.4058534e-06],
        1.02592865,
    ),
    "llama3": (
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        [1.0, 0.19392276, 0.037606031, 0.0072926651, 0.00052484602, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06],
        1.0,
    ),
    "a base within is not read": (
        {"rope_scaling": {**LLAMA3, "rope_theta": 7e5}},
        [1.0, 0.31622776, 0.1, 0.031622779, 0.0099999998, 0.0031622779, 0.00021360758, 3.9528473e-05],
        1.0,
    ),
}


@pytest.mark.parametrize(("keys", "inverse", "factor"), READ.values(), ids=READ)
def test_frequencies_are_those_of_transformers_4(keys: dict[str, Any], inverse: list[float], factor: float) -> None:
    model, problems = rope_v4.read({"max_position_embeddings": 131072, **keys}, MODEL, "config")
    assert not problems
    torch.testing.assert_close(rope.inverse_frequencies(model), torch.tensor(inverse), rtol=3e-7, atol=0)
    assert rope.attention_factor(model) == pytest.approx(factor, rel=1e-8)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope_scaling": {key: value for key, value in LLAMA3.items() if not key.startswith("original")}}, "rope_scaling.original"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_scaling: found 'linear'"),
        ({"rope_theta": "5e5"}, "rope_theta: found '5e5'"),
    ],
)
def test_what_transformers_4_does_not_load_is_said(keys: dict[str, Any], named: str) -> None:
    _, (problem,) = rope_v4.read({"max_position_embeddings": 131072, **keys}, MODEL, "config")
    assert f"config:{named}" in str(problem)
