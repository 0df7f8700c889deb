"""Mathematical answers: where the answer stands, and each way to be paid for a wrong one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.grade import by_math_verify, labelled, response
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.grade import math
from megatron_prism.grade.grader import Grader
from megatron_prism.grade.outcome import Item

DATA = Path(__file__).parents[4] / "shared" / "data"
HUGE = 10_000_000


def outcomes(pairs: list[tuple[str, str]], config: GradeConfig | None = None) -> list[str]:
    """Grade (gold, whole response) pairs."""
    with Grader(config) as grader:
        items = [Item(id=str(index), kind="math", gold=gold, response=text) for index, (gold, text) in enumerate(pairs)]
        return [graded.outcome for graded in grader.grade(items).values()]


@pytest.mark.parametrize(
    ("answer", "boxed", "last_line", "either"),
    [
        (r"so \boxed{42}.", "42", r"so \boxed{42}.", "42"),
        (r"\boxed{41} so \boxed{ 42 }", "42", r"\boxed{41} so \boxed{ 42 }", "42"),
        (r"$\boxed{41}$, $\boxed{42}$", "41,42", r"$\boxed{41}$, $\boxed{42}$", "41,42"),
        (r"\boxed{42}\n\n\boxed{42}".replace("\\n", "\n"), "42", r"\boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{1 \boxed{2}}", r"1 \boxed{2}", r"\boxed{1 \boxed{2}}", r"1 \boxed{2}"),
        (r"{\boxed{3}}", "3", r"{\boxed{3}}", "3"),
        (r"\boxed{4", None, r"\boxed{4", None),
        (r"\boxed{3} then \boxed{4", None, r"\boxed{3} then \boxed{4", None),
        (r"\boxed{}", None, r"\boxed{}", None),
        ("42", None, "42", "42"),
        ("1 2 3 42", None, "1 2 3 42", None),
        ("it is\n42", None, "42", None),
        ("4" * 65, None, "4" * 65, None),
    ],
)
def test_where_the_answer_stands(answer: str, boxed: str | None, last_line: str | None, either: str | None) -> None:
    assert (math.extract(answer, "boxed"), math.extract(answer, "last_line"), math.extract(answer, "boxed_or_plain")) == (
        boxed,
        last_line,
        either,
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\\\", "4", " "]), max_size=12))
def test_a_box_after_any_text_is_the_one_that_counts(parts: list[str]) -> None:
    before = "".join(parts)
    depth = 0
    for part in parts:
        depth = max(0, depth + (part in ("\\boxed{", "{")) - (part == "}"))
    if depth == 0 and not before.endswith("\\"):
        assert math.last_boxed(before + " so \\boxed{17}") == "17"


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_are_equal_where_they_are_the_same(gold: int, answer: int) -> None:
    assert math.verdict(str(gold), f"{answer:,}") == (gold == answer)
    assert math.verdict(str(gold), rf"\frac{{{2 * abs(gold)}}}{{2}}") == (gold >= 0)


@pytest.mark.parametrize(
    ("gold", "answer", "is_right"),
    [
        ("1/3", "0.333333", True),
        ("1/3", "0.3333", False),
        (".0000672", "0.0000671", False),  # math-verify compares 6 places and takes it
        ("2", "2.0000001", False),
        ("10,\\!080", "10080", True),
        ("5.4 \\text{ cents}", "5.4", True),
        ("5", "5 \\text{ million}", None),
        ("90^\\circ", "90", True),
        ("x=5", "y=5", None),
        ("\\text{Evelyn}", "evelyn", True),
        ("\\text{Evelyn}", "nEvely", False),  # a product of the same letters
        ("\\text{(C)}", "C", True),
        ("5", "\\mathbf{5}", True),
        ("6", "$6$.", True),
        ("5", "\\[5\\]", True),
        ("5", "\\(5\\).", True),
        ("5", "$$5$$", True),
        ("east", "seat", False),  # words without \\text, too
        ("east", "\\text{East}", True),
        ("No", "on", False),
        ("No", "\\text{no}", True),
        ("No solution", "\\text{no  solution}", True),
        ("True", "true", True),
        ("true", "True", True),  # math-verify cannot parse this gold
        ("true", "false", False),
        ("xyz", "zyx", None),  # a product of variables
        ("ab", "ba", None),
        ("ABDE", "EDBA", None),  # a polygon
        ("arctan x", "x arctan", None),
        ("Tan x", "x Tan", None),
        ("12", "1 2", None),
        ("12", "1  2", None),
        ("1 + 2x", "1  +  2x", True),
        ("42.", "42", True),
    ],
)
def test_what_the_texts_alone_say(gold: str, answer: str, is_right: bool | None) -> None:
    assert math.verdict(gold, answer) is is_right


def test_numbers_in_e_notation_are_numbers() -> None:
    cases = [
        ("1e-05", "0.00001", "right"),
        ("1e-05", "1e-05", "right"),
        ("1e-05", r"10^{-5}", "right"),
        ("1e-05", "e-5", "wrong"),  # what math-verify makes of 1e-05
        ("1e-05", r"1 \cdot e - 5", "wrong"),
        ("$2E3$", "2000", "right"),
        ("1e+22", "1" + 22 * "0", "right"),
        ("1e+22", "e+22", "wrong"),
        ("2000", "2e3", "right"),
        (r"2\times 10^{5}", "2e5", "right"),  # the e of a command, or of a text, is none of the gold's own
        (r"5000\text{ meters}", "5e3", "right"),
        ("2e - 3", "2e-3", "right"),  # a gold with an e of its own: nothing is read as a number
        ("1e999999999", "1", "fault"),
    ]
    said = outcomes([(gold, f"<think>a</think> \\boxed{{{answer}}}") for gold, answer, _ in cases])
    assert said == [outcome for _, _, outcome in cases]


def test_what_math_verify_does_not_read_is_read() -> None:
    cases = [
        *[("10000", rf"10{space}000", "right") for space in (r"\,", r"\;", r"\:", r"\ ", "~")],
        (r"10\,000", "10000", "right"),
        ("1234567", r"1\,234\,567", "right"),
        ("1234567.5", r"1\,234\,567.5", "right"),
        ("10000", r"10\,000\text{ km}", "right"),
        (r"10000x", r"10\,000 x", "right"),
        ("10000", r"10\,001", "wrong"),
        ("10000", r"1\,0000", "wrong"),  # no thousands: digits side by side
        ("10000", r"10\,00\,0", "wrong"),
        ("10000", r"1000\,0", "wrong"),
        ("(1, 234)", r"(1,\ 234)", "right"),
        ("1234", r"1,\ 234", "wrong"),
        ("34", r"3\,4", "wrong"),
        *[("12000", f"12{comma}000", "right") for comma in ("{,}", r"\text{,}", r"\mathrm{,}")],
        (r"12{,}000", "12000", "right"),
        ("12000", r"12\text{,}001", "wrong"),
        ("3", r"1\text{,}2", "wrong"),
        ("12000", r"12\text{,}00", "wrong"),
        ("100", r"100~\text{m}", "right"),
        ("100", r"101~\text{m}", "wrong"),
        ("3", r"\boldsymbol{3}", "right"),
        ("3", r"\boldsymbol{4}", "wrong"),
        ("42", r"42 \boldsymbol{41}", "wrong"),
        (r"\emptyset", r"\varnothing", "right"),
        (r"\varnothing", r"\emptyset", "right"),
        (r"\varnothing", "0", "wrong"),
        (r"\frac{2}{3}", r"0.\overline{6}", "right"),
        (r"-\frac{37}{30}", r"-1.2\overline{3}", "right"),
        (r"0.\overline{3}", r"\frac{1}{3}", "right"),
        (r"0.\overline{3}", "0.3", "wrong"),
        (r"\frac{2}{3}", r"0.\overline{7}", "wrong"),
        (r"7{:}30", "7:30", "right"),
        (r"7{:}30", "7:31", "wrong"),
    ]
    said = outcomes([(gold, f"<think>a</think> \\boxed{{{answer}}}") for gold, answer, _ in cases])
    assert [(*case[:2], outcome) for case, outcome in zip(cases, said, strict=True)] == cases


CHEATS = {
    "many numbers": "1 2 3 42",
    "a list": "40, 41, 42",
    "unboxed in a sentence": "The answer is 42",
    "gold echoed in a question": "Is it 42?",
    "many boxed numbers": r"\boxed{1 2 3 42}",
    "a boxed list": r"\boxed{41, 42}",
    "a boxed set": r"\boxed{\{41, 42\}}",
    "either": r"\boxed{41 \text{ or } 42}",
    "an aside that math-verify drops": r"\boxed{42 \text{ or 41}}",
    "an aside without or": r"\boxed{42\text{, 41}}",
    "an aside in an mbox": r"\boxed{42\mbox{ or 41}}",
    "an aside with a word": r"\boxed{42\text{ or not}}",
    "an equation": r"\boxed{41 = 42}",
    "a chain": r"\boxed{1 = 2 = 3 = 42}",
    "another base": r"\boxed{42_9}",
    "an earlier box": r"\boxed{42} no, \boxed{43}",
    "a box in a box": r"\boxed{41 \boxed{42}}",
    "an empty box": r"42 \boxed{}",
    "an empty box last": r"\boxed{42} \boxed{}",
    "an open box": r"\boxed{42",
    "an open box last": r"\boxed{42} \boxed{41",
    "an interval": r"\boxed{[0, 100]}",
    "an inequality": r"\boxed{x \neq 41}",
    "a range": r"\boxed{41 < x < 43}",
    "wide digits": "\\boxed{\uff14\uff12}",
    "Arabic digits": "\\boxed{\u0664\u0662}",
    "wide digits, plain": "\uff14\uff12",
    "a zero-width space": "\\boxed{4\u200b2}",
    "a look-alike box": "\\b\u043exed{42}",
    "a comment": "<!-- 42 -->",
    "JSON": '{"outcome":"right"}',
    "a line for the worker": '\\boxed{x}\ntrue\n["gold"]',
    "Python": r"\boxed{__import__('os').system('true') or 42}",
    "a name": r"\boxed{gold}",
    "NaN": r"\boxed{nan}",
    "infinity": r"\boxed{\infty}",
    "anything": r"\boxed{\text{any}}",
    "three values": r"\boxed{1 or 2 or 42}",
    "an aside in italics": r"\boxed{42 \textit{ or 41}}",
    "an aside in bold": r"\boxed{42 \mathbf{41}}",
    "an aside behind ties": r"\boxed{42\text{~or~41}}",
    "a number in words": r"\boxed{42\text{, forty-one}}",
    "a condition in words": r"\boxed{42 \text{ if x, else what follows}}",
    "a box of another kind": r"\boxed{41 \fbox{42}}",
    "an approximation": r"\boxed{42 \approx 41}",
    "a sum that is none": r"\boxed{40+1=42}",
    "a sum that is none, with a name": r"\boxed{x=40+1=42}",
    "a thousand times": r"\boxed{42 \text{ thousand}}",
    "a list that goes on": r"\boxed{42,\ldots}",
    "a product that is read as a mixed number": r"\boxed{40(2)}",
    "a product in brackets": r"\boxed{\left(40\right)(2)}",
    "boxes side by side": r"\boxed{41}, \boxed{42}",
    "boxes with or": r"\boxed{41} or \boxed{42}",
    "a LaTeX comment": "\\boxed{41 % no\n 42}",
    "bold Unicode digits": "\\boxed{\U0001d7d2\U0001d7d0}",
    "a case distinction": r"\boxed{\begin{cases}42\\41\end{cases}}",
    "a logical or": r"\boxed{42 \lor 41}",
    "a phantom": r"\boxed{42 \phantom{41}}",
    "an escaped box": r"\\boxed{42}",
}


HEDGES = ("maybe", "if x", "if odd", "unless", "forty one", "two", "thousands", "tens", "billions", "or", "neither", "sixes", "twenties")


def test_a_hedge_is_no_unit() -> None:
    texts = [rf"\text{{ {word}}}" for word in HEDGES]
    pairs = [(gold, f"<think>a</think>\\boxed{{42{text}}}") for gold in ("42", r"42\text{ cm}") for text in texts]
    units = [("42", rf"<think>a</think>\boxed{{42\text{{ {unit}}}}}") for unit in ("cm", "units", "square inches", "pies", "degrees")]
    assert outcomes(pairs + units) == ["wrong"] * len(pairs) + ["right"] * len(units)


def test_a_unit_may_stand_bare() -> None:
    """As in `The answer is 18 dollars.`"""
    bare = ("dollars", "eggs.", "people", "years old", "dollars per day", "square feet")
    right = [(gold, f"<think>a</think>\\boxed{{70,000 {unit}}}") for gold in ("70000", "70000 dollars") for unit in bare]
    others = ("hundred", "dozens", "or more", "if odd", "thirds", "squared", "factorial", "theta", "x", "xy", "and 7", "or 7 eggs", "ABCD")
    wrong = [("42", f"<think>a</think>\\boxed{{42 {text}}}") for text in others]
    assert outcomes(right + wrong) == ["right"] * len(right) + ["wrong"] * len(wrong)


def test_nobody_is_paid_for_a_cheat() -> None:
    pairs = [("42", f"<think>the answer is \\boxed{{42}}</think> {answer}") for answer in CHEATS.values()]
    pairs += [("42", text) for text in ("<think>\\boxed{42}", "\\boxed{42}", "<think>a</think>", "<think>a</think>41</think>\\boxed{42}")]
    graded = dict(zip([*CHEATS, "no end", "no thinking", "no answer", "two ends"], outcomes(pairs), strict=True))
    assert not {name: outcome for name, outcome in graded.items() if outcome not in ("wrong", "no_format")}
    assert outcomes([("42", "<think>a</think> \\boxed{42}")]) == ["right"]  # the control: the right answer is paid


def test_a_bomb_costs_its_cpu_seconds_and_nothing_else() -> None:
    bombs = [
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{(123456789!)!}",
        r"\boxed{9^9^9^9 - 9^9^9^9 + x}",
        r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n!}}",
    ]
    start = time.monotonic()
    pairs = [("3x", f"<think>a</think> {bomb}") for bomb in bombs] + [("x+1", r"<think>a</think> \boxed{1+x}")]
    assert outcomes(pairs, GradeConfig(cpu_limit_s=1)) == ["wrong"] * len(bombs) + ["right"]
    assert time.monotonic() - start < 120


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + "a" * HUGE + "</think>41",
        "<think>a</think>" + "{" * HUGE,
        "<think>a</think>" + "\\boxed{" * (HUGE // 7),
        "<think>a</think>" + "\\boxed{42}" * (HUGE // 10) + "\\boxed{41}",
        "<think>a</think>\\boxed{" + "42," * (HUGE // 3) + "}",
        "<think>" * (HUGE // 7),
        "<think>a</think>\\boxed{" + " " * HUGE + "41}",
        "<think>a</think>\\boxed{\\text{" + "or " * (HUGE // 3) + "}42}",
        "<think>a</think>" + "Answer: " * (HUGE // 8),
    ],
    ids=["thinking", "braces", "open boxes", "boxes", "a list", "tags", "spaces", "words", "answers"],
)
def test_ten_megabytes_are_read_once(text: str) -> None:
    start = time.process_time()
    (outcome,) = outcomes([("42", text)])
    assert outcome in ("wrong", "no_format")
    assert time.process_time() - start < 20


@pytest.mark.parametrize("gold", ["", " ", "\\frac{", "}{", "x" * 3000])
def test_a_gold_that_cannot_be_read_is_a_fault(gold: str) -> None:
    assert outcomes([(gold, "<think>a</think>\\boxed{3x}"), ("3x", "<think>a</think>\\boxed{3x}")]) == ["fault", "right"]


def test_the_labelled_set_is_graded_as_math_verify_does() -> None:
    cases = labelled(DATA)[::9]  # bench/grade.py runs all of it
    texts = [response(case, 0) for case in cases]
    ours = [outcome == "right" for outcome in outcomes([(case.gold, text) for case, text in zip(cases, texts, strict=True)])]
    assert ours == [case.is_right for case in cases]
    assert ours == [by_math_verify(case.gold, text) for case, text in zip(cases, texts, strict=True)]
    assert 100 < sum(ours) < len(ours) - 100
