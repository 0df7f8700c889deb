"""Turn documents into tokens with a Hugging Face folder's tokenizer.json, over processes, in document order.

A document is encoded alone and gets no special token but an EOS at its end, so the result depends on nothing but its text.
Special tokens spelled out in a text become their ids, as in Megatron-LM's tools/preprocess_data.py.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prism.core.errors import EnvironmentFault, InputError, Problem
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data.indexed import token_dtype
from megatron_prism.data.sources import Document, Split

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_CHARS = 1 << 19  # a fraction of a second's work, and all that a worker holds at a time
SPECIAL_FILES = ("tokenizer_config.json", "config.json", "generation_config.json")  # in the order they are asked


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer's identity. vocab_size is the largest id + 1: what an embedding must cover."""

    folder: Path
    sha256: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None = None


@dataclass(frozen=True)
class Encoded:
    """Documents of one split as tokens: all of them end to end, and the number of each."""

    split: Split
    tokens: np.ndarray
    lengths: np.ndarray


def load(folder: Path, need_eos: bool) -> TokenizerSpec:
    """Return what identifies the tokenizer of a Hugging Face folder.

    Raises: InputError where tokenizer.json is missing or broken, or no EOS token is named and one is needed.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(Problem("tokenizer", f"no file {path}", "a Hugging Face folder with tokenizer.json",
                                 "write one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"))
    tokenizer = _open(path)
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
    eos_id, bos_id = _special_id(folder, tokenizer, "eos"), _special_id(folder, tokenizer, "bos")
    if eos_id is None and need_eos:
        raise InputError(Problem("tokenizer", f"no EOS token in {folder}", f"eos_token or eos_token_id in {', '.join(SPECIAL_FILES)}",
                                 "name one, or set append_eos: false"))
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise InputError(Problem("tokenizer", f"EOS id {eos_id} in {folder}", f"an id of the vocabulary, 0 to {vocab_size - 1}"))
    return TokenizerSpec(folder, sha256_file(path), vocab_size, eos_id, bos_id)


def encode(documents: Iterable[Document], spec: TokenizerSpec, append_eos: bool, num_workers: int | None) -> Generator[Encoded]:
    """Yield documents as tokens, in document order within a split, by `num_workers` processes (None: one a core; 1: this one).

    Raises: EnvironmentFault where a worker dies.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    batches = _batches(documents)
    if num_workers == 1:
        for split, texts in batches:
            yield _encode(spec, append_eos, split, texts)
        return
    # Spawned, not forked: the parent may hold threads and locks (torch, a progress bar) that a fork would copy half-way.
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    waiting: deque = deque()
    try:
        for split, texts in batches:
            waiting.append(pool.submit(_encode, spec, append_eos, split, texts))
            if len(waiting) > 2 * num_workers:  # bounds the memory: the reader waits for the oldest batch
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise EnvironmentFault("a tokenizer process died (out of memory?); set num_workers lower") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave a worker's end to its parent: an interrupt is the parent's to handle, and a killed parent leaves no worker waiting."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _batches(documents: Iterable[Document]) -> Iterator[tuple[Split, list[str]]]:
    """Yield the texts of each split in batches of at least BATCH_CHARS, the last of each split shorter."""
    texts: dict[Split, list[str]] = {"train": [], "valid": []}
    num_chars: dict[Split, int] = {"train": 0, "valid": 0}
    for document in documents:
        split = document.split
        texts[split].append(document.text)
        num_chars[split] += len(document.text)
        if num_chars[split] >= BATCH_CHARS:
            yield split, texts[split]
            texts[split], num_chars[split] = [], 0
    for split, rest in texts.items():
        if rest:
            yield split, rest


def _encode(spec: TokenizerSpec, append_eos: bool, split: Split, texts: list[str]) -> Encoded:
    tail = [spec.eos_id] if append_eos and spec.eos_id is not None else []
    rows = [encoding.ids + tail for encoding in _tokenizer(spec).encode_batch_fast(texts, add_special_tokens=False)]
    rows = [row for row in rows if row]  # a normalizer may leave nothing, and an empty sequence is no document
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return Encoded(split, np.fromiter(chain.from_iterable(rows), token_dtype(spec.vocab_size), int(lengths.sum())), lengths)


@lru_cache(maxsize=1)
def _tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Return the tokenizer, loaded once a process; the spec's hash of the file keeps the cache true."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism; threads beside them would compete
    tokenizer = _open(spec.folder / "tokenizer.json")
    tokenizer.no_truncation()  # a tokenizer saved with either would cut or fill documents without a word
    tokenizer.no_padding()
    return tokenizer


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
