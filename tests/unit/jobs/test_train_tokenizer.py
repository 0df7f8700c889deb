"""What a training run asks of its tokenizer (that of its data, with a row of the embedding for each token) and of its held-out data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prism.core.config import ModelConfig, TrainConfig, ValidationConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build, to_dict
from megatron_prism.data import mixture
from megatron_prism.jobs import train

MODEL = ModelConfig(
    family="llama",
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=384,
    max_position_embeddings=32,
)


def config(vocab_size: int, tokenizer: Path, prepared: Path, run_dir: Path) -> TrainConfig:
    values = {
        "run_dir": str(run_dir),
        "init": {"tokenizer": str(tokenizer)},
        "model": {**to_dict(MODEL), "vocab_size": vocab_size},
        "data": {"prepared": str(prepared), "seq_length": 16},
        "batch": {"global_size": 2, "micro_size": 1},
        "steps": 2,
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
        "precision": "fp32",
    }
    return build(values, TrainConfig, str)


def test_the_tokenizer_is_that_of_the_data_and_the_model_has_its_tokens(tiny_mixture: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """One that does not fit is told apart: too few rows by the tokens without one, another tokenizer as such."""
    train.resolve(config(384, tiny_tokenizer, tiny_mixture, tmp_path), 1)
    with pytest.raises(
        InputError, match=r"tokenizer.json: found token id 382 '.*', 383 '.*'; required ids below the model's vocab_size 382"
    ):
        train.resolve(config(382, tiny_tokenizer, tiny_mixture, tmp_path), 1)
    other = Path(shutil.copytree(tiny_tokenizer, tmp_path / "other"))
    (other / "tokenizer.json").write_text(json.dumps(json.loads((other / "tokenizer.json").read_text())))
    with pytest.raises(InputError, match="found data tokenized by another tokenizer"):
        train.resolve(config(384, other, tiny_mixture, tmp_path), 1)
    with pytest.raises(InputError, match="found data of a tokenizer with 384 ids; required at most the model's vocab_size 382"):
        train.resolve(config(382, other, tiny_mixture, tmp_path), 1)


def test_a_run_that_validates_nothing_says_so(
    tiny_mixture: Path, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = replace(config(384, tiny_tokenizer, tiny_mixture, tmp_path), validation=ValidationConfig(interval=1))
    train.resolve(asked, 1)
    assert "holds nothing out" not in caplog.text
    read = mixture.read_prepared(tiny_mixture)
    bare = replace(read, sources=tuple(replace(source, valid=None) for source in read.sources))
    monkeypatch.setattr(mixture, "read_prepared", lambda path: bare)
    train.resolve(replace(asked, validation=ValidationConfig()), 1)
    assert "holds nothing out" not in caplog.text, "only at the start and the end: the default"
    train.resolve(asked, 1)
    assert f"validation.interval is 1, and {tiny_mixture} holds nothing out" in caplog.text
