"""The exact fast path: what it decides is decided as algebra decides it, and what is ambiguous is left to algebra."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from bench import agree
from megatron_prism.grade import exact


@pytest.mark.parametrize(
    ("gold", "answer", "is_right"),
    [
        ("-50", r"\frac{-100}{2}", True),
        (r"3\sqrt{13}", r"\sqrt{117}", True),
        (r"3\sqrt{13}", r"4\sqrt{13}", False),
        (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}", True),
        (r"\frac{\pi}{6}", r"\pi/6", True),
        (r"7\pi", "21.9", False),
        ("x^2-1", "(x+1)(x-1)", True),
        ("(a+5)(b+2)", "(a+6)(b+2)", False),
        (r"1\frac{4}{5}", r"\frac{9}{5}", True),
        ("1,-2", "-2, 1", True),
        ("1,-2", "1,-3", False),
        (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
        ("(3,5)", "(5,3)", False),
        ("(2,4]", "(3,4]", False),
        (r"(2,\infty)", r"(3,\infty)", False),
        (r"\begin{pmatrix} 1/5 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac15 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", False),
        ("y = 2x+3", "y = 3+2x", True),
        ("x=5", "5+1", False),
        (r"90^\circ", r"90^\circ+1", False),
        ("52_8", "62_8", False),
    ],
)
def test_what_is_decided(gold: str, answer: str, is_right: bool) -> None:
    assert exact.compare(gold, answer) is is_right


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2x", "x/2"),  # of x, or under the stroke
        ("2(3)", "6"),  # math-verify reads a mixed number
        ("x(x+1)", "x^2+x"),  # a product, or the function x
        ("5m", "5"),  # a unit, or a letter
        ("1,000", "1000"),  # a thousand, or a list
        ("(1+i)(1-i)", "2"),
        ("3R^2", "3r^2"),
        ("0.333333", "1/3"),
        (r"\sqrt{2}", "1.414214"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "1,2"),
        ("(4,3]", "(2,1]"),
        ("ab", "ba"),
        ("x", r"1 \cdot x"),
        (r"1 \pm \sqrt{19}", r"1 \pm \sqrt{19}+1"),
        (r"\sin x", r"\sin x"),
        (r"x^{\frac{1}{2}}", r"\sqrt{x}"),
        ("x=5", "y=5"),
        ("9^9^9^9", "3"),
        (r"0\infty", "0"),
        ("\u0664\u0662", "42"),
    ],
)
def test_what_could_be_read_in_two_ways_is_left_undecided(gold: str, answer: str) -> None:
    assert exact.compare(gold, answer) is None


def test_a_bomb_is_left_undecided_at_once() -> None:
    start = time.process_time()
    for bomb in ("((((x+y+1)^12)^12)^12)^12", "(" * 290, "9^{12}" * 40, r"\sqrt{999983}" * 20, "(x+1)" * 55, "1" * 299, "," * 299):
        assert exact.compare("x+1", bomb) in (None, False)
    assert time.process_time() - start < 2


def apart(compare: Callable[[str, str], bool | None], num_decided: int) -> Counter[str]:
    """Count generated pairs that are decided, and those on which math-verify says another thing. bench/agree.py runs thousands."""
    draw, counts = random.Random(7), Counter[str]()
    while counts["decided"] < num_decided:
        gold = agree.value(draw)
        answer = agree.mutated(draw, gold, [agree.value(draw)])
        ours = compare(gold, answer) if answer.strip() else None
        if ours is not None:
            counts["decided"] += 1
            counts["right"] += ours
            counts["apart"] += ours is not agree.by_math_verify(gold, answer)
    return counts


@pytest.mark.parametrize(
    "answer", [r"(((\pi^{12})^{12})^{12})^{12}", r"(1/\pi^{12})^{12}", r"((\pi^{12})^{12})^{12} - 1", "((x^{12})^{12})^{12}"]
)
@pytest.mark.parametrize("gold", ["5", r"2\pi", "x", "(1,2)"])
def test_a_power_beyond_a_float_is_left_undecided(gold: str, answer: str) -> None:
    """It raised OverflowError, by which an answer made itself a fault, where it is wrong."""
    assert exact.compare(gold, answer) is None
    assert exact.are_apart(answer, "5") is False


def test_generated_pairs_are_decided_as_math_verify_does() -> None:
    logging.disable(logging.CRITICAL)  # math-verify's
    try:
        counts = apart(exact.compare, 200)
        assert counts["apart"] == 0 and 40 < counts["right"] < 160
        assert apart(lambda gold, answer: len(gold) == len(answer), 40)["apart"] > 4  # the control: texts of one length
    finally:
        logging.disable(logging.NOTSET)
