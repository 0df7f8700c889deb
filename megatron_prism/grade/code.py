"""Grade code: the last fenced block of an answer, run in the sandbox against inputs and outputs, or judged by asserts.

No verdict comes by a channel that the judged code reaches. Outputs are compared here, where the expected ones stay; asserts run in a sandbox of
their own, which calls the answer's functions in another one (`sandbox/exchange.py`).
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from megatron_prism.grade.asserts import asserts_when_run
from megatron_prism.grade.outcome import Graded, Item, Outcome
from megatron_prism.grade.sandbox.sandbox import Sandbox

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
MAX_WHY = 200


def code_of(answer: str) -> str | None:
    """Return the last fenced block of an answer that is closed, or None."""
    last: str | None = None
    block: list[str] = []
    is_open = False
    for line in answer.split("\n"):
        if not is_open:
            block, is_open = [], line.startswith("```") and "`" not in line[3:]
        elif line.rstrip() == "```":
            last, is_open = "".join(block), False
        else:
            block.append(f"{line}\n")
    return last


def grade_code(item: Item, answer: str, sandbox: Sandbox) -> Graded:
    """Return the outcome of an item of kind code. Tests that cannot be used, and what the sandbox itself fails at, are faults.

    answer: what `format.answer_of` left of the response.
    """

    def graded(outcome: Outcome, why: str = "") -> Graded:
        return Graded(id=item.id, outcome=outcome, why=" ".join(why.split())[:MAX_WHY])

    problem = _tests_problem(item.tests)
    if problem or item.tests is None:
        return graded("fault", problem)
    code = code_of(answer)
    if code is None:
        return graded("no_format", "no fenced block of code in the answer")
    if "\0" in code:
        return graded("wrong", "a null byte in the code")
    outcome, why = (_by_cases if item.tests["kind"] == "stdin" else _by_asserts)(code, item.tests, sandbox)
    return graded(outcome, why)


def is_same_output(said: str, expected: str) -> bool:
    """Say whether two outputs are equal: line by line without the blanks around lines and around the whole; numbers by their exact value.

    Source: LiveCodeBench, lcb_runner/evaluation/testing_util.py (grade_stdio).
    """
    said_lines, expected_lines = said.strip().split("\n"), expected.strip().split("\n")
    return len(said_lines) == len(expected_lines) and all(map(_is_same_line, said_lines, expected_lines))


def _is_same_line(said: str, expected: str) -> bool:
    if said.strip() == expected.strip():
        return True
    said_words, expected_words = said.split(), expected.split()
    return len(said_words) == len(expected_words) and all(
        NUMBER.fullmatch(one) and NUMBER.fullmatch(other) and Decimal(one) == Decimal(other)
        for one, other in zip(said_words, expected_words, strict=True)
    )


def free_names(tests: str) -> list[str]:
    """Return the names that tests read and neither bind nor have as builtins: what they want of the answer.

    Raises: SyntaxError: the tests are no Python.
    """
    read: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return sorted(read - bound - set(dir(builtins)) - {"__name__", "__file__"})


def _tests_problem(tests: Mapping[str, Any] | None) -> str:
    """Return what is wrong with an item's tests, or an empty text."""
    if not isinstance(tests, Mapping) or tests.get("kind") not in ("stdin", "asserts"):
        return "the tests have no kind stdin or asserts"
    if tests["kind"] == "stdin":
        cases = tests.get("cases")
        is_whole = isinstance(cases, (list, tuple)) and all(
            isinstance(case, Mapping) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str) for case in cases
        )
        return "" if is_whole and cases else "the tests have no cases of input and output"
    if not isinstance(tests.get("code"), str):
        return "the tests have no code"
    try:
        names, has_asserts = free_names(tests["code"]), asserts_when_run(tests["code"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the tests are no Python: {error}"
    if not names and not tests.get("entry_point"):
        return "the tests name nothing of the answer"
    return "" if has_asserts else "the tests run no assert: none at the top, nor in a function that is called there"


def _by_cases(code: str, tests: Mapping[str, Any], sandbox: Sandbox) -> tuple[Outcome, str]:
    for number, case in enumerate(tests["cases"], 1):
        result = sandbox.run(code, case["input"])
        if result.is_fault:
            return "fault", result.why
        if result.ended != "exit":
            return "wrong", f"case {number}: ended by {result.ended}"
        if result.exit_code != 0:
            return "wrong", f"case {number}: exit code {result.exit_code}: {result.why.strip()[-100:]}"
        if not is_same_output(result.stdout.decode("utf-8", "replace"), case["output"]):
            return "wrong", f"case {number}: another output"
    return "right", ""


def _by_asserts(code: str, tests: Mapping[str, Any], sandbox: Sandbox) -> tuple[Outcome, str]:
    """Judge by asserts. tests["entry_point"], where given, is asked of the answer even where it has a builtin's name."""
    names = {*free_names(tests["code"]), *([tests["entry_point"]] if tests.get("entry_point") else [])}
    result = sandbox.judge(code, tests["code"], sorted(names))
    if result.is_fault:
        return "fault", result.why
    verdict, _, why = result.verdict.partition(": ")
    if verdict == "passed":
        return "right", ""
    if verdict == "broken":
        return "fault", f"the tests: {why}"
    return "wrong", why or f"ended by {result.ended}"
