"""One tokenizer for preparing, generating, verifying, RL and evaluation: a Hugging Face folder's tokenizer.json, without truncation or padding.

There are three ways to encode. A document (`encode_documents`) is encoded alone and gets only an EOS at its end. A prompt (`encode_prompt`)
gets what the tokenizer puts before a text, such as BOS. A rendered chat (`encode_text`) gets nothing, since its template writes its tokens.
Special tokens spelled out in a prompt or a rendered chat become their ids, as in transformers. In a document they are ordinary text, unless
asked otherwise (spelled.py); Megatron-LM's tools/preprocess_data.py gives their ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_prism.core import log
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import fast_tokenizer, special_tokens, spelled, split_pattern
from megatron_prism.data.indexed import token_dtype
from megatron_prism.data.spelled import Special
from megatron_prism.hf import recognise
from megatron_prism.hf.files import refusal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
OTHER_FILES = (
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)  # of sentencepiece, Mistral and GPT-2: AutoTokenizer reads them
THINKING = ("<think>", "</think>")  # as grade/format.py reads them
MAX_TAGS = 64  # of THINKING in a response that are decoded in its context
SHOWN_TOKENS = 3  # tokens named in a problem
Backend = Literal["tokenizers", "gigatoken"]
InText = Literal["text", "ids", "error"]  # what becomes of a special token that a document's text spells


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer's identity. vocab_size: the largest id + 1, which an embedding must cover. sha256: the hash of tokenizer.json.

    eos_id ends a document: the first EOS that `special_tokens.FILES` name, in their order. `ends`: the end tokens by file; a generation
    ends at any of them. backend: the library that encodes documents. Under gigatoken, tokenizers still encodes texts with a character in
    `different`, whose class the two libraries disagree on.
    """

    folder: Path
    sha256: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None = None
    ends: special_tokens.Ends = ()
    backend: Backend = "tokenizers"
    different: str = ""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All end tokens, eos_id first."""
        return tuple(dict.fromkeys(token_id for _, ids in self.ends for token_id in ids))

    @property
    def named_ids(self) -> tuple[int, ...]:
        """All tokens that the folder's files name as begin or end of a text: special, whatever tokenizer.json says of them."""
        return tuple(sorted({*self.end_ids, *([] if self.bos_id is None else [self.bos_id])}))


def load(folder: Path, need_eos: bool = False, backend: Backend = "tokenizers") -> TokenizerSpec:
    """Return what identifies the tokenizer of a Hugging Face folder.

    Raises: InputError where tokenizer.json is missing or broken, a file names a special token that it lacks, a needed EOS token is not named,
    or the backend cannot read it. BackendMissing where the backend is not installed.
    """
    path = folder / FILE
    if not path.is_file():
        other = None if (folder / "config.json").is_file() else recognise.no_model(folder)
        found, fix = f"no file {path}", "write one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        if others := [name for name in OTHER_FILES if (folder / name).is_file()]:
            found = f"{found}, only {', '.join(others)}"
        if other is not None and other.fix:
            found, fix = f"{found} ({other.found})", other.fix
        raise InputError(Problem("tokenizer", found, "a Hugging Face folder with tokenizer.json", fix))
    tokenizer = _open(path)
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
    eos_id = special_tokens.first_id(folder, "eos", tokenizer.token_to_id)
    bos_id = special_tokens.first_id(folder, "bos", tokenizer.token_to_id)
    if eos_id is None and need_eos:
        raise InputError(
            Problem(
                "tokenizer",
                f"no EOS token in {folder}",
                f"eos_token or eos_token_id in {', '.join(special_tokens.FILES)}",
                "name one, or set append_eos: false",
            )
        )
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise InputError(Problem("tokenizer", f"EOS id {eos_id} in {folder}", f"an id of the vocabulary, 0 to {vocab_size - 1}"))
    ends = special_tokens.end_ids(folder, tokenizer.token_to_id)
    different = fast_tokenizer.different(fast_tokenizer.load(path), tokenizer) if backend == "gigatoken" else ""
    return TokenizerSpec(folder, sha256_file(path), vocab_size, eos_id, bos_id, ends, backend, different)


def log_ends(spec: TokenizerSpec) -> None:
    """Log a split pattern known to be wrong, and the files and tokens where they disagree on the first end token. Further ones may differ."""
    if fault := split_pattern.fault(spec.folder):
        log.get().warning("%s: %s", spec.folder, fault)
    if len({ids[0] for _, ids in spec.ends}) > 1:
        named = "; ".join(f"{name} {', '.join(_shown(token_id, spec) for token_id in ids)}" for name, ids in spec.ends)
        last = "no EOS" if spec.eos_id is None else f"EOS {spec.eos_id}"
        log.get().info(
            "%s: the files name different EOS tokens: %s; a document gets %s, a generation ends at any", spec.folder, named, last
        )


