"""Published sets: their gold answers score 100 % through the questions and the one grader, perturbed ones 0 %; what is wrong is named, all at once."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import TaskConfig
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import InputError
from megatron_prism.eval import averages, score, tasks
from megatron_prism.eval.grading import first_turn, grade_config, item_of, tags_of
from megatron_prism.eval.question import Question, Result
from megatron_prism.eval.sets.published import SETS, read
from megatron_prism.grade.grader import Grader
from megatron_prism.grade.packed import with_cases

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def load(name: str, path: Path, chat: bool = False) -> tuple[Question, ...]:
    return read(name, path, chat).questions


def scores(name: str, questions: tuple[Question, ...], answers: list[str]) -> Counter[str]:
    """Grade one response to each question, as an evaluation does."""
    items = [item_of(one, f"<think>hm</think>\n{answer}", one.id, False) for one, answer in zip(questions, answers, strict=True)]
    with Grader(grade_config(SETS[name].protocol, GradeConfig())) as grader:
        graded = grader.grade(items)
    return Counter(graded[one.id].outcome for one in questions)


@pytest.mark.parametrize(("name", "file"), [("math500", "math500"), ("aime24", "aime24"), ("aime25", "aime25")])
def test_gold_answers_score_all_and_perturbed_ones_nothing(name: str, file: str) -> None:
    path = DATA / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name} in ../shared/data")
    loaded = read(name, path)
    questions = loaded.questions
    assert loaded.notes == () and len(questions) == SETS[name].num_questions
    assert scores(name, questions, [f"So it is $\\boxed{{{one.gold}}}$." for one in questions]) == {"right": len(questions)}
    other = [
        f"So it is $\\boxed{{{one.gold} + 1}}$." if one.kind == "math" and "text" not in one.gold else "\\boxed{q}" for one in questions
    ]
    assert scores(name, questions, other) == {"wrong": len(questions)}


def test_the_protocol_is_the_paper_s() -> None:
    def of(name: str) -> tuple[Any, ...]:
        protocol = SETS[name].protocol
        return protocol.num_samples, protocol.temperature, protocol.top_p, protocol.max_tokens

    assert of("aime24") == of("aime25") == of("math500") == (64, 0.6, 0.95, 32_768)
    assert of("livecodebench") == of("codeforces") == of("gpqa_diamond") == (3, 0.7, 1.0, 32_768)
    assert set(averages.SIX) <= set(SETS)  # what an average takes is a set's plain name
    assert all(one.protocol.source and one.protocol.think == "free" for one in SETS.values())


def test_trap_7_a_plain_prompt_is_no_chat_and_names_its_form(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    (plain,), (chat,) = load("aime24", path), load("aime24", path, chat=True)
    asked = "1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert plain.prompt == f"User: {asked}\n\nAssistant:"
    assert chat.prompt == ({"role": "user", "content": asked},)
    assert plain.id == chat.id and plain.gold == "2"
    # a plain response may go on with a turn of its own making, which says nothing of the answer
    response = "It is \\boxed{2}.\nUser: 2 + 2?\nAssistant: \\boxed{4}"
    assert item_of(plain, response, "1", True).response == "It is \\boxed{2}." and not item_of(plain, response, "1", True).is_truncated
    assert item_of(chat, response, "1", True).response == response and item_of(chat, response, "1", True).is_truncated
    assert first_turn("<think>a\nUser: b") == "<think>a\nUser: b"
    assert first_turn("<think>a\nUser: b</think>c\nUser: d") == "<think>a\nUser: b</think>c"


def test_trap_8_a_context_that_ends_inside_think_has_no_answer(tmp_path: Path) -> None:
    (question,) = load("aime24", written(tmp_path / "a.jsonl", [{"problem": "1 + 1?", "answer": "2"}]))
    said = {
        "cut": ("<think>it is \\boxed{2}", True, "truncated"),
        "left open": ("<think>it is \\boxed{2}", False, "no_format"),
        "whole": ("\\boxed{2}", False, "right"),
        # the harnesses look for an answer in what was cut, too: one that is closed, after the thinking
        "cut behind its answer": ("<think>a</think>So it is \\boxed{2}. Next, let", True, "right"),
        "cut in a second answer": ("It is \\boxed{2}. No: it is \\boxed{1", True, "truncated"),
        "cut without an answer": ("The answer is 2", True, "truncated"),
    }
    protocol = SETS["aime24"].protocol
    with Grader(grade_config(protocol, GradeConfig())) as grader:
        graded = grader.grade([item_of(question, text, id_, is_cut, protocol.takes_cut) for id_, (text, is_cut, _) in said.items()])
    assert [graded[id_].outcome for id_ in said] == [outcome for _, _, outcome in said.values()]
    assert item_of(question, said["cut behind its answer"][0], "1", True).is_truncated  # a protocol may say otherwise


def test_the_forms_of_aime_and_gsm8k(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        [
            {"id": 60, "problem": "a", "solution": "so \\boxed{204}"},  # math-ai/aime24
            {"ID": "2024-II-4", "Problem": "b", "Solution": "s", "Answer": 33},  # Maxwell-Jia/AIME_2024
            {"question": "c", "answer": "073"},
        ],
    )
    assert [(one.id, one.gold) for one in load("aime24", path)][:2] == [("60", "204"), ("2024-II-4", "33")]
    assert load("aime24", path)[2].gold == "73"
    path = written(tmp_path / "g.jsonl", [{"question": "a", "answer": "2 * 600 = 1,200\n#### 1,200"}])
    assert load("gsm8k", path)[0].gold == "1200"


def test_all_that_is_wrong_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"problem": "a", "answer": "1", "unique_id": "x"}),
        json.dumps({"problem": "b", "unique_id": "y"}),
        "not JSON",
        json.dumps({"problem": "", "answer": "1"}),
        json.dumps({"problem": "c", "answer": "2", "unique_id": "x"}),
        json.dumps({"problem": "d", "answer": ["2"]}),
    ]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        load("math500", path)
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == [f"{path}:{number}" for number in (2, 3, 4, 5, 6)]
    assert "no field 'answer'" in caught.value.problems[0].found
    assert f"the id 'x' of {path}:1" in caught.value.problems[3].found
    for name, file in (("math", path), ("math500", tmp_path / "none.jsonl")):
        with pytest.raises(InputError):
            load(name, file)
    with pytest.raises(InputError, match="no question"):
        load("math500", written(tmp_path / "b.jsonl", []))
    with pytest.raises(InputError, match="an integer from 0 to 999"):
        load("aime24", written(tmp_path / "c.jsonl", [{"problem": "a", "answer": "1000"}]))


def test_another_number_of_questions_is_said_and_a_task_changes_the_protocol(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"problem": text, "answer": "1"} for text in "abc"])
    notes = ("3 questions, where the published set has 30",)
    assert read("aime24", path).notes == notes
    task = tasks.read("mine", TaskConfig(set="aime24", path=path, num_samples=16, limit=2, chat=True))
    assert task.protocol == replace(SETS["aime24"].protocol, num_samples=16) and len(task.questions) == 2
    assert task.origin["notes"] == list(notes) and task.origin["num_questions"] == 3
    assert isinstance(task.questions[0].prompt, tuple)
    with pytest.raises(InputError, match="tasks.aime24.path"):
        tasks.read("aime24", TaskConfig())


# ---------------------------------------------------------------- GPQA-Diamond


def gpqa_file(folder: Path, num_questions: int = 198) -> Path:
    path = folder / "gpqa_diamond.csv"
    names = [
        "Record ID",
        "Question",
        "Correct Answer",
        "Incorrect Answer 1",
        "Incorrect Answer 2",
        "Incorrect Answer 3",
        "High-level domain",
    ]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for number in range(num_questions):
            options = [f"{number}-[2,3-d]pyridine\n", f"{number} [3+2] a, or b", f"{number} c", f"{number} d\n"]
            writer.writerow([f"rec{number}", f"Which, of {number}?\nTwo lines.", *options, "Chemistry"])
    return path


def test_gpqa_in_the_harness_s_layout_is_right_at_d_for_every_question(tmp_path: Path) -> None:
    loaded = read("gpqa_diamond", gpqa_file(tmp_path))
    assert loaded.notes == () and Counter(one.gold for one in loaded.questions) == {"D": 198}
    first = loaded.questions[0]
    assert first.choices == ("0 c", "0 [3+2] a, or b", "0 d", "0-[2,3-d]pyridine")
    assert first.prompt == (
        "User: Return your final response within \\boxed{} and only include the letter choice (A, B, C, or D) as your final response.\n"
        "Problem: Which, of 0?\nTwo lines.\n"
        "Options: A) 0 c, B) 0 [3+2] a, or b, C) 0 d, D) 0-[2,3-d]pyridine\nAnswer:\nAssistant:"
    )
    assert first.tags == {"domain": "Chemistry", "gold": "D"}


def test_gpqa_balanced_has_each_letter_for_a_quarter_and_the_same_order_each_time(tmp_path: Path) -> None:
    path = gpqa_file(tmp_path)
    harness, balanced = load("gpqa_diamond", path), load("gpqa_diamond_balanced", path, chat=True)
    assert sorted(Counter(one.gold for one in balanced).values()) == [49, 49, 50, 50]
    assert balanced == load("gpqa_diamond_balanced", path, chat=True)
    for one, other in zip(harness, balanced, strict=True):
        assert one.id == other.id and sorted(one.choices) == sorted(other.choices)
        assert one.choices["ABCD".index(one.gold)] == other.choices["ABCD".index(other.gold)]  # the same answer is right
    assert len({one.choices.index(min(one.choices)) for one in balanced}) == 4  # the wrong ones are drawn, too


def test_trap_2_the_rate_of_each_letter_shows_a_model_that_prefers_one(tmp_path: Path) -> None:
    path = gpqa_file(tmp_path)
    always_d = "The best is \\boxed{D}"
    assert scores("gpqa_diamond", load("gpqa_diamond", path), [always_d] * 198) == {"right": 198}
    balanced = load("gpqa_diamond_balanced", path)
    assert scores("gpqa_diamond_balanced", balanced, [always_d] * 198)["right"] in (49, 50)
    with Grader(grade_config(SETS["gpqa_diamond"].protocol, GradeConfig())) as grader:
        said = dict(zip((one.id for one in balanced), ["\\boxed{D}"] * 99 + ["\\boxed{\\text{A}}"] * 66 + ["no idea"] * 33, strict=True))
        graded = grader.grade([item_of(one, said[one.id], one.id, False) for one in balanced])
    results = [
        Result(task="gpqa", id=one.id, sample=0, seed=0, outcome=graded[one.id].outcome, score=0.0, tags=tags_of(one, graded[one.id]))
        for one in balanced
    ]
    figures = score.of_task(results, ("domain", "gold"))
    assert figures.rates == {"letter": pytest.approx({"A": 1 / 3, "D": 1 / 2, "none": 1 / 6})}
    assert set(figures.by["gold"]) == set("ABCD")  # the score by right letter shows it too


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("\\boxed{\\text{D}}", "right"),
        ("$\\boxed{\\mathbf{(D)}}$", "right"),
        ("(D)", "right"),
        ("**D**", "right"),
        ("**Answer:** **D**", "right"),
        ("Answer: D", "right"),
        ("The answer is (D).", "right"),
        ("\\boxed{D) 0-[2,3-d]pyridine}", "right"),
        ("\\boxed{0-[2,3-d]pyridine}", "right"),  # its brackets are a part of the name
        ("\\boxed{0-pyridine}", "wrong"),
        ("\\boxed{D) 0 c}", "wrong"),  # two options
        ("\\boxed{A, D}", "wrong"),
        ("A or D", "no_format"),
        ("The answer is not D", "no_format"),
    ],
)
def test_trap_2_where_the_letter_stands(answer: str, outcome: str, tmp_path: Path) -> None:
    assert scores("gpqa_diamond", load("gpqa_diamond", gpqa_file(tmp_path, 1)), [answer]) == {outcome: 1}


def test_gpqa_tells_of_an_option_that_stands_there_twice(tmp_path: Path) -> None:
    row = {"Question": "q", "Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "a", "Incorrect Answer 3": "c"}
    loaded = read("gpqa_diamond", written(tmp_path / "a.jsonl", [row]))
    assert loaded.notes[-1].startswith("1 questions have an option twice")
    assert scores("gpqa_diamond", loaded.questions, ["\\boxed{D}"]) == {"right": 1}
    assert scores("gpqa_diamond", loaded.questions, ["\\boxed{a}"]) == {"wrong": 1}  # which of the two it means is not said


def test_a_columnar_file_gives_the_same_questions(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"problem": "a", "answer": "1", "subject": "Algebra", "level": 3, "unique_id": "x", "other": 1.5},
        {"problem": "b", "answer": "2", "subject": "Algebra", "level": None, "unique_id": "y", "other": 2.5},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load("math500", tmp_path / "a.parquet") == load("math500", written(tmp_path / "a.jsonl", rows))
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="the columns 'text'"):
        load("math500", tmp_path / "b.parquet")


# ---------------------------------------------------------------- packed tests


def packed(value: Any, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol=protocol))).decode()


class Attack:
    def __reduce__(self) -> Any:
        return print, ("run",)


def lcb(private: str, **changes: Any) -> dict[str, Any]:
    public = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
    record = {
        "question_id": "abc370_a",
        "question_content": "Add two numbers.",
        "starter_code": "",
        "contest_date": "2024-09-07T00:00:00",
        "difficulty": "easy",
        "platform": "atcoder",
        "public_test_cases": json.dumps(public),
        "private_test_cases": private,
        "metadata": "{}",
    }
    return record | changes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 100_000])
def test_private_tests_are_read_as_they_were_published(protocol: int, size: int, tmp_path: Path) -> None:
    tests = [{"input": "5 6\n" * size, "output": "caf\u00e9", "testtype": "stdin"}]
    (question,) = load("livecodebench", written(tmp_path / "a.jsonl", [lcb(packed(json.dumps(tests), protocol))]))
    assert question.tests is not None and with_cases(question.tests)["cases"] == [
        {"input": "1 2\n", "output": "3\n"},
        *tests,
    ]
    assert question.tests["kind"] == "stdin" and question.tags == {"difficulty": "easy", "platform": "atcoder"}
    (plain,) = load("livecodebench", written(tmp_path / "b.jsonl", [lcb(json.dumps(tests))]))
    assert plain.tests is not None and with_cases(plain.tests) == with_cases(question.tests)


@pytest.mark.parametrize(
    "private",
    [
        packed(Attack()),
        packed(["[]"]),
        packed({"a": "[]"}),
        packed(b"[]"),
        packed("not JSON"),
        base64.b64encode(zlib.compress(pickle.dumps("[]") + pickle.dumps("[]"))).decode(),
        base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-3]).decode(),
        base64.b64encode(b"[]").decode(),
        "neither",
    ],
)
def test_a_pickle_of_anything_but_one_text_is_refused_and_never_run(
    private: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="private_test_cases"):
        load("livecodebench", written(tmp_path / "a.jsonl", [lcb(private)]))
    assert "run" not in capsys.readouterr().out


def test_livecodebench_keeps_the_paper_s_window(tmp_path: Path) -> None:
    private = packed(json.dumps([{"input": "1 1", "output": "2", "testtype": "stdin"}]))
    dates = ["2024-07-31T23:00:00", "2024-08-01T00:00:00", "2025-01-31T00:00:00", "2025-02-01T00:00:00"]
    loaded = read("livecodebench", written(tmp_path / "a.jsonl", [lcb(private, contest_date=date, question_id=date) for date in dates]))
    assert [one.id for one in loaded.questions] == dates[1:3]
    assert loaded.notes == (
        "2 contests outside 2024-08 to before 2025-02 are left out",
        "2 questions, where the published set has 279",
    )
