from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.data import tokenize
from megatron_prism.data.sources import Document

DOCUMENTS = [Document(f"document {index}: odd numbers " * (1 + index % 5), "valid" if index % 4 == 0 else "train") for index in range(200)]


def rows(encoded: list[tokenize.Encoded], split: str) -> list[list[int]]:
    return [row.tolist() for part in encoded if part.split == split for row in np.split(part.tokens, np.cumsum(part.lengths)[:-1])]


def test_documents_keep_order_text_and_end(tokenizer_folder: Path) -> None:
    from tokenizers import Tokenizer

    spec = tokenize.load(tokenizer_folder, need_eos=True)
    assert (spec.vocab_size, spec.eos_id) == (384, 2)
    encoded = list(tokenize.encode(DOCUMENTS, spec, True, 1))
    decode = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).decode
    for split in ("train", "valid"):
        found = rows(encoded, split)
        assert all(row[-1] == 2 and row.count(2) == 1 for row in found)
        assert [decode(row) for row in found] == [document.text for document in DOCUMENTS if document.split == split]
    assert all(part.tokens.dtype == np.uint16 for part in encoded)
    bare = list(tokenize.encode(DOCUMENTS, spec, False, 1))
    assert rows(bare, "train") == [row[:-1] for row in rows(encoded, "train")]


def test_result_is_that_of_any_number_of_workers_and_batch(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tokenize.load(tokenizer_folder, need_eos=True)
    one = list(tokenize.encode(DOCUMENTS, spec, True, 1))
    monkeypatch.setattr(tokenize, "BATCH_CHARS", 200)
    many = list(tokenize.encode(DOCUMENTS, spec, True, 3))
    assert len(many) > 20 > len(one)
    for split in ("train", "valid"):
        assert rows(one, split) == rows(many, split)


def test_memory_is_bounded_by_the_workers(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "BATCH_CHARS", 1)
    num_read = 0

    def documents():
        nonlocal num_read
        while num_read < 100:
            num_read += 1
            yield Document("odd", "train")

    stream = tokenize.encode(documents(), tokenize.load(tokenizer_folder, need_eos=True), True, 1)
    next(stream)
    assert num_read == 1
    num_read = 0
    stream = tokenize.encode(documents(), tokenize.load(tokenizer_folder, need_eos=True), True, 2)
    next(stream)
    assert num_read == 5
    stream.close()


class Killer:
    """Ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (9,)


def test_dead_worker_is_an_environment_fault() -> None:
    with pytest.raises(EnvironmentFault, match="a tokenizer process died"):
        list(tokenize.encode(DOCUMENTS, Killer(), True, 2))


def test_reader_error_ends_the_workers(tokenizer_folder: Path) -> None:
    def documents():
        yield Document("odd " * 200_000, "train")
        raise InputError([])

    with pytest.raises(InputError):
        list(tokenize.encode(documents(), tokenize.load(tokenizer_folder, need_eos=True), True, 2))


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
    assert tokenize.load(folder, need_eos=True).eos_id == eos_id


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
        tokenize.load(folder, need_eos=True)
    assert found in str(caught.value)


def test_eos_may_be_absent_where_none_is_appended(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert tokenize.load(folder, need_eos=False).eos_id is None


def test_real_tokenizer_adds_no_bos(shared_data: Path) -> None:
    spec = tokenize.load(shared_data / "stories260k", need_eos=True)
    assert (spec.vocab_size, spec.eos_id) == (512, 2)
    encoded = list(tokenize.encode([Document("Once upon a time", "train")], spec, True, 1))
    assert rows(encoded, "train") == [[403, 407, 261, 378, 2]]


ENDLESS = """
import itertools, sys
from pathlib import Path
from megatron_prism.data import tokenize
from megatron_prism.data.sources import Document

if __name__ == "__main__":
    spec = tokenize.load(Path(sys.argv[1]), need_eos=True)
    for part in tokenize.encode((Document("odd " * 9999, "train") for _ in itertools.count()), spec, True, 2):
        print("ready", flush=True)
"""


def test_workers_end_with_a_killed_parent(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "endless.py"), str(tokenizer_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.communicate(timeout=30)  # returns once the last worker has closed its copy of the pipe
