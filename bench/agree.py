"""The exact fast path of the math grader against math-verify, on generated pairs: every pair that ours decides is decided by math-verify too.

Run: python -m bench.agree [--pairs N] [--seed N] [--data FOLDER]
A gold is drawn from a grammar of answers (polynomials, roots, pi, mixed numbers, decimals, tuples, intervals, sets, matrices, equations, degrees,
bases), or from the golds of FOLDER (bench/grade.py). Its answer is the gold in another form, with another number, with a token deleted, doubled,
swapped or inserted, a decimal near it, or another gold. Prints how many pairs were decided, and each on which the two are apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import time
from collections import Counter
from pathlib import Path

from bench.grade import golds
from megatron_prism.grade import exact
from megatron_prism.grade.scalar import Scalar, Undecided, value_of
from megatron_prism.grade.workers import compared

TOKENS = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+|[A-Za-z]|\s+|.", re.DOTALL)
INSERTED = [
    *"0123456789+-*/^_(){}[],.= xyabi",
    r"\pi",
    r"\sqrt",
    r"\frac",
    r"\cdot",
    r"\left",
    r"\right",
    r"\pm",
    r"\infty",
    r"^\circ",
    "12",
    r"\,",
    r"\!",
    "%",
]


def number(draw: random.Random) -> str:
    return str(draw.choice([draw.randint(0, 9), draw.randint(2, 30), draw.randint(10, 5000)]))


def atom(draw: random.Random) -> str:
    kind = draw.randrange(9)
    a, b = draw.randint(1, 12), draw.randint(1, 12)
    return [
        number(draw),
        number(draw),
        draw.choice("xyzknpqrabuv"),
        r"\pi",
        rf"\sqrt{{{draw.randint(2, 60)}}}",
        rf"\frac{{{a}}}{{{b}}}",
        rf"\frac{a % 9 + 1}{b % 9 + 1}",
        f"{draw.randint(0, 30)}.{draw.randint(1, 999)}",
        rf"\sqrt{draw.randint(2, 9)}",
    ][kind]


def product(draw: random.Random, depth: int) -> str:
    factors = [atom(draw)]
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2])):
        factors.append(
            draw.choice(["", "", " ", r" \cdot ", "*", "/"]) + (atom(draw) if draw.random() < 0.7 else f"({scalar(draw, depth + 1)})")
        )
    text = "".join(factors)
    if draw.random() < 0.15:
        text += draw.choice(["^2", "^3", "^{2}", "^{12}", "^{-1}"])
    return text


def scalar(draw: random.Random, depth: int = 0) -> str:
    """Return a scalar's text."""
    if depth > 2:
        return number(draw)
    if draw.random() < 0.1:
        return rf"\frac{{{scalar(draw, depth + 1)}}}{{{draw.choice([number(draw), scalar(draw, depth + 2)])}}}"
    text = draw.choice(["", "", "-"]) + product(draw, depth)
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2, 3])):
        text += draw.choice(["+", "-", " + ", " - "]) + product(draw, depth)
    return text


def value(draw: random.Random) -> str:
    """Return a whole answer's text."""
    kind = draw.choice(
        ["scalar"] * 6 + ["tuple", "tuple", "interval", "set", "list", "pm", "matrix", "equation", "degrees", "base", "mixed", "infinite"]
    )
    simple = [draw.choice(["", "-"]) + atom(draw) if draw.random() < 0.7 else scalar(draw, 1) for _ in range(draw.randint(2, 4))]
    integers = [str(draw.randint(-40, 40)) for _ in simple]
    elements = integers if draw.random() < 0.4 else simple
    comma, between, equals = draw.choice([", ", ","]), draw.choice([" & ", r" \\ "]), draw.choice([" = ", "="])
    degree, base = draw.choice([r"\circ", r"{\circ}"]), draw.choice(["8", "{9}", "5"])
    return {
        "scalar": scalar(draw),
        "tuple": f"({comma.join(elements)})",
        "interval": draw.choice("([") + comma.join(elements[:2]) + draw.choice(")]"),
        "set": rf"\{{{comma.join(elements)}\}}",
        "list": comma.join(elements),
        "pm": rf"{atom(draw)} \pm {atom(draw)}",
        "matrix": rf"\begin{{pmatrix}} {between.join(elements)} \end{{pmatrix}}",
        "equation": f"{draw.choice('xyzk')}{equals}{scalar(draw, 1)}",
        "degrees": f"{number(draw)}^{degree}",
        "base": f"{number(draw)}_{base}",
        "mixed": rf"{number(draw)}\frac{{{draw.randint(1, 5)}}}{{{draw.randint(6, 9)}}}",
        "infinite": draw.choice([rf"(-\infty{comma}{elements[0]}]", rf"[{elements[0]}{comma}\infty)", rf"({elements[0]}{comma}\infty)"]),
    }[kind]


