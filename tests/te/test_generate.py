"""The embedded engine reads Transformer Engine's layers as Megatron's own: the same tokens, dense and hybrid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DENSE: dict[str, Any] = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "init_method_std": 0.3,
}
MIXER = {"num_heads": 8, "head_dim": 8, "state_dim": 16, "num_groups": 2, "chunk_size": 16}
HYBRID = {**DENSE, "family": "nemotron_h", "num_layers": 4, "layer_pattern": "M-*-", "activation": "relu2", "position_embedding": "none"}
MODELS = {"dense": DENSE, "with biases": {**DENSE, "family": "qwen2", "qkv_bias": True}, "hybrid": {**HYBRID, "mamba": MIXER}}


def test_the_engine_samples_the_same_tokens_from_either_layers(tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text(json.dumps(MODELS))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    command = [sys.executable, str(HERE / "generate_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "tokens.json").read_text())
    for name in MODELS:
        assert found[name]["te"] == found[name]["local"] and len(set(map(tuple, found[name]["te"]["tokens"]))) == 4, name
