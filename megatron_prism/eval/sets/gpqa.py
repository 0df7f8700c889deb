"""GPQA-Diamond in two layouts of its options, because a model that always says one letter must not look able.

harness: the layout of Evalchemy, which draws from a new Random(42) for each question. Its permutation is always the same, and puts the right
answer at D in all 198. balanced (ours): the order is drawn for each question, then the right answer is moved so that each letter is right for
a quarter of the questions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from megatron_prism.eval.question import Question
from megatron_prism.eval.sets.prompt import asked, id_of
from megatron_prism.eval.sets.rows import Row
from megatron_prism.grade import choice

LETTERS = "ABCD"
FIELDS = (
    *("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    *("Record ID", "High-level domain", "Subdomain"),
)
# Evalchemy, eval/chat_benchmarks/GPQADiamond/eval_instruct.py, PROMPT
INSTRUCTION = (
    "Return your final response within \\boxed{{}} and only include the letter choice (A, B, C, or D) as your final response.\n"
    "Problem: {problem}\nOptions: {options}\nAnswer:"
)
HARNESS_SEED = 42


def gpqa(row: Row, chat: bool) -> Question:
    """Read a question of GPQA-Diamond, its right answer first. A layout then gives the options their order and the prompt its words.

    Nothing is taken out of the options: brackets belong to chemical names.
    """
    problem = row.text("Question").strip()
    options = [row.text(name).strip() for name in ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))]
    tags = {key: str(row.get(name)) for key, name in (("domain", "High-level domain"), ("subdomain", "Subdomain")) if row.get(name)}
    return Question(id=id_of(row, problem, "Record ID"), prompt=problem, kind="choice", gold="A", choices=tuple(options), tags=tags)


def harness(questions: Sequence[Question], chat: bool) -> tuple[Question, ...]:
    """Return GPQA's questions in the layout of Evalchemy: the right answer is always D."""
    order = list(range(len(LETTERS)))
    random.Random(HARNESS_SEED).shuffle(order)
    return tuple(_ordered(one, [one.choices[index] for index in order], LETTERS[order.index(0)], chat) for one in questions)


def balanced(questions: Sequence[Question], chat: bool) -> tuple[Question, ...]:
    """Return GPQA's questions with options in an order that the id alone draws, but for the right one: it takes A, B, C, D in turn.

    The turns go by a hash of the ids, so that they say nothing of the file's order.
    """
    turns = {one.id: number for number, one in enumerate(sorted(questions, key=lambda one: _digest(one.id)))}
    ordered = []
    for one in questions:
        options, gold = choice.shuffle(one.choices, one.gold, one.id)
        at, to = LETTERS.index(gold), turns[one.id] % len(LETTERS)
        moved = list(options)
        moved[at], moved[to] = moved[to], moved[at]
        ordered.append(_ordered(one, moved, LETTERS[to], chat))
    return tuple(ordered)


def _ordered(question: Question, options: Sequence[str], gold: str, chat: bool) -> Question:
    """Return a question with options in this order. The tag `gold` gives a score by right letter, which shows a model that prefers one."""
    listed = ", ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    prompt = asked(INSTRUCTION.format(problem=question.prompt, options=listed), chat)
    return replace(question, prompt=prompt, choices=tuple(options), gold=gold, tags={**question.tags, "gold": gold})


def _digest(text: str) -> bytes:
    return hashlib.sha256(f"gpqa balanced/{text}".encode()).digest()
