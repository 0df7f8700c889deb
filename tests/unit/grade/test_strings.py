"""Expected strings: a share of them, or any one, in a response of any form."""

from __future__ import annotations

import pytest

from megatron_prism.grade.grader import Grader
from megatron_prism.grade.outcome import Item


@pytest.mark.parametrize(
    ("gold", "expected", "response", "outcome", "score"),
    [
        ("all", ("1234567",), " 1234567.", "right", 1.0),
        ("all", ("1234567",), " 1234568.", "wrong", 0.0),
        ("all", ("ABC", "def"), "abc, then DEF", "right", 1.0),
        ("all", ("a1", "b2", "c3", "d4"), "a1 d4", "wrong", 0.5),
        ("any", ("Denver Broncos", "Broncos"), "The broncos!", "right", 1.0),
        ("any", ("the New-York Times",), "New York Times", "wrong", 0.0),  # SQuAD's normal form joins the parts of a hyphen
        ("any", ("the New-York Times.",), "It is a NewYork Times", "right", 1.0),
        ("any", ("The",), "none", "wrong", 0.0),  # nothing is left of an article
        ("any", ("x",), "", "wrong", 0.0),
        ("", ("x",), "x", "fault", None),
        ("all", (), "x", "fault", None),
        ("all", ("",), "x", "fault", None),
    ],
)
def test_strings(gold: str, expected: tuple[str, ...], response: str, outcome: str, score: float | None) -> None:
    item = Item(id="a", kind="strings", gold=gold, choices=expected, response=response, is_truncated=True)
    with Grader() as grader:
        graded = grader.grade([item])["a"]
    assert (graded.outcome, graded.score) == (outcome, score)
