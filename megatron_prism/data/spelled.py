"""Special tokens that a document's text spells out, such as a page about tokenizers with `<|endoftext|>` in it.

Special are the added tokens that tokenizer.json marks so, and the added tokens that the folder's files name as begin or end of a text,
whatever their mark. Other added tokens (`<think>`, `<tool_call>` in many releases) are ordinary vocabulary: a text may hold them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXTS = ("{0}", "a{0}b", " {0} ", "\n{0}\n")  # in which a spelling is tried
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of byte fallback: ordinary text gives it, even where it is marked as special


@dataclass(frozen=True)
class Special:
    """A tokenizer's special tokens.

    ids: those that no ordinary text gives; the unknown token's and byte tokens' are not among them. any_of finds a spelling of a special token;
    unavoidable finds the spelling of one whose id the model itself gives for it, even as ordinary text (as a Unigram model does).
    """

    ids: np.ndarray
    any_of: re.Pattern[str] | None
    unavoidable: re.Pattern[str] | None


def encode_as_text(tokenizer: Tokenizer, named: Iterable[int]) -> Special:
    """Let a tokenizer encode the spelling of a special token as ordinary text, and return its special tokens.

    named: the ids of the tokens that the folder's files name.
    """
    named_ids = set(named)
    by_id = {token_id: token for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special or token_id in named_ids}
    tokenizer.add_special_tokens([token.content for token in by_id.values()])  # marks them: none is new, so no id changes
    tokenizer.encode_special_tokens = True
    unknown = _unknown(tokenizer)
    ids = {token_id for token_id, token in by_id.items() if token_id != unknown and not BYTE.fullmatch(token.content)}
    unavoidable = [by_id[token_id].content for token_id in ids if _is_given(tokenizer, by_id[token_id].content, ids)]
    spellings = [token.content for token in by_id.values() if not BYTE.fullmatch(token.content)]
    return Special(np.array(sorted(ids), np.int64), _pattern(spellings), _pattern(unavoidable))


def _is_given(tokenizer: Tokenizer, spelling: str, ids: set[int]) -> bool:
    return any(ids & set(tokenizer.encode(context.format(spelling), add_special_tokens=False).ids) for context in CONTEXTS)


def _unknown(tokenizer: Tokenizer) -> int | None:
    """Return the id that the model gives for unknown text, None where there is none."""
    model = json.loads(tokenizer.to_str())["model"]
    return model.get("unk_id") if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])


def _pattern(spellings: Iterable[str]) -> re.Pattern[str] | None:
    known = sorted(set(filter(None, spellings)))
    return re.compile(_branches(known)) if known else None


def _branches(endings: Sequence[str]) -> str:
    """Return an expression for the longest of these, as a tree of their letters: one branch a token would take seconds for a page of `<`."""
    by_letter: dict[str, list[str]] = {}
    for ending in filter(None, endings):
        by_letter.setdefault(ending[0], []).append(ending[1:])
    branches = [re.escape(letter) + _branches(rest) for letter, rest in by_letter.items()]
    if "" in endings:
        return f"(?:{'|'.join(branches)})?" if branches else ""
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
