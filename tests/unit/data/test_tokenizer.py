from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from megatron_prism.core import log
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
        ({"config.json": {"eos_token_id": -1}, "generation_config.json": {"eos_token_id": [-1, 7]}}, 7),  # -1 stands for none
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
        ("generation_config.json", '{"eos_token_id": [2, true]}', "generation_config.json:eos_token_id: found True"),
        ("special_tokens_map.json", '{"eos_token": "<absent>"}', "special_tokens_map.json:eos_token: found '<absent>'"),
        (
            "tokenizer.json",
            '{"normalizer": {"type": "Precompiled"}, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "tokenizer.json",
        ),
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


@pytest.mark.parametrize(
    ("files", "ends", "said"),
    [
        ({}, (2,), ""),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [2]}}, (2,), ""),
        (
            {"config.json": {"eos_token_id": 7}, "special_tokens_map.json": {"eos_token": {"content": "<s>"}}},
            (2, 7, 1),
            "tokenizer_config.json 2 ('</s>'); config.json 7 ('%'); special_tokens_map.json 1 ('<s>'); a document gets EOS 2",
        ),
        ({"generation_config.json": {"eos_token_id": [2, 400]}}, (2, 400), ""),  # a row of a padded embedding
        (
            {"config.json": {"eos_token_id": 400}, "generation_config.json": {"eos_token_id": [2, 400]}},
            (2, 400),
            "tokenizer_config.json 2 ('</s>'); config.json 400 (None); generation_config.json 2 ('</s>'), 400 (None); a document gets EOS 2",
        ),
    ],
)
def test_end_tokens_are_all_that_the_files_name(
    folder: Path, caplog: pytest.LogCaptureFixture, files: dict, ends: tuple[int, ...], said: str
) -> None:
    """A line says so where they disagree, and none where they agree."""
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    spec = tokenizer.load(folder)
    assert (spec.end_ids, spec.eos_id) == (ends, 2)
    with caplog.at_level(logging.INFO, logger=log.NAME):
        tokenizer.log_ends(spec)
    assert [said in message and str(folder) in message for message in caplog.messages] == [True] * bool(said)


def test_real_tokenizer_adds_no_bos(shared_data: Path) -> None:
    spec = tokenizer.load(shared_data / "stories260k", need_eos=True)
    assert (spec.vocab_size, spec.eos_id) == (512, 2)
    assert rows(tokenizer.encode_documents(["Once upon a time"], spec, True)) == [[403, 407, 261, 378, 2]]


PROMPTS = ["2 + 2 =", " odd numbers, and more of them than eight tokens hold", "<s>spelled out</s>", "\n", "caf\u00e9 \U0001f680"]
Processor = dict[str, Any] | None


def post_processor(before: bool, behind: bool) -> Processor:
    """Return a post-processor in tokenizer.json's words, which puts BOS before a text, or EOS behind it."""
    bos, text, eos = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    )
    single = [*([bos] if before else []), text, *([eos] if behind else [])]
    tokens = {token: {"id": token, "ids": [token_id], "tokens": [token]} for token, token_id in (("<s>", 1), ("</s>", 2))}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


