"""Questions on documents (qa_1: SQuAD, qa_2: HotpotQA), among other documents of the same set. The sets are the user's files.

Source: RULER scripts/data/synthetic/qa.py; the prompt as HELMET's data.py writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.eval.ruler.draft import Draft

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n"
    "{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}\n"
    "Answer:"
)
FORMS = {"squad": "SQuAD 2.0's JSON (dev-v2.0.json)", "hotpotqa": "HotpotQA's JSON (hotpot_dev_distractor_v1.json)"}


@dataclass(frozen=True)
class Asked:
    """documents: those that it is asked on; near: others of the same article, which come before the rest."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    near: tuple[str, ...] = ()


def draw(form: str, path: Path | None, order_seed: str, index: int, random: Random) -> Draft:
    """Return the set's question of this index in a seeded order. Its size is the count of documents beside its own.

    Raises: InputError without a file, or where it is another file, or has fewer questions.
    """
    if path is None:
        raise InputError(Problem(f"ruler.files.{form}", "no file", FORMS[form], "name the file, or leave the sub-task out"))
    questions, documents = read(form, path)
    if index >= len(questions):
        raise InputError(Problem(str(path), f"{len(questions)} questions", f"at least {index + 1}", "ask for fewer questions"))
    asked = questions[_order(order_seed, len(questions))[index]]
    own = set(asked.documents)
    near = [document for document in asked.near if document not in own]
    rest = [document for document in documents if document not in own and document not in asked.near]
    random.shuffle(near)
    others = near + random.sample(rest, len(rest))
    ranked = [(random.random(), document) for document in (*asked.documents, *others)]

    def write(size: int) -> str:
        order = sorted(ranked[: len(asked.documents) + size])
        return TEMPLATE.replace("{query}", asked.query).replace(
            "{context}", "\n\n".join(f"Document {number}:\n{document}" for number, (_, document) in enumerate(order, 1))
        )

    return Draft(write=write, golds=asked.answers, smallest=0, largest=len(others))


@lru_cache(maxsize=4)
def _order(seed: str, count: int) -> tuple[int, ...]:
    return tuple(Random(seed).sample(range(count), count))


@lru_cache(maxsize=2)
def read(form: str, path: Path) -> tuple[tuple[Asked, ...], tuple[str, ...]]:
    """Return a set's questions that have an answer, and all its documents, each once.

    Raises: InputError.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        questions = tuple(_squad(value) if form == "squad" else _hotpotqa(value))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(Problem(str(path), f"{type(error).__name__}: {error}", FORMS[form])) from None
    if not questions:
        raise InputError(Problem(str(path), "no question that has an answer", FORMS[form]))
    return questions, tuple(sorted({document for asked in questions for document in (*asked.documents, *asked.near)}))


def _squad(value: Any) -> Iterator[Asked]:
    for article in value["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
                if answers and not question.get("is_impossible", False):
                    near = tuple(dict.fromkeys(text for text in paragraphs if text != paragraph["context"]))
                    yield Asked(question["question"], answers, (paragraph["context"],), near)


def _hotpotqa(value: Any) -> Iterator[Asked]:
    for record in value:
        documents = tuple(dict.fromkeys(f"{title}\n{''.join(sentences)}" for title, sentences in record["context"]))
        yield Asked(record["question"], (record["answer"],), documents)
