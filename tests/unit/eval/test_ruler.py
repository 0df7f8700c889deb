"""RULER's questions: solved from the prompt alone, of an exact length by any tokenizer, and the same for the same seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_prism.core.errors import InputError
from megatron_prism.eval.question import Question
from megatron_prism.eval.ruler import haystack
from megatron_prism.eval.ruler.draft import Sources
from megatron_prism.eval.ruler.fit import fit
from megatron_prism.eval.ruler.make import SUB_TASKS, make
from megatron_prism.grade.grader import Grader
from megatron_prism.grade.outcome import Item
from tests.unit.eval.oracle import solve

STORIES = Path(__file__).resolve().parents[4] / "shared/data/stories260k/tokenizer.json"
LENGTH = 8192
UNIT_TOKENS = {
    "niah_single_1": 90,
    "vt": 90,
    "niah_multikey_2": 150,
    "niah_multikey_3": 150,
    "cwe": 60,
    "qa_1": 160,
    "qa_2": 160,
}  # at most; else a word's
Count = Callable[[str], int]


@cache
def trained() -> Tokenizer:
    """Return a byte-level BPE of 2,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([" ".join(haystack.essay_words(None)[:20_000])], trainer)
    return tokenizer


def count_trained(text: str) -> int:
    return len(trained().encode(text).ids)


@cache
def _stories() -> Tokenizer:
    return Tokenizer.from_file(str(STORIES))


def count_stories(text: str) -> int:
    return len(_stories().encode(text).ids)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """SQuAD and HotpotQA in their published forms, on capitals."""
    folder = tmp_path_factory.mktemp("qa")
    facts = [(f"Land{index}x", f"Town{index}x") for index in range(400)]
    texts = [f"Geography. The capital of {land} is {town}. " + "It is far away. " * 8 for land, town in facts]
    asked = [
        {"question": f"What is the capital of {land}?", "answers": [{"text": town}, {"text": f"the {town}"}], "is_impossible": False}
        for land, town in facts
    ]
    impossible = {"question": "Why?", "answers": [], "is_impossible": True}
    articles = [
        {"paragraphs": [{"context": texts[index + at], "qas": [asked[index + at], impossible]} for at in range(4)]}
        for index in range(0, 400, 4)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": asked[index]["question"],
            "answer": facts[index][1],
            "context": [[f"Title {at}", [texts[at]]] for at in range(index, index + 4)],
        }
        for index in range(0, 400, 4)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return Sources(squad=folder / "squad.json", hotpotqa=folder / "hotpot.json")


def scores(questions: tuple[Question, ...], off: int) -> list[float | None]:
    items = [
        Item(id=question.id, kind=question.kind, gold=question.gold, choices=question.choices, response=solve(str(question.prompt), off))
        for question in questions
    ]
    with Grader() as grader:
        return [graded.score for graded in grader.grade(items).values()]


@pytest.mark.parametrize("name", SUB_TASKS)
def test_an_oracle_solves_it_and_one_that_is_off_by_one_does_not(name: str, sources: Sources) -> None:
    questions = make(name, LENGTH, 3, 1, count_trained, sources)
    assert scores(questions, 0) == [1, 1, 1]
    assert all(score is not None and score < 1 for score in scores(questions, 1))
    assert name == "fwe" or scores(questions, 1) == [0, 0, 0]  # fwe: ranks 2 to 4, of which two are right
    assert {question.max_tokens for question in questions} <= {50, 100}
    assert len({question.id for question in questions}) == 3 and len({question.prompt for question in questions}) == 3


@pytest.mark.parametrize("name", SUB_TASKS)
@pytest.mark.parametrize("count", [count_trained, pytest.param(count_stories, marks=pytest.mark.skipif(not STORIES.exists(), reason="no shared"))])  # fmt: skip
def test_trap_9_its_length_is_the_models_own_tokenizers(name: str, count: Count, sources: Sources) -> None:
    counted: list[int] = []

    def recorded(text: str) -> int:
        counted.append(count(text))
        return counted[-1]

    (question,) = make(name, LENGTH, 1, 2, recorded, sources)
    room, tokens = LENGTH - (question.max_tokens or 0), count(str(question.prompt))
    above = min(one for one in counted if one > room)
    assert tokens == max(one for one in counted if one <= room)
    limit = UNIT_TOKENS.get(name, 20)
    assert above - tokens <= limit and room - tokens < limit
    assert len(counted) <= 16


def test_the_seed_decides(sources: Sources) -> None:
    for name in SUB_TASKS:
        one = make(name, LENGTH, 2, 3, count_trained, sources)
        assert one == make(name, LENGTH, 2, 3, count_trained, sources)
        assert one[:1] == make(name, LENGTH, 1, 3, count_trained, sources)  # growth keeps what there was
        assert one[0].prompt != make(name, LENGTH, 1, 4, count_trained, sources)[0].prompt


def test_the_largest_size_that_fits() -> None:
    for slope in (1, 7, 24.5):
        for room in (100, 131_022):
            calls: list[int] = []

            def count(size: int, slope: float = slope, calls: list[int] = calls) -> int:
                calls.append(size)
                return int(60 + slope * size + (size % 3))

            size = fit(count, room, 1, None, "here")
            assert count(size) <= room < count(size + 1)
            assert len(calls) < 20
    with pytest.raises(InputError, match="61 tokens at its smallest; required at most 50; take a longer one in ruler.lengths"):
        fit(lambda size: 60 + size, 50, 1, None, "here")
    with pytest.raises(InputError, match="give more text"):
        fit(lambda size: 60 + size, 100, 1, 30, "here")
    with pytest.raises(InputError, match="give more text"):
        fit(lambda _: 60, 100, 0, 0, "here")


def test_what_is_missing_is_refused_by_name(sources: Sources, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ruler\.files\.squad"):
        make("qa_1", LENGTH, 1, 0, count_trained)
    with pytest.raises(InputError, match=r"SQuAD 2\.0"):
        make("qa_1", LENGTH, 1, 0, count_trained, Sources(squad=sources.hotpotqa))
    with pytest.raises(InputError, match="100 questions"):
        make("qa_2", LENGTH, 101, 0, len, sources)
    with pytest.raises(InputError, match="give more text"):
        make("qa_1", 131_072, 1, 0, count_trained, sources)
    with pytest.raises(InputError, match="niah_single_4"):
        make("niah_single_4", LENGTH, 1, 0, count_trained)
    with pytest.raises(InputError, match="essays"):
        make("niah_single_2", LENGTH, 1, 0, count_trained, Sources(essays=tmp_path / "none.txt"))


def test_essays_are_the_users_and_ours_are_labelled(tmp_path: Path) -> None:
    (tmp_path / "essays.json").write_text(json.dumps({"text": "I wrote a short essay. " * 50}))
    (question,) = make("niah_single_2", LENGTH, 1, 0, count_trained, Sources(essays=tmp_path / "essays.json"))
    assert question.tags["haystack"] == "essays" and "I wrote a short essay. I wrote" in question.prompt
    (question,) = make("niah_single_2", LENGTH, 1, 0, count_trained)
    assert question.tags["haystack"] == "own text"


def test_the_counts_of_words_are_rulers() -> None:
    (question,) = make("cwe", 8192, 1, 0, count_trained)
    listed = re.findall(r"\d+\. (\w+)", str(question.prompt).rsplit("numbered list", 1)[1].split("\nQuestion:")[0])
    assert {listed.count(word) for word in question.choices} == {30}
    assert {listed.count(word) for word in set(listed) - set(question.choices)} == {3}
