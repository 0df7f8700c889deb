"""Small files for the rooms data and prepare: a tokenizer that truncates, and a corpus of two sources."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import PrepareConfig, SourceConfig

WORDS = ("the", "sum", "of", "two", "odd", "numbers", "is", "even", "and", "a", "prime", "above", "so", "their", "product", "stays")


def sentence(index: int) -> str:
    """Return a text of its own for each index."""
    return f"{index}: " + " ".join(WORDS[(index * step) % len(WORDS)] for step in range(1, 12 + index % 7))


@pytest.fixture(scope="session")
def tokenizer_folder(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny tokenizer saved with truncation, as some published ones are: it must not cut training text."""
    from tokenizers import Tokenizer

    folder = Path(shutil.copytree(tiny_tokenizer, tmp_path_factory.mktemp("cut") / "tokenizer"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a folder with qa.jsonl (60 records) and prose.txt (20 paragraphs)."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    records = [json.dumps({"question": sentence(index), "answer": index, "meta": {"x": 1}}) for index in range(60)]
    (folder / "qa.jsonl").write_text("\n".join(records) + "\n")
    (folder / "prose.txt").write_text("\n \n\n".join(sentence(index) + "\n" + sentence(index + 1) for index in range(100, 120)))
    return folder


@pytest.fixture
def make_config(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> Callable[..., PrepareConfig]:
    """Return a function from changes (`qa`, `prose`: of a source) to a config of the corpus."""

    def make(qa: dict[str, Any] | None = None, prose: dict[str, Any] | None = None, **changes: Any) -> PrepareConfig:
        first = {"name": "qa", "path": (str(corpus / "qa.jsonl"),), "weight": 70.0, "text": "{question}\n{answer}"}
        second = {"name": "prose", "path": (str(corpus / "prose.txt"),), "weight": 30.0, "split": "paragraph"}
        sources = (SourceConfig(**(first | (qa or {}))), SourceConfig(**(second | (prose or {}))))
        return PrepareConfig(**{"out": tmp_path / "out", "tokenizer": tokenizer_folder, "sources": sources, "num_workers": 1, **changes})

    return make
