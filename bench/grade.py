"""The grader beside math-verify on a labelled set: verdicts one by one, and responses a CPU-second.

Run: python -m bench.grade --data FOLDER [--rounds N] [--filler N]
FOLDER holds math500.jsonl, aime24.jsonl, aime25.jsonl and gsm8k_test.jsonl. The golds are written in other forms (right) and changed (wrong). Both
sides read the same responses, `<think> N words </think> ... \\boxed{answer}`. math-verify is called as its users call it, in this process, with its
own timeouts: parse the gold, parse the response, verify. Ours is `Grader.grade` with the CPU time of its workers, which are held over the rounds as a
run holds them; what starting them costs is a figure of its own. Both keep what they have parsed, as they do in a run: the first round is the dear one.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil

from megatron_prism.grade.grader import Grader
from megatron_prism.grade.outcome import Item

FILES = {"math500": "answer", "aime24": "expected_answer", "aime25": "expected_answer", "gsm8k_test": "answer"}


@dataclass(frozen=True)
class Case:
    """An answer to a problem, and whether it is right, by how it was made."""

    gold: str
    answer: str
    is_right: bool


def golds(folder: Path) -> list[str]:
    """Return every gold of the files."""
    records = [(key, json.loads(line)) for name, key in FILES.items() for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [str(record[key]).rsplit("####", 1)[-1].strip() for key, record in records]


def labelled(folder: Path) -> list[Case]:
    """Return the labelled set: each gold in other forms, and changed. The same each time."""
    cases = [Case(gold, answer, is_right) for gold in golds(folder) for answer, is_right in forms(gold)]
    return list(dict.fromkeys(cases))


def forms(gold: str) -> Iterator[tuple[str, bool]]:
    """Yield (another text, whether it is the same answer)."""
    yield gold, True
    yield f" {gold} ", True
    plain = gold.replace(",", "")
    if re.fullmatch(r"-?[0-9]+|[0-9]{1,3}(,[0-9]{3})+", gold):
        number = int(plain)
        yield from (
            (f"{number:,}", True),
            (f"x = {number}", True),
            (rf"{number}\text{{ units}}", True),
            (rf"\frac{{{2 * number}}}{{2}}", True),
        )
        yield from ((str(number + 1), False), (str(-number - 1), False), (f"{number}.5", False), (f"{number}, {number + 1}", False))
    elif match := re.fullmatch(r"(-?)\\d?frac\{([0-9]+)\}\{([0-9]+)\}", gold):
        value = Fraction(int(match[1] + match[2]), int(match[3]))
        yield from ((gold.replace("\\frac", "\\dfrac"), True), (f"{value.numerator}/{value.denominator}", True))
        if not 10**6 % value.denominator:
            yield f"{float(value):.6f}", True
        yield from ((f"{value.denominator}/{abs(value.numerator) + value.denominator}", False), (f"{value.numerator}", False))
    elif match := re.fullmatch(r"\\text\{\(?(\w+)\)?\}", gold):
        yield from ((match[1], True), (rf"\text{{{match[1]}}}", True), (r"\text{Zeno}", False), (r"\text{north}", False))
    else:
        yield gold.replace("(", "\\left(").replace(")", "\\right)") if "\\left" not in gold and "\\infty)" not in gold else gold, True
        if digits := list(re.finditer(r"[1-9]", gold)):
            first = digits[0]
            yield gold[: first.start()] + str(int(first[0]) % 9 + 1) + gold[first.end() :], False
        yield gold + "+1", False


def response(case: Case, filler: int) -> str:
    """Return a response as a model writes it; its thinking has `filler` words."""
    return f"<think>{'so we add 3 and 4 and see ' * (filler // 7)}</think> The answer is $\\boxed{{{case.answer}}}$."


def by_math_verify(gold: str, text: str) -> bool:
    """Return math-verify's verdict, as NeMo-RL and TRL call it."""
    import math_verify

    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    parsed = math_verify.parse(f"\\boxed{{{gold}}}", extraction_config=config)
    return bool(math_verify.verify(parsed, math_verify.parse(text, extraction_config=config)))


def cpu_s() -> float:
    """Return the CPU-seconds of this process and of its children, ended or not."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def ours(grader: Grader, cases: list[Case], texts: list[str]) -> list[bool]:
    """Return our verdicts."""
    items = [
        Item(id=str(index), kind="math", gold=case.gold, response=text) for index, (case, text) in enumerate(zip(cases, texts, strict=True))
    ]
    return [graded.outcome == "right" for graded in grader.grade(items).values()]


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--filler", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    cases = labelled(arguments.data)
    texts = [response(case, arguments.filler) for case in cases]
    by_math_verify("1", texts[0])  # its import is not counted
    seconds: dict[str, list[float]] = {"ours": [], "math-verify": []}
    verdicts: dict[str, list[bool]] = {}
    with Grader() as grader:
        before = cpu_s()
        grader.grade(
            [Item(id=str(power), kind="math", gold="\\cot x", response=f"<think></think>\\boxed{{x^{power}}}") for power in range(2, 50)]
        )
        start_s = cpu_s() - before
        sides = {
            "ours": lambda: ours(grader, cases, texts),
            "math-verify": lambda: [by_math_verify(case.gold, text) for case, text in zip(cases, texts, strict=True)],
        }
        for turn in range(arguments.rounds):
            for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
                before, start = cpu_s(), time.monotonic()
                verdicts[name] = sides[name]()
                seconds[name].append(cpu_s() - before)
                print(f"round {turn}: {name}: {seconds[name][-1]:.2f} CPU-s, {time.monotonic() - start:.2f} s", flush=True)
    apart = [case for case, one, other in zip(cases, verdicts["ours"], verdicts["math-verify"], strict=True) if one != other]
    mislabelled = [case for case, one in zip(cases, verdicts["ours"], strict=True) if one != case.is_right]
    for case in apart[:20]:
        print("apart:", case)
    for case in mislabelled[:20]:
        print("not as labelled:", case)
    rates = {name: len(cases) / statistics.median(spent) for name, spent in seconds.items()}
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["math-verify"], strict=True)]
    ratio, first = statistics.median(ratios), ratios[0]
    result = {"cases": len(cases), "right": sum(case.is_right for case in cases), "apart": len(apart), "not_as_labelled": len(mislabelled)}
    print(
        json.dumps(
            result
            | {f"{name}_per_cpu_s": round(rate, 1) for name, rate in rates.items()}
            | {"times": round(ratio, 2), "times_in_round_0": round(first, 2), "start_cpu_s": round(start_s, 2)}
        )
    )


if __name__ == "__main__":
    main()
