"""The 128k step in small, from the command line: a Mistral with a window trains on with yarn and without the window, and is exported and verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

LENGTH = 256  # twice the positions of the checkpoint


def prism(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_prism.cli", *map(str, arguments)], capture_output=True, text=True, timeout=600)


def test_a_run_that_extends_its_model(mistral_checkpoint: Path, tiny_mixture: Path, tmp_path: Path) -> None:
    config = {
        "run_dir": str(tmp_path / "run"),
        "steps": 2,
        "precision": "fp32",
        "init": {
            "checkpoint": str(mistral_checkpoint),
            "max_position_embeddings": LENGTH,
            "yarn": {"factor": 16.0, "original_max_position_embeddings": 16},
            "window_size": LENGTH,
        },
        "data": {"prepared": str(tiny_mixture), "seq_length": LENGTH, "document_mask": True},
        "batch": {"global_size": 2},
        "schedule": {"kind": "exponential", "final_factor": 0.0},
        "logits_chunk_tokens": 64,
    }
    (tmp_path / "longctx.yaml").write_text(yaml.safe_dump(config))
    refused = prism("train", tmp_path / "longctx.yaml", "init.yarn.factor=8.0", "--dry-run")
    assert refused.returncode == 2 and "init.yarn.factor: found 8 x original_max_position_embeddings 16" in refused.stderr
    trained = prism("train", tmp_path / "longctx.yaml")
    assert trained.returncode == 0, trained.stderr[-4000:]
    exported = prism("convert", "export", "--ckpt", tmp_path / "run", "--out", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr[-4000:]
    asked = ("--hf", tmp_path / "hf", "--ckpt", tmp_path / "run", "--tokens", LENGTH - 8, "--json", tmp_path / "found.json")
    verified = prism("convert", "verify", *asked)
    assert verified.returncode == 0, verified.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_tokens"] == LENGTH - 8 and found["rotary_transformers"] == "same" == found["rotary_v4_reading"]
    again = prism("convert", "import", "--hf", tmp_path / "hf", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr[-4000:]
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert said["sliding_window"] is None and said["max_position_embeddings"] == LENGTH and "attention_factor" not in said["rope_scaling"]
