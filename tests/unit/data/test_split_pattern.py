"""Mistral Small's tokenizer.json with LLaMA 3's split pattern is announced; its own repair, and other models', are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.data import split_pattern, tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as published
)
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+"


def write(root: Path, pattern: str, model_type: str | None, size: int, version: str = "4.49.0", nested: bool = True) -> Path:
    """Write a folder with a byte-level tokenizer of some size, by which a text is split as `pattern` says."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"<SPECIAL_{number}>" for number in range(size - len(alphabet)))]
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = (
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]) if nested else split
    )
    made.decoder = decoders.ByteLevel()
    made.save(str(root / "tokenizer.json"))
    config: dict[str, Any] = {"transformers_version": version} | ({} if model_type is None else {"model_type": model_type})
    (root / "config.json").write_text(json.dumps(config))
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return root


@pytest.mark.parametrize(
    ("wrong", "pattern", "model_type", "size", "more"),
    [
        (True, LLAMA3, "mistral", 100_352, {}),
        (True, LLAMA3, "mistral3", 131_072, {"nested": False}),
        (True, LLAMA3, "mistral", 131_072, {"version": "5.1.0"}),  # saved again by a newer version, and not mended
        (False, TEKKEN, "mistral", 131_072, {}),
        (False, LLAMA3, "llama", 128_256, {}),
        (False, LLAMA3, None, 131_072, {}),
        (False, LLAMA3, "mistral", 32_768, {}),
    ],
)
def test_the_pattern_known_to_be_wrong_is_named(
    tmp_path: Path, wrong: bool, pattern: str, model_type: str | None, size: int, more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    root = write(tmp_path, pattern, model_type, size, **more)
    said = split_pattern.fault(root)
    assert (said is not None) == wrong
    with caplog.at_level("WARNING", logger="megatron_prism"):
        tokenizer.log_ends(tokenizer.load(root))
    assert said is None or said in caplog.text


def test_the_way_out_that_is_named_mends_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    root = write(tmp_path, LLAMA3, "mistral", 100_352)
    assert "fix_mistral_regex=True" in str(split_pattern.fault(root))
    AutoTokenizer.from_pretrained(root, fix_mistral_regex=True).save_pretrained(root)
    assert split_pattern.fault(root) is None
