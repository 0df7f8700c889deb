"""gigatoken gives the ids of tokenizers, whatever the text, for the kinds of tokenizer that it reads; the others are refused."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_prism.core.errors import BackendMissing, InputError
from megatron_prism.data import fast_tokenizer, tokenizer
from megatron_prism.jobs import prepare

pytest.importorskip("gigatoken")
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    f"The sum of {a} and {b} isn't {a * b}; caf\u00e9 {'WORD' * (a % 3)}\n\n\tdef f(x_{a}):\r\n    return x//{b}"
    for a in range(30)
    for b in range(30)
]
PIECES = [
    "\u0301",
    "e\u0301",
    "\U0001f469\u200d\U0001f680",
    "\u05e9\u05dc",
    "\r\n",
    "\n",
    "   ",
    "\t",
    "\x00",
    "\u00a0",
    "\u3000",
    "\u200b",
    "0",
    "12345",
    "'s",
    "'LL",
    "\u2019s",
    "abc",
    "ABC",
    " the",
    "x" * 300,
    "<s>",
    "</s>",
    "\u4e2d\u6587",
    "\u0e20\u0e32",
    "\u216b",
    "\u00bd",
    "_",
    "//",
    "\ufffd",
    "\u2581",
    "\u01c5",
    "\u02b0",
    "\u212b",
    "\uac00",
    "\u1100\u1161",
    " ",
    "a",
]
MARKS = ["\u036f\u1ac3", "a\u0345\u0c3c", "\u07fd\u0334 e\u1acd\u0301"]  # put in another order by NFC: two tables of combining classes
NEWER = "\u088f't \U00010945't"  # letters of a Unicode version that one of the two knows and the other does not


def hostile(count: int) -> list[str]:
    draw = random.Random(0)

    def piece() -> str:
        ranges = ((0x20, 0x250), (0x250, 0xD7FF), (0x10000, 0x1FFFF))
        return draw.choice(PIECES) if draw.random() < 0.9 else chr(draw.randrange(*draw.choice(ranges)))

    return ["".join(piece() for _ in range(draw.randrange(1, 25))) for _ in range(count)]


def byte_level(split: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def digits() -> Tokenizer:
    tokenizer = byte_level(LLAMA3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bytes_of = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_of], show_progress=False)
    )
    values = json.loads(tokenizer.to_str())
    values["pre_tokenizer"] = None
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in bytes_of]
    return Tokenizer.from_str(json.dumps(values))


KINDS = {
    "llama-3": lambda: byte_level(LLAMA3),
    "qwen2": lambda: byte_level(LLAMA3.replace("{1,3}", ""), normalizers.NFC()),
    "tekken": lambda: byte_level(TEKKEN),
    "mistral-7b": byte_fallback,
}


def folder_of(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def encoded(folder: Path, texts: list[str], backend: tokenizer.Backend) -> list[list[int]]:
    spec = tokenizer.load(folder, True, backend)
    return [tokenizer.encode_documents([text], spec, append_eos=True)[0].tolist() for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers(kind: str, tmp_path: Path) -> None:
    folder, texts = folder_of(KINDS[kind](), tmp_path / "t"), [*hostile(1500), *TEXTS[:50], *MARKS, NEWER, ""]
    assert encoded(folder, texts, "gigatoken") == encoded(folder, texts, "tokenizers")
    spec = tokenizer.load(folder, True, "gigatoken")
    together = [tokenizer.encode_documents(TEXTS, one, append_eos=True) for one in (spec, tokenizer.load(folder, True))]
    assert all(np.array_equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(*together, strict=True))


def test_what_the_two_take_for_different_is_left_to_tokenizers(tmp_path: Path) -> None:
    folder = folder_of(byte_level(LLAMA3), tmp_path / "t")
    fast, apart = fast_tokenizer.load(folder / "tokenizer.json"), fast_tokenizer.apart("z")
    assert fast_tokenizer.has_any(NEWER, apart) and fast_tokenizer.has_any("\u00e9z", apart)
    assert not fast_tokenizer.has_any("\u00e9 plain \U0001f680", apart) and apart.sum() < 980_000
    if fast_tokenizer.encode(fast, [NEWER])[0].tolist() == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(NEWER).ids:
        pytest.skip("the tables of the two agree by now: nothing is left to guard")


def test_prepared_bytes_are_the_same(make_config: Callable) -> None:
    configs = [make_config(tokenizer_backend=name, out=make_config().out.with_name(name)) for name in ("tokenizers", "gigatoken")]
    for config in configs:
        folder = config.out.with_name(f"{config.out.name}_tokenizer")
        folder_of(byte_level(LLAMA3), folder)
    one, two = (
        [
            source["shards"]
            for source in prepare.run(
                make_config(
                    tokenizer_backend=config.tokenizer_backend, out=config.out, tokenizer=config.out.with_name("tokenizers_tokenizer")
                )
            )["sources"]
        ]
        for config in configs
    )
    assert one == two


def test_a_kind_that_is_not_read_an_error_of_its_own_and_its_absence_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"tokenizer_backend: found gigatoken, which does not read .*; required .* set tokenizer_backend: tokenizers"
    ):
        tokenizer.load(folder_of(digits(), tmp_path / "granite"), True, "gigatoken")
    spec = tokenizer.load(folder_of(byte_level(LLAMA3), tmp_path / "t"), True, "gigatoken")
    monkeypatch.setattr(fast_tokenizer, "encode", lambda fast, texts: (np.array([5], np.uint32), np.array([1])))
    with pytest.raises(InputError, match="gives other ids than tokenizers for the text .The sum"):
        tokenizer.encode_documents(TEXTS[:1], spec, append_eos=True)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(BackendMissing, match="gigatoken is not installed"):
        tokenizer.load(tmp_path / "t", True, "gigatoken")
