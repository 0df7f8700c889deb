"""gigatoken beside tokenizers: the same ids in a fraction of the time (bench/README.md), but for characters that the two class differently.

Its tables are of another Unicode version, so a letter of a newest version is one to it and none to tokenizers. A text with such a character
is left to tokenizers.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prism.core.errors import BackendMissing, InputError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Wherever a class of characters (letter, capital, mark, number, space) decides: beside a letter, a number, a quote, an end of line; and
# beside marks of the lowest and of a high combining class, among which a normalizer (NFC) puts a mark in order
CONTEXT = "a{0}a {0}{0}1{0}'s{0}\n{0}A {0}a\u0345{0}a{0}\u0334 "
ALIKE = ("CJK UNIFIED IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH")  # thousands of one class: one in 64 is tried


def load(path: Path) -> Any:
    """Return gigatoken's reading of a tokenizer.json.

    Raises: BackendMissing where it is not installed; InputError for a kind of tokenizer that it does not read.
    """
    try:
        import gigatoken
    except ImportError:
        raise BackendMissing(
            "gigatoken", "tokenizer_backend: gigatoken", "pip install 'megatron_prism[fast]', or set it to tokenizers"
        ) from None
    try:
        return gigatoken.Tokenizer(str(path))
    except Exception as error:  # what its Rust half raises is nothing narrower
        found = f"gigatoken, which does not read {path} ({str(error).splitlines()[0]})"
        raise InputError(
            Problem("tokenizer_backend", found, "a kind of tokenizer that it reads", "set tokenizer_backend: tokenizers")
        ) from None


def encode(fast: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of texts, end to end, and the number of each."""
    layout = fast.encode_batch(list(texts), parallel=False).layout  # awkward's: offsets, and the ids that they divide
    offsets = layout.offsets.data
    return layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)


def different(fast: Any, tokenizer: Tokenizer) -> str:
    """Return the characters known to this Python which make other ids."""
    codes = [code for code in range(sys.maxunicode + 1) if _is_tried(code)]
    texts = [CONTEXT.format(chr(code)) for code in codes]
    tokens, lengths = encode(fast, texts)
    found = np.split(tokens, np.cumsum(lengths)[:-1])
    wanted = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return "".join(chr(code) for code, ids, encoding in zip(codes, found, wanted, strict=True) if ids.tolist() != encoding.ids)


def _is_tried(code: int) -> bool:
    character = chr(code)
    is_one_of_many = code % 64 and unicodedata.name(character, "").startswith(ALIKE)
    return not is_one_of_many and unicodedata.category(character) not in ("Cn", "Cs", "Co")


def apart(different: str) -> np.ndarray:
    """Return for each code point whether a text with it is left to tokenizers (bool): what is `different`, and what this Python does not know."""
    found = np.fromiter((unicodedata.category(chr(code)) == "Cn" for code in range(sys.maxunicode + 1)), bool, sys.maxunicode + 1)
    found[list(map(ord, different))] = True
    return found


def has_any(text: str, apart: np.ndarray) -> bool:
    """Say whether a text has one of these characters."""
    return not text.isascii() and bool(apart[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())
