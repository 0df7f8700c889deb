"""Needles in a haystack (niah): a key's value, hidden between essays, noise or other needles, and asked for.

Source: RULER scripts/synthetic.yaml and scripts/data/synthetic/niah.py; the prompts as HELMET's data.py writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_prism.eval.ruler import haystack, words
from megatron_prism.eval.ruler.draft import Draft, Sources, depths, hidden

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
    "{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?\n"
    "The special magic {kind} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
    "{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?\n"
    "The special magic {kind} for {query} mentioned in the provided text are"
)
NUM_OTHERS = 10_000  # the needles that a haystack of needles can have: some 250,000 tokens


@dataclass(frozen=True, kw_only=True)
class Needles:
    """num_keys, num_values: the needles that are hidden, and the values of each key. num_queries: the keys that are asked for."""

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


def draw(shape: Needles, random: Random, sources: Sources) -> Draft:
    """Return a question. All keys and values of a haystack are different, so that there is one right answer."""
    draw_key = words.key if shape.key == "word" else words.uuid4
    draw_value = words.number if shape.value == "number" else words.uuid4
    num_others = NUM_OTHERS if shape.haystack == "needle" else 0
    keys = _different(draw_key, random, shape.num_keys + num_others)
    values = _different(draw_value, random, shape.num_keys * shape.num_values + num_others)
    kind = f"{shape.value}s"
    golds = [values[index * shape.num_values :][: shape.num_values] for index in range(shape.num_keys)]
    needles = [NEEDLE.format(kind=kind, key=keys[index], value=value) for index in range(shape.num_keys) for value in golds[index]]
    random.shuffle(needles)
    asked = random.sample(range(shape.num_keys), shape.num_queries)
    query = _listed([keys[index] for index in asked])
    is_one = shape.num_queries * shape.num_values == 1
    template = (ONE if is_one else SEVERAL).replace("{kind}", kind[:-1] if is_one else kind).replace("{query}", query)
    others = [
        NEEDLE.format(kind=kind, key=key, value=value)
        for key, value in zip(keys[shape.num_keys :], values[shape.num_keys * shape.num_values :], strict=True)
    ]
    if shape.haystack == "essay":
        places, joint = depths(random, len(needles)), " "
        text = haystack.essay_words(sources.essays)
    else:
        places, joint = sorted(random.random() for _ in needles), "\n"

    def write(size: int) -> str:
        if shape.haystack == "essay":
            pieces = haystack.essay(text, size)
        else:
            pieces = [haystack.NOISE] * size if shape.haystack == "noise" else others[:size]
        return template.replace("{context}", joint.join(hidden(pieces, needles, places)))

    tags = {"haystack": "essays" if sources.essays else "own text"} if shape.haystack == "essay" else {}
    return Draft(
        write=write, golds=tuple(value for index in asked for value in golds[index]), smallest=1, largest=num_others or None, tags=tags
    )


def _different(draw_one: Callable[[Random], str], random: Random, count: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw_one(random)] = None
    return list(drawn)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
