"""The texts in which something is hidden: RULER's repeated noise, the user's essays, or a text of ours where there are none."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from random import Random

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.eval.ruler import words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's
NUM_OWN_SENTENCES = 12_000  # some 130,000 words, about as many as RULER's essays
_VERBS = "carried crossed drew found guarded held hid lifted mended moved painted passed reached saw sold took touched traced turned watched".split()
_PLACES = "above across after before behind beside beyond inside near under".split()
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@lru_cache(maxsize=4)
def essay_words(path: Path | None) -> tuple[str, ...]:
    """Return the words of the user's essays, or of our text.

    Raises: InputError where the file holds no text.
    """
    if path is None:
        return tuple(_own_text().split())
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = json.loads(text)["text"]
        text_words = tuple(text.split())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(Problem(str(path), f"{type(error).__name__}: {error}", 'essays: a text, or JSON {"text": ...}')) from None
    if not text_words:
        raise InputError(Problem(str(path), "no text", "essays"))
    return text_words


def essay(text: tuple[str, ...], num_words: int) -> list[str]:
    """Return the sentences of a text's first words. A text that is too short begins again, as RULER's does."""
    times, rest = divmod(num_words, len(text))
    return _SENTENCE_END.split(" ".join(text * times + text[:rest]))


def _own_text() -> str:
    random = Random("RULER's haystack")
    return " ".join(_sentence(random) for _ in range(NUM_OWN_SENTENCES))


def _sentence(random: Random) -> str:
    def thing() -> str:
        return f"{random.choice(words.adjectives())} {random.choice(words.nouns())}"

    return f"The {thing()} {random.choice(_VERBS)} the {thing()} {random.choice(_PLACES)} the {random.choice(words.nouns())}."