def with_processor(folder: Path, processor: Processor, **config: Any) -> Path:
    values = json.loads((folder / "tokenizer.json").read_text())
    padding = {
        "strategy": {"Fixed": 24},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    (folder / "tokenizer.json").write_text(json.dumps({**values, "post_processor": processor, "padding": padding}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    ("processor", "config", "begin"),
    [
        (None, {}, []),
        (None, {"add_bos_token": True}, []),
        (post_processor(True, False), {}, [1]),
        (post_processor(True, False), {"add_bos_token": False}, [1]),
    ],
    ids=["none", "add_bos_token alone", "bos", "bos against add_bos_token"],
)
def test_a_prompt_is_that_of_transformers(folder: Path, processor: Processor, config: dict[str, Any], begin: list[int]) -> None:
    """Also where tokenizer.json was saved with truncation and padding."""
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(with_processor(folder, processor, **config), local_files_only=True)
    spec = tokenizer.load(folder)
    for prompt in PROMPTS:
        ids = tokenizer.encode_prompt(prompt, spec)
        assert ids == oracle(prompt)["input_ids"]
        assert ids == [*begin, *tokenizer.encode_text(prompt, spec)]
        assert tokenizer.decode(ids, spec, skip_special=True) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode_prompt("", spec) == [1]


def test_a_prompt_does_not_end(folder: Path) -> None:
    """A post-processor that ends a text does so for documents that were to be trained on; EOS spelled out stays."""
    spec = tokenizer.load(with_processor(folder, post_processor(True, True)))
    text = tokenizer.encode_text("odd", spec)
    assert tokenizer.encode_prompt("odd", spec) == [1, *text]
    assert tokenizer.encode_prompt("odd</s>", spec) == [1, *text, 2]
    assert tokenizer.encode_prompt("", spec) == [1]


def test_an_empty_prompt_needs_bos(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="prompt: found an empty prompt; required some text, since the model names no begin-of-text"):
        tokenizer.encode_prompt("", tokenizer.load(folder))
    (folder / "config.json").write_text('{"bos_token_id": 7}')
    assert tokenizer.encode_prompt("", tokenizer.load(folder)) == [7]


def test_real_prompt_is_that_of_transformers(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    oracle, spec = (of(shared_data / "stories260k") for of in (AutoTokenizer.from_pretrained, tokenizer.load))
    for prompt in [*PROMPTS, "", "Once upon a time"]:
        ids = tokenizer.encode_prompt(prompt, spec)
        assert ids == oracle(prompt)["input_ids"] and ids[0] == 1


def test_a_continuation_reads_as_it_stands_behind_the_prompt(shared_data: Path, folder: Path) -> None:
    """A first word keeps its space, which a decoder of single texts strips; a character split over both is whole behind the prompt."""
    spec = tokenizer.load(shared_data / "stories260k")
    prompt, ids = [1, 403, 407, 261], [378, 2]
    assert tokenizer.continuation(prompt, ids, spec) == " time" != tokenizer.decode(ids, spec, skip_special=True)
    spec = tokenizer.load(folder)
    rocket = tokenizer.encode_text("\U0001f680", spec)
    assert len(rocket) == 4 and tokenizer.continuation([1], rocket, spec) == "\U0001f680"
    ended = replace(spec, ends=(("an ordinary token", (rocket[0],)),))
    assert tokenizer.continuation([1], [*tokenizer.encode_text("a", spec), rocket[0]], ended) == "a"


@pytest.mark.parametrize("special", [False, True])
def test_a_continuation_has_its_thinking_tags(folder: Path, tmp_path: Path, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them a grader would find no format in any response of a tokenizer that has them as special tokens."""
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tags = [AddedToken(tag, special=special) for tag in ("<think>", "</think>")]
    (made.add_special_tokens if special else made.add_tokens)(tags)
    shutil.copytree(folder, tmp_path / "tags")
    made.save(str(tmp_path / "tags" / "tokenizer.json"))
    spec = tokenizer.load(tmp_path / "tags")
    text = "<think>1 + 1\U0001f680</think> 2"
    ids = [1, *tokenizer.encode_text(text, spec)]  # a BOS in between, which is left out
    assert tokenizer.continuation(tokenizer.encode_text("What?", spec), ids, spec) == text

    # a policy that repeats a tag does not stop the step
    many, decode, decoded = tokenizer.encode_text(text * 300, spec), tokenizer.decode, list[int]()
    monkeypatch.setattr(tokenizer, "decode", lambda ids, *given, **named: decoded.append(len(ids)) or decode(ids, *given, **named))
    assert tokenizer.continuation([5], many, spec) == text * 300
    assert sum(decoded) < 100 * len(many)


def test_tokens_beyond_an_embedding_are_named(folder: Path) -> None:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    added = Tokenizer.from_file(str(path))
    added.add_special_tokens(["[PAD]"])
    added.save(str(path))
    assert tokenizer.check_vocabulary(path, 385) == []
    assert "found token id 384 '[PAD]'; required ids below the model's vocab_size 384; remove these added tokens, or resize" in str(
        tokenizer.check_vocabulary(path, 384)[0]
    )
    assert "and 1 more; required ids below the model's vocab_size 381; the tokenizer and the model do not belong together" in str(
        tokenizer.check_vocabulary(path, 381)[0]
    )