def encode_documents(
    texts: Sequence[str], spec: TokenizerSpec, append_eos: bool, in_text: InText = "text"
) -> tuple[np.ndarray, np.ndarray]:
    """Return documents as tokens, concatenated, and the number of tokens of each. A text that the normalizer empties has none.

    A special token that a text spells becomes its id where in_text is `ids`, else it is encoded as ordinary text.
    Raises: InputError where ordinary text gave a special id.
    """
    is_fast = spec.backend == "gigatoken" and not any(fast_tokenizer.has_any(text, _apart(spec)) for text in texts)
    if is_fast and in_text != "ids":  # gigatoken always gives the ids
        is_fast = not num_spelled(texts, spec).any()
    tokens, lengths = _encode_fast(texts, spec, in_text) if is_fast else _encode(texts, spec, in_text)
    if in_text != "ids" and (is_special := np.isin(tokens, _special(spec).ids)).any():
        text = texts[int(np.searchsorted(np.cumsum(lengths), is_special.argmax(), side="right"))]
        token = _shown(int(tokens[is_special.argmax()]), spec)
        raise InputError(
            Problem("special_tokens_in_text", f"special token {token} of the text {text[:80]!r}", "ordinary tokens", "set it to ids")
        )
    if append_eos and spec.eos_id is not None:
        has_tokens = lengths > 0
        tokens, lengths = np.insert(tokens, np.cumsum(lengths)[has_tokens], spec.eos_id), lengths + has_tokens
    return tokens, lengths


def num_spelled(texts: Sequence[str], spec: TokenizerSpec) -> np.ndarray:
    """Return how many special tokens each text spells (int64 [texts])."""
    any_of = _special(spec).any_of
    counts = (0 if any_of is None else sum(1 for _ in any_of.finditer(text)) for text in texts)
    return np.fromiter(counts, np.int64, len(texts))


def not_allowed(spec: TokenizerSpec, in_text: InText) -> re.Pattern[str] | None:
    """Return what finds a special token that a document must not spell: any under `error`, under `text` one that would get its id nonetheless."""
    return {"error": _special(spec).any_of, "text": _special(spec).unavoidable, "ids": None}[in_text]


def encode_prompt(text: str, spec: TokenizerSpec) -> list[int]:
    """Return the ids of a text to be continued, as transformers' tokenizer(text) gives them: with BOS where the post-processor adds one.

    An end token that the post-processor adds is dropped. An empty prompt becomes BOS alone, even where the post-processor adds no BOS. As in
    transformers 5, tokenizer_config.json's add_bos_token is not read: the post-processor of tokenizer.json decides.
    Raises: InputError for an empty prompt where no BOS is named.
    """
    encoding = _tokenizer(spec).encode(text)
    ids, is_added = encoding.ids, encoding.special_tokens_mask
    while ids and is_added[len(ids) - 1] and ids[-1] in spec.end_ids:
        ids = ids[:-1]
    if ids:
        return ids
    if spec.bos_id is None:
        raise InputError(Problem("prompt", "an empty prompt", "some text, since the model names no begin-of-text token"))
    return [spec.bos_id]


def encode_text(text: str, spec: TokenizerSpec) -> list[int]:
    """Return the ids of a text with no token added. A rendered chat template holds its own BOS."""
    return _tokenizer(spec).encode(text, add_special_tokens=False).ids


def decode(ids: Sequence[int] | np.ndarray, spec: TokenizerSpec, skip_special: bool = False) -> str:
    """Return the text of tokens, with special tokens spelled out or skipped."""
    return _tokenizer(spec).decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special)


def continuation(prompt: Sequence[int], ids: Sequence[int], spec: TokenizerSpec) -> str:
    """Return the text of the tokens after a prompt, decoded in its context (spaces, split characters).

    End tokens are left out, and other special tokens too, but for the tags of THINKING, which a grader reads, where a tokenizer has them so.
    """
    ends = frozenset(spec.end_ids)
    ids = [token for token in ids if token not in ends]
    whole, text, before = [*prompt], "", decode(prompt, spec, skip_special=True)
    tags, num_tags = _special_tags(spec), 0
    if tags.keys().isdisjoint(ids):
        return decode([*whole, *ids], spec, skip_special=True)[len(before) :]
    for token in ids:
        whole.append(token)
        if token in tags:
            after, num_tags = decode(whole, spec, skip_special=True), num_tags + 1
            text, before = text + after[len(before) :] + tags[token], after
            if num_tags % MAX_TAGS == 0:  # of so many no grader takes one: what follows needs no context, whose length counts for each tag
                whole, before = [], ""
    return text + decode(whole, spec, skip_special=True)[len(before) :]


