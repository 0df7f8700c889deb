"""Turn texts into tokens with a Hugging Face folder's tokenizer.json.

A document is encoded alone and gets no special token but an EOS at its end, so the result depends on nothing but its text.
Special tokens spelled out in a text become their ids, as in Megatron-LM's tools/preprocess_data.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import fast_tokenizer
from megatron_prism.data.indexed import token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_FILES = ("tokenizer_config.json", "config.json", "generation_config.json")  # in the order they are asked


Backend = Literal["tokenizers", "gigatoken"]


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer's identity. vocab_size is the largest id + 1: what an embedding must cover.

    backend encodes; where it is gigatoken, texts with a character that it takes for another, `different`, are left to tokenizers.
    """

    folder: Path
    sha256: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None = None
    backend: Backend = "tokenizers"
    different: str = ""


def load(folder: Path, need_eos: bool, backend: Backend = "tokenizers") -> TokenizerSpec:
    """Return what identifies the tokenizer of a Hugging Face folder.

    Raises: InputError where tokenizer.json is missing or broken, no EOS token is named and one is needed, or the backend does not read it;
    BackendMissing where the backend is not installed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            Problem(
                "tokenizer",
                f"no file {path}",
                "a Hugging Face folder with tokenizer.json",
                "write one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        )
    tokenizer = _open(path)
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
    eos_id, bos_id = _special_id(folder, tokenizer, "eos"), _special_id(folder, tokenizer, "bos")
    if eos_id is None and need_eos:
        raise InputError(
            Problem(
                "tokenizer",
                f"no EOS token in {folder}",
                f"eos_token or eos_token_id in {', '.join(SPECIAL_FILES)}",
                "name one, or set append_eos: false",
            )
        )
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise InputError(Problem("tokenizer", f"EOS id {eos_id} in {folder}", f"an id of the vocabulary, 0 to {vocab_size - 1}"))
    different = fast_tokenizer.different(fast_tokenizer.load(path), tokenizer) if backend == "gigatoken" else ""
    return TokenizerSpec(folder, sha256_file(path), vocab_size, eos_id, bos_id, backend, different)


def encode(texts: Sequence[str], spec: TokenizerSpec, append_eos: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return documents as tokens, end to end, and the number of each; a text that a normalizer leaves nothing of has none."""
    is_fast = spec.backend == "gigatoken" and not any(fast_tokenizer.has_any(text, _apart(spec)) for text in texts)
    tokens, lengths = _fast(texts, spec) if is_fast else _plain(texts, spec)
    if append_eos and spec.eos_id is not None:
        has_tokens = lengths > 0
        tokens, lengths = np.insert(tokens, np.cumsum(lengths)[has_tokens], spec.eos_id), lengths + has_tokens
    return tokens, lengths


def _plain(texts: Sequence[str], spec: TokenizerSpec) -> tuple[np.ndarray, np.ndarray]:
    rows = [encoding.ids for encoding in _tokenizer(spec).encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), token_dtype(spec.vocab_size), int(lengths.sum())), lengths


def _fast(texts: Sequence[str], spec: TokenizerSpec) -> tuple[np.ndarray, np.ndarray]:
    """Encode with gigatoken.

    Raises: InputError where tokenizers gives the first text, which stands for the others, other ids.
    """
    tokens, lengths = fast_tokenizer.encode(_fast_tokenizer(spec), texts)
    if texts and tokens[: lengths[0]].tolist() != _tokenizer(spec).encode(texts[0], add_special_tokens=False).ids:
        found = f"gigatoken, which gives other ids than tokenizers for the text {texts[0][:80]!r}"
        raise InputError(Problem("tokenizer_backend", found, "the same ids", "set tokenizer_backend: tokenizers"))
    return tokens.astype(token_dtype(spec.vocab_size)), lengths.astype(np.int64)


def decode(tokens: np.ndarray, spec: TokenizerSpec) -> str:
    """Return the text of tokens, special tokens as they are spelled."""
    return _tokenizer(spec).decode(tokens.tolist(), skip_special_tokens=False)


@lru_cache(maxsize=1)
def _tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Return the tokenizer, loaded once a process; the spec's hash of the file keeps the cache true."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism; threads beside them would compete
    tokenizer = _open(spec.folder / "tokenizer.json")
    tokenizer.no_truncation()  # a tokenizer saved with either would cut or fill documents without a word
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=1)
def _fast_tokenizer(spec: TokenizerSpec) -> Any:
    return fast_tokenizer.load(spec.folder / "tokenizer.json")


@lru_cache(maxsize=1)
def _apart(spec: TokenizerSpec) -> np.ndarray:
    return fast_tokenizer.apart(spec.different)


def _open(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(Problem(f"tokenizer ({path})", " ".join(str(error).split()), "a tokenizer.json that tokenizers reads")) from None


def _special_id(folder: Path, tokenizer: Tokenizer, role: str) -> int | None:
    for name in SPECIAL_FILES:
        values = _read(folder / name)
        token, token_id = values.get(f"{role}_token"), values.get(f"{role}_token_id")
        if isinstance(token, dict):  # an added token, written out
            token = token.get("content")
        if token is not None:
            if (found := tokenizer.token_to_id(str(token))) is None:
                raise InputError(Problem(f"{folder / name}:{role}_token", repr(token), "a token of tokenizer.json"))
            return found
        if isinstance(token_id, list):  # several may end a generation; the first is the model's own
            token_id = token_id[0] if token_id else None
        if token_id is not None:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InputError(Problem(f"{folder / name}:{role}_token_id", repr(token_id), "a token id"))
            return token_id
    return None


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(Problem(str(path), f"no JSON ({error})", "a JSON object")) from None
    if not isinstance(values, dict):
        raise InputError(Problem(str(path), f"a JSON {type(values).__name__}", "a JSON object"))
    return values
