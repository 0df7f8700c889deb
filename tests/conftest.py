"""What the tests share: the data beside the repository, and a tokenizer small enough to make at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-examples", type=int, help="examples of a fuzz test, drawn anew each time (tools/soak.py)")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of test data beside the repository; without it skip, or fail under PRISM_REQUIRE_SHARED."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        absent = f"shared/data is absent: {folder}"
        if os.environ.get("PRISM_REQUIRE_SHARED"):
            pytest.fail(absent)
        pytest.skip(absent)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face tokenizer folder: byte-level BPE of 384 tokens, `<unk>` 0, `<s>` 1, `</s>` 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    text = [f"The sum of {a} and {b} is {a + b}, their product {a * b}; return {a} + {b}\n" for a in range(30) for b in range(30)]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