def check_vocabulary(path: Path, vocab_size: int) -> list[Problem]:
    """Return the problems of a tokenizer.json for an embedding of vocab_size rows: tokens beyond it by name, or why the file does not load."""
    try:
        tokenizer = _open(path)
    except InputError as error:
        return list(error.problems)
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size)
    if not beyond:
        return []
    named = ", ".join(f"{token_id} {token!r}" for token_id, token in beyond[:SHOWN_TOKENS])
    more = f" and {len(beyond) - SHOWN_TOKENS} more" if len(beyond) > SHOWN_TOKENS else ""
    added = tokenizer.get_added_tokens_decoder()
    fix = "the tokenizer and the model do not belong together"
    if all(token_id in added for token_id, _ in beyond):
        fix = "remove these added tokens, or resize the model's embedding (transformers' resize_token_embeddings)"
    return [Problem(str(path), f"token id {named}{more}", f"ids below the model's vocab_size {vocab_size}", fix)]


def _encode(texts: Sequence[str], spec: TokenizerSpec, in_text: InText) -> tuple[np.ndarray, np.ndarray]:
    rows = [encoding.ids for encoding in _of_documents(spec, in_text).encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), token_dtype(spec.vocab_size), int(lengths.sum())), lengths


def _encode_fast(texts: Sequence[str], spec: TokenizerSpec, in_text: InText) -> tuple[np.ndarray, np.ndarray]:
    """Encode with gigatoken.

    Raises: InputError where tokenizers gives different ids for the first text, which is checked as a sample.
    """
    tokens, lengths = fast_tokenizer.encode(_fast_tokenizer(spec), texts)
    if texts and tokens[: lengths[0]].tolist() != _of_documents(spec, in_text).encode(texts[0], add_special_tokens=False).ids:
        other = f"gigatoken, which gives other ids than tokenizers for the text {texts[0][:80]!r}"
        raise InputError(Problem("tokenizer_backend", other, "the same ids", "set tokenizer_backend: tokenizers"))
    return tokens.astype(token_dtype(spec.vocab_size)), lengths.astype(np.int64)


def _shown(token_id: int, spec: TokenizerSpec) -> str:
    return f"{token_id} ({_tokenizer(spec).id_to_token(token_id)!r})"


@lru_cache(maxsize=1)
def _tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Return the tokenizer, loaded once per process. The file's hash in the spec is part of the cache key."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # worker processes are the parallelism; threads would compete with them
    return _open(spec.folder / FILE)


def _of_documents(spec: TokenizerSpec, in_text: InText) -> Tokenizer:
    return _tokenizer(spec) if in_text == "ids" else _text_tokenizer(spec)[0]


def _special(spec: TokenizerSpec) -> Special:
    return _text_tokenizer(spec)[1]


@lru_cache(maxsize=1)
def _text_tokenizer(spec: TokenizerSpec) -> tuple[Tokenizer, Special]:
    """Return a tokenizer of its own, which encodes spelled special tokens as text, and those tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _open(spec.folder / FILE)
    return tokenizer, spelled.encode_as_text(tokenizer, spec.named_ids)


@lru_cache(maxsize=1)
def _special_tags(spec: TokenizerSpec) -> dict[int, str]:
    added = _tokenizer(spec).get_added_tokens_decoder()
    return {token_id: token.content for token_id, token in added.items() if token.special and token.content in THINKING}


@lru_cache(maxsize=1)
def _fast_tokenizer(spec: TokenizerSpec) -> Any:
    return fast_tokenizer.load(spec.folder / FILE)


@lru_cache(maxsize=1)
def _apart(spec: TokenizerSpec) -> np.ndarray:
    return fast_tokenizer.apart(spec.different)


def _open(path: Path) -> Tokenizer:
    """Open a tokenizer file. No other code opens one.

    Raises: InputError where tokenizers cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # tokenizers raises plain Exception; a panic of its Rust half is not even an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        required = "a tokenizer.json that tokenizers reads"
        raise InputError(refusal(path, required) or Problem(str(path), " ".join(str(error).split()), required)) from None
    tokenizer.no_truncation()  # a tokenizer saved with either would silently cut or pad a text
    tokenizer.no_padding()
    return tokenizer
