"""Special tokens that a document's text spells out, such as a page about tokenizers with `<|endoftext|>` in it.

Special are the added tokens that tokenizer.json marks so, and the added tokens that the folder's files name as begin or end of a text,
whatever their mark. Other added tokens (`<think>`, `<tool_call>` in many releases) are ordinary vocabulary: a text may hold them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
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
    if not known:
        return None
    try:
        return re.compile(_branches(known))
    except RecursionError:  # hundreds of tokens, each the beginning of the next
        return re.compile("|".join(map(re.escape, reversed(known))))


def _branches(endings: Sequence[str]) -> str:
    """Return an expression for the longest of these, as a tree of their letters: one branch a token would take seconds for a page of `<`.

    endings: sorted, each once.
    """
    common = os.path.commonprefix(endings)  # noqa: RUF071 - letters, not parts of a path
    rest = [ending[len(common) :] for ending in endings]
    branches = [_branches(list(alike)) for _, alike in groupby(filter(None, rest), key=itemgetter(0))]
    group = f"(?:{'|'.join(branches)}){'' if rest[0] else '?'}" if branches else ""
    return re.escape(common) + group
