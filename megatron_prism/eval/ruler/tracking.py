"""Variable tracking (vt): a chain of assignments in noise, and all variables that end with its value, behind one solved example.

Source: RULER scripts/data/synthetic/variable_tracking.py (1 chain, 4 hops); the prompt as HELMET's data.py writes it.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random
from string import ascii_uppercase

from megatron_prism.eval.ruler import haystack
from megatron_prism.eval.ruler.draft import Draft, hidden

NUM_HOPS = 4
NUM_EXAMPLE_BLOCKS = 15  # of noise: about 500 tokens, the length of RULER's example
TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above.\n"
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)


def draw(random: Random) -> Draft:
    """Return a question."""
    example, solved = _chain(random, 3)
    question, golds = _chain(random, 5)
    places, example_places = ([random.random() for _ in range(NUM_HOPS + 1)] for _ in range(2))
    before = f"{_text(example, sorted(example_places), NUM_EXAMPLE_BLOCKS)} {' '.join(solved)}\n\n"
    return Draft(write=lambda size: before + _text(question, sorted(places), size), golds=golds, smallest=1)


def _chain(random: Random, num_letters: int) -> tuple[list[str], tuple[str, ...]]:
    """Return the statements of a chain, and its variables. The first statement ends with the value."""
    variables: dict[str, None] = {}
    while len(variables) <= NUM_HOPS:
        variables["".join(random.choices(ascii_uppercase, k=num_letters))] = None
    names = tuple(variables)
    statements = [f"VAR {names[0]} = {random.randrange(10_000, 100_000)}"]
    return statements + [f"VAR {name} = VAR {before}" for before, name in pairwise(names)], names


def _text(statements: list[str], places: list[float], num_blocks: int) -> str:
    context = "\n".join(hidden([haystack.NOISE] * num_blocks, statements, places))
    return TEMPLATE.format(context=context, value=statements[0].rsplit(" ", 1)[1], count=len(statements))
