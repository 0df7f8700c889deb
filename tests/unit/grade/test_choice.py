"""Multiple choice: the letter that a response commits to, and the seeded order of options."""

from __future__ import annotations

import pytest

from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.grade import choice
from megatron_prism.grade.grader import Grader
from megatron_prism.grade.outcome import Item

CHOICES = ("9.8 m/s", "the Sun", "the Moon", "42")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (r"\boxed{B}", "right"),
        (r"\boxed{(B)}", "right"),
        (r"\boxed{\text{B}}", "right"),
        (r"\boxed{b}", "right"),
        (r"\boxed{the  Sun}", "right"),
        (r"\boxed{\text{the Sun}}", "right"),
        (r"\boxed{\textbf{(B) }\text{the Sun}}", "right"),  # AMC's form
        (r"\boxed{\textbf{(B)}\ the~Sun}", "right"),
        (r"\boxed{B. (B) the Sun}", "right"),
        (r"\boxed{" + "B) " * 2000 + "}", "wrong"),
        (r"\boxed{Option B}", "right"),
        ("Answer: choice (B)", "right"),
        (r"\boxed{\text{Option B: the Sun}}", "right"),
        (r"\boxed{Option B: the Moon}", "wrong"),
        (r"\boxed{Option A or option B}", "wrong"),
        (r"\boxed{" + "option " * 2000 + "B}", "wrong"),
        (r"\boxed{\(B\)}", "right"),
        (r"Answer: \(B\)", "right"),
        (r"Answer: $B$.", "right"),
        (r"\boxed{\textbf{(B) }\text{the Moon}}", "wrong"),
        (r"\boxed{\textbf{(A)}\textbf{(B)}}", "wrong"),
        ("so\nAnswer: B", "right"),
        ("so\n**Answer: B**", "right"),
        ("so\n**Answer:** (B)", "right"),
        ("Final answer: the Sun", "right"),
        ("Answer: A\nNo.\nAnswer: B", "right"),
        ("B", "right"),
        (r"\boxed{A} No. \boxed{B}", "right"),  # the last one counts
        (r"\boxed{A} or \boxed{B}", "wrong"),  # both
        (r"\boxed{A}\boxed{B}", "wrong"),
        (r"\boxed{B} or \boxed{A}", "wrong"),
        (r"\boxed{A, B}", "wrong"),
        (r"\boxed{AB}", "wrong"),
        (r"\boxed{E}", "wrong"),
        (r"\boxed{the Sun or the Moon}", "wrong"),
        ("Answer: B\nAnswer: A", "wrong"),
        ("Answer: A or B", "wrong"),
        ("Answer: B\n\\boxed{A}", "wrong"),  # a box goes before a line
        ("\\boxed{\u0412}", "wrong"),  # a Cyrillic letter
        ("\\boxed{\uff22}", "wrong"),  # a wide one
        (r"\boxed{}", "no_format"),
        ("Answer: B \\boxed{A", "no_format"),
        ("A B C D", "no_format"),
        ("It is B.", "no_format"),
    ],
)
def test_which_letter_was_chosen(answer: str, outcome: str) -> None:
    with Grader() as grader:
        (graded,) = grader.grade([Item(id="1", kind="choice", gold="B", choices=CHOICES, response=f"<think>B</think>{answer}")]).values()
    assert graded.outcome == outcome, graded.why


def test_a_text_that_two_options_have_is_no_choice() -> None:
    assert choice.chosen("same", ("same", "same", "other")) is None
    assert choice.chosen("other", ("same", "same", "other")) == "C"


def test_a_gold_beyond_the_options_is_a_fault() -> None:
    with Grader(GradeConfig(think="free")) as grader:
        (graded,) = grader.grade([Item(id="1", kind="choice", gold="E", choices=CHOICES, response="E")]).values()
    assert graded.outcome == "fault"


def test_the_seed_alone_decides_the_order() -> None:
    shuffled, gold = choice.shuffle(CHOICES, "B", "seed/7")
    assert (shuffled, gold) == choice.shuffle(CHOICES, "B", "seed/7")
    assert shuffled["ABCD".index(gold)] == "the Sun"
    assert sorted(shuffled) == sorted(CHOICES)
    golds = [choice.shuffle(CHOICES, "B", f"seed/{index}")[1] for index in range(400)]
    assert all(60 < golds.count(letter) < 140 for letter in "ABCD")  # by no letter's preference
