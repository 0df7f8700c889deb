"""Encode with gigatoken: the ids of tokenizers in a fraction of the time (bench/README.md), except for some characters.

gigatoken's tables are of another Unicode version. A character of the newest version is a letter to one library and not to the other.
tokenizers encodes every text with such a character.
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

# Contexts in which the class of a character (letter, capital, mark, number, space) matters: beside a letter, a number, a quote, a line end;
# and beside marks of the lowest and of a high combining class, among which a normalizer (NFC) sorts a mark
CONTEXT = "a{0}a {0}{0}1{0}'s{0}\n{0}A {0}a\u0345{0}a{0}\u0334 "
ALIKE = ("CJK UNIFIED IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH")  # thousands of characters of one class: one in 64 is tried


def load(path: Path) -> Any:
    """Load a tokenizer.json with gigatoken.

    Raises: BackendMissing where gigatoken is not installed. InputError for a kind of tokenizer that it does not read.
    """
    try:
        import gigatoken
    except ImportError:
        raise BackendMissing(
            "gigatoken", "tokenizer_backend: gigatoken", "pip install 'megatron_prism[fast]', or set it to tokenizers"
        ) from None
    try:
        return gigatoken.Tokenizer(str(path))
    except Exception as error:  # its Rust half raises plain Exception
        found = f"gigatoken, which does not read {path} ({str(error).splitlines()[0]})"
        raise InputError(
            Problem("tokenizer_backend", found, "a kind of tokenizer that it reads", "set tokenizer_backend: tokenizers")
        ) from None


def encode(fast: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of texts, concatenated, and the number of ids of each text."""
    layout = fast.encode_batch(list(texts), parallel=False).layout  # an awkward array: ids, and the offsets that divide them
    offsets = layout.offsets.data
    return layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)


def different(fast: Any, tokenizer: Tokenizer) -> str:
    """Return the characters, of those that this Python knows, for which the two libraries give different ids."""
    codes = [code for code in range(sys.maxunicode + 1) if _is_tried(code)]
    texts = [CONTEXT.format(chr(code)) for code in codes]
    tokens, lengths = encode(fast, texts)
    ids_per_text = np.split(tokens, np.cumsum(lengths)[:-1])
    wanted = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return "".join(chr(code) for code, ids, encoding in zip(codes, ids_per_text, wanted, strict=True) if ids.tolist() != encoding.ids)


def _is_tried(code: int) -> bool:
    character = chr(code)
    is_one_of_many = code % 64 and unicodedata.name(character, "").startswith(ALIKE)
    return not is_one_of_many and unicodedata.category(character) not in ("Cn", "Cs", "Co")


def apart(different: str) -> np.ndarray:
    """Return for each code point whether tokenizers must encode a text with it (bool): `different` ones, and ones unknown to this Python."""
    is_apart = np.fromiter((unicodedata.category(chr(code)) == "Cn" for code in range(sys.maxunicode + 1)), bool, sys.maxunicode + 1)
    is_apart[list(map(ord, different))] = True
    return is_apart


def has_any(text: str, apart: np.ndarray) -> bool:
    """Say whether a text holds a character that `apart` marks."""
    return not text.isascii() and bool(apart[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())
