from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_prism.core.errors import InputError
from megatron_prism.data import tokenizer

TEXTS = [f"document {index}: odd numbers " * (1 + index % 5) for index in range(200)]


def rows(encoded: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    tokens, lengths = encoded
    return [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_documents_keep_order_text_and_end(tokenizer_folder: Path) -> None:
    spec = tokenizer.load(tokenizer_folder, need_eos=True)
    assert (spec.vocab_size, spec.eos_id) == (384, 2)
    found = rows(tokenizer.encode_documents(TEXTS, spec, True))
    assert all(row[-1] == 2 and row.count(2) == 1 for row in found)
    assert [tokenizer.decode(np.array(row), spec) for row in found] == [f"{text}</s>" for text in TEXTS]
    assert tokenizer.encode_documents(TEXTS, spec, True)[0].dtype == np.uint16
    assert rows(tokenizer.encode_documents(TEXTS, spec, False)) == [row[:-1] for row in found]


def test_a_text_without_a_token_gets_no_end(tokenizer_folder: Path) -> None:
    spec = tokenizer.load(tokenizer_folder, need_eos=True)
    assert rows(tokenizer.encode_documents(["", "odd", ""], spec, True)) == [
        [],
        rows(tokenizer.encode_documents(["odd"], spec, True))[0],
        [],
    ]
    assert [part.size for part in tokenizer.encode_documents([], spec, True)] == [0, 0]


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("files", "eos_id"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, 2),
        ({"config.json": {"eos_token_id": 7}}, 7),
        ({"generation_config.json": {"eos_token_id": [8, 9]}}, 8),
        ({"tokenizer_config.json": {"eos_token": "</s>"}, "config.json": {"eos_token_id": 7}}, 2),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 0}}, 0),
    ],
)
def test_eos_is_found(folder: Path, files: dict, eos_id: int) -> None:
    (folder / "tokenizer_config.json").unlink()
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    assert tokenizer.load(folder, need_eos=True).eos_id == eos_id


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("tokenizer_config.json", "{}", "no EOS token"),
        ("tokenizer_config.json", "{", "no JSON"),
        ("tokenizer_config.json", "[]", "JSON list"),
        ("tokenizer_config.json", '{"eos_token": "<absent>"}', "'<absent>'"),
        ("tokenizer_config.json", '{"eos_token_id": 384}', "EOS id 384"),
        ("tokenizer_config.json", '{"eos_token_id": "1"}', "'1'"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", None, "tokenizer.json"),
    ],
)
def test_wrong_tokenizer_is_refused(folder: Path, name: str, content: str | None, found: str) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        tokenizer.load(folder, need_eos=True)
    assert found in str(caught.value)


def test_eos_may_be_absent_where_none_is_appended(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert tokenizer.load(folder, need_eos=False).eos_id is None


def test_real_tokenizer_adds_no_bos(shared_data: Path) -> None:
    spec = tokenizer.load(shared_data / "stories260k", need_eos=True)
    assert (spec.vocab_size, spec.eos_id) == (512, 2)
    assert rows(tokenizer.encode_documents(["Once upon a time"], spec, True)) == [[403, 407, 261, 378, 2]]