def rendered(scalar_: Scalar) -> str:
    """Return a scalar as its terms, in another order than it came in."""
    terms = []
    for (radicand, atoms), factor in reversed(scalar_.items()):
        text = str(abs(factor.numerator)) if factor.denominator == 1 else rf"\frac{{{abs(factor.numerator)}}}{{{factor.denominator}}}"
        if radicand > 1:
            text += rf"\sqrt{{{radicand}}}"
        for name, exponent in atoms:
            text += (
                r" \cdot "
                + (r"\pi" if name == "pi" else r"\infty" if name == "oo" else name)
                + (f"^{{{exponent}}}" if exponent != 1 else "")
            )
        terms.append(("-" if factor < 0 else "+") + text)
    return "".join(terms).removeprefix("+") or "0"


def mutated(draw: random.Random, gold: str, pool: list[str]) -> str:
    """Return an answer to a gold."""
    kind = draw.choice(["same", "form", "form", "number", "number", "number", "edit", "edit", "near", "other", "order", "plus"])
    tokens = TOKENS.findall(gold)
    at = draw.randrange(len(tokens)) if tokens else 0
    numbers = [index for index, token in enumerate(tokens) if token.isdigit()]
    if kind == "form":
        try:
            read = exact.read(gold)
        except Undecided:
            return gold.replace(r"\frac", r"\dfrac").replace(" ", "")
        return (
            rendered(read.parts[0]) if read.kind == "scalar" else gold.replace(",", " , ").replace("(", r"\left(").replace(")", r"\right)")
        )
    if kind == "number" and numbers:
        at = draw.choice(numbers)
        tokens[at] = str(max(0, int(tokens[at]) + draw.choice([-2, -1, 1, 1, 2, 10])))
    elif kind == "edit" and tokens:
        for _ in range(draw.choice([1, 1, 2])):
            at = draw.randrange(len(tokens))
            edit = draw.randrange(4)
            tokens[at : at + 1] = [[], [tokens[at]] * 2, [draw.choice(INSERTED)], [tokens[at], draw.choice(INSERTED)]][edit]
            tokens = tokens or ["0"]
    elif kind == "near":
        try:
            number_ = value_of(exact.read(gold).parts[0])
        except (Undecided, IndexError):
            return gold
        return f"{number_:.{draw.choice([1, 2, 3, 5, 6, 7, 9])}f}" if abs(number_) < 1e9 else gold
    elif kind == "other":
        return draw.choice(pool)
    elif kind == "order":
        return ",".join(gold.split(",")[::-1])
    elif kind == "plus":
        return gold + draw.choice(["+1", "-1", "+0", "/1", " "])
    return "".join(tokens)


def by_math_verify(gold: str, answer: str) -> bool | None:
    """Return math-verify's verdict as a worker gives it, or None where the gold cannot be parsed."""
    *_, last = compared(gold, answer)
    return last if isinstance(last, bool) else None


def main() -> None:
    """Compare, print what is apart and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5000, help="that ours decides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    draw = random.Random(arguments.seed)
    real = sorted({gold for gold in golds(arguments.data) if not gold.isdigit()}) if arguments.data else []
    counts: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    end = time.monotonic() + 60 * arguments.minutes
    while counts["decided"] < arguments.pairs and time.monotonic() < end:
        gold = draw.choice(real) if real and draw.random() < 0.3 else value(draw)
        answer = mutated(draw, gold, real or [value(draw)])
        if (gold, answer) in seen or not answer.strip():
            continue
        seen.add((gold, answer))
        counts["pairs"] += 1
        ours = exact.compare(gold, answer)
        if ours is None:
            continue
        theirs = by_math_verify(gold, answer)
        counts["decided"] += 1
        counts["right"] += ours
        if ours is not theirs:
            counts["apart"] += 1
            print(f"apart: {gold!r} and {answer!r}: ours {ours}, math-verify {theirs}", flush=True)
    print(json.dumps({name: counts[name] for name in ("pairs", "decided", "right", "apart")}))


if __name__ == "__main__":
    main()
