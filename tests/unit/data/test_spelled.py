"""No special id comes of a document's text, whatever the tokenizer, unless it is asked for; ordinary vocabulary stays."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_prism.core import log
from megatron_prism.core.errors import InputError
from megatron_prism.data import indexed, mixture, spelled, tokenizer
from megatron_prism.jobs import prepare

TEXTS = [
    "<s>",
    "a page on <s> and </s><s>",
    " <end> of\n<end>",
    "<norm> ",
    "<unk>",
    "say <tool> twice: <tool>",
    "nothing of the kind",
    "<",
    "",
]
SPELLED = [1, 3, 2, 1, 1, 0, 0, 0, 0]


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Return a tokenizer whose EOS `<end>` is marked as ordinary, with an ordinary `<tool>` and a special `<norm>` that is normalized."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["a page on this and that, and that and this"] * 4, trainer)
    made.add_tokens([AddedToken("<tool>", special=False), AddedToken("<end>", special=False, normalized=False)])
    made.add_special_tokens([AddedToken("<norm>", special=True, normalized=True)])
    return made


def unigram() -> Tokenizer:
    """Return a tokenizer whose model takes the spelling of `</s>` for the token, as T5's does."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<end>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in "<>/aegno")]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>", "<end>"])
    return made


def folder_of(made: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return folder


def rows(texts: list[str], spec: tokenizer.TokenizerSpec, in_text: tokenizer.InText) -> list[list[int]]:
    tokens, lengths = tokenizer.encode_documents(texts, spec, False, in_text)
    return [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]


def spelled_by(tokens: list[str]) -> re.Pattern[str]:
    made = Tokenizer(models.BPE())
    made.add_special_tokens(tokens)
    any_of = spelled.encode_as_text(made, []).any_of
    assert any_of is not None
    return any_of


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_a_spelled_special_token_is_text_and_an_ordinary_added_token_is_itself(tmp_path: Path, backend: tokenizer.Backend) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    made = byte_level()
    spec = tokenizer.load(folder_of(made, tmp_path / "t"), True, backend)
    special = {made.token_to_id(token) for token in ("<s>", "</s>", "<end>", "<norm>", "<unk>")}
    found = rows(TEXTS, spec, "text")
    assert not special & {token for row in found for token in row}
    assert [made.decode(row, skip_special_tokens=False) for row in found] == TEXTS
    assert found[5].count(made.token_to_id("<tool>")) == 2
    assert tokenizer.num_spelled(TEXTS, spec).tolist() == SPELLED
    ids = rows(TEXTS, spec, "ids")
    assert [sum(token in special for token in row) for row in ids] == SPELLED
    assert ids == [made.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert ids[5:] == found[5:]  # texts that spell none: the same bytes as ever
    assert [bool(tokenizer.not_allowed(spec, "error").search(text)) for text in TEXTS] == [count > 0 for count in SPELLED]
    assert tokenizer.not_allowed(spec, "text") is tokenizer.not_allowed(spec, "ids") is None
    assert tokenizer.encode_text("<s>", spec) == [made.token_to_id("<s>")]  # a rendered chat means its special tokens


def test_a_spelling_that_a_normalizer_makes_is_text(tmp_path: Path) -> None:
    made = byte_level(normalizers.NFC())
    made.add_special_tokens([AddedToken("<\u00e9>", special=True, normalized=True)])
    spec = tokenizer.load(folder_of(made, tmp_path / "t"), True)
    (row,), (as_id,) = (rows(["<e\u0301>"], spec, in_text) for in_text in ("text", "ids"))
    assert len(row) > 1 and len(as_id) == 1 and tokenizer.decode(row, spec) == "<\u00e9>"


def test_a_token_that_the_model_itself_gives_is_no_text(tmp_path: Path) -> None:
    """The record is a bad one; where it was not looked for, encoding ends rather than give the id."""
    spec = tokenizer.load(folder_of(unigram(), tmp_path / "t"), True)
    not_allowed = tokenizer.not_allowed(spec, "text")
    assert not_allowed is not None and [bool(not_allowed.search(text)) for text in ("a</s>", "<end>", "<unk>", "a")] == [
        True,
        True,
        False,
        False,
    ]
    assert 0 in rows(["zzz"], spec, "text")[0]  # the unknown token is what ordinary text gives
    with pytest.raises(InputError, match=r"special_tokens_in_text: found special token 1 \('</s>'\) of the text 'a</s>'; .* set it to ids"):
        rows(["no", "a</s>"], spec, "text")
    assert 1 in rows(["a</s>"], spec, "ids")[0]


def test_the_longest_of_many_tokens_is_found_in_little_time(tmp_path: Path) -> None:
    made = byte_level()
    made.add_special_tokens([*(f"<SPECIAL_{number}>" for number in range(1000)), "<SPECIAL_", "[x]", "a.b", "<SPECIAL_7>!"])
    spec = tokenizer.load(folder_of(made, tmp_path / "t"), True)
    not_allowed = tokenizer.not_allowed(spec, "error")
    assert not_allowed is not None
    found = not_allowed.findall("<SPECIAL_77> <SPECIAL_7>! <SPECIAL_7> <SPECIAL_x> <SPECIAL_1000> axb a.b [x] <tool> <s>")
    assert found == ["<SPECIAL_77>", "<SPECIAL_7>!", "<SPECIAL_7>", "<SPECIAL_", "<SPECIAL_", "a.b", "[x]", "<s>"]
    long, nested = "<" + "x" * 5000 + ">", ["y" * length for length in range(1, 600)]
    assert spelled_by([long, *nested]).findall(f"{long} {'y' * 700}") == [long, "y" * 599, "y" * 101]
    began = time.process_time()
    assert tokenizer.num_spelled(["<div> x < y " * 300_000], spec).tolist() == [0]
    assert time.process_time() - began < 0.5  # with one branch a token: 1 s


@pytest.mark.parametrize(
    ("in_text", "counts", "documents"), [("text", {"texts": 2, "tokens": 3}, 4), ("ids", {"texts": 2, "tokens": 3}, 4), ("error", None, 0)]
)
def test_a_mixture_counts_and_tells_of_them(
    make_config: Callable, corpus: Path, caplog: pytest.LogCaptureFixture, in_text: str, counts: dict, documents: int
) -> None:
    texts = ["one </s> and <s>", "two <s>", "two <s>", "three", "four"]  # dedup leaves one of the equal ones
    (corpus / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = make_config(
        qa={"path": (str(corpus / "web.jsonl"),), "text": "{text}", "dedup": "exact"}, special_tokens_in_text=in_text, append_eos=False
    )
    if in_text == "error":
        with pytest.raises(
            InputError, match=r"web.jsonl:1: found the special token '</s>' in the text; .*special_tokens_in_text"
        ) as caught:
            prepare.run(config)
        assert [problem.where.rpartition(":")[2] for problem in caught.value.problems] == ["1", "2", "3"]
        skipped = prepare.run(make_config(qa=config_of(corpus), special_tokens_in_text="error", on_bad_record="skip"))["sources"][0]
        assert (skipped["bad_records"], skipped["train_documents"], skipped["special_tokens_in_text"]["texts"]) == (3, 2, 0)
        return
    with caplog.at_level(logging.WARNING, logger=log.NAME):
        result = prepare.run(config)["sources"][0]
    assert result["special_tokens_in_text"] == counts and result["train_documents"] == documents
    assert f"source qa: 2 texts spell 3 special tokens (special_tokens_in_text: {in_text})" in caplog.messages
    assert result["shards"][0]["special_tokens_in_text"] == counts
    reader = indexed.Reader(mixture.read_prepared(config.out).source("qa").train.prefixes)
    assert np.isin(reader.tokens(0, reader.num_tokens), (1, 2)).sum() == (3 if in_text == "ids" else 0)
    with pytest.raises(InputError, match="another config"):
        prepare.run(make_config(qa=config_of(corpus), special_tokens_in_text={"text": "ids", "ids": "text"}[in_text], append_eos=False))


def config_of(corpus: Path) -> dict:
    return {"path": (str(corpus / "web.jsonl"),), "text": "{text}", "dedup": "exact"}


def test_a_sample_counts_no_text_that_is_not_allowed(make_config: Callable, corpus: Path) -> None:
    from megatron_prism.core.config import SampleConfig

    (corpus / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two <s>", "three")))
    qa = {"path": (str(corpus / "web.jsonl"),), "text": "{text}"}
    config = make_config(qa=qa | {"sample": SampleConfig(counts={"all": 2})}, special_tokens_in_text="error", on_bad_record="skip")
    assert prepare.run(config)["sources"][0]["train_documents"] == 2
