"""Grade code: the last fenced block of an answer, run in the sandbox against inputs and outputs, called, or judged by asserts.

The kinds of tests: stdin (cases of {input, output}; checker: a program that judges outputs where several are right; imports: the program has
LiveCodeBench's names), call (function, and cases
of {input: a JSON argument a line, output: JSON}), asserts (code; prompt: the answer may also continue it). packed_cases: more cases
(grade/packed.py). time_limit_s: of one program.

No verdict comes by a channel that the judged code reaches. Outputs are compared here, where the expected ones stay; asserts run in a sandbox of
their own, which calls the answer's functions in another one (`sandbox/exchange.py`).
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from megatron_prism.grade.asserts import asserts_when_run
from megatron_prism.grade.outcome import Graded, Item, Outcome
from megatron_prism.grade.packed import with_cases
from megatron_prism.grade.sandbox.sandbox import Sandbox

# no two quantifiers that share a text stand side by side: a model's text of a million characters would be tried at each of its cuts
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,}+)[^`]*")  # the line that opens a block; it is indented in an item of a list
MAX_WHY = 200
NO_JSON = "the tests are no JSON"
KINDS = ("stdin", "call", "asserts")
# what a bare completion of a function ends before. Source: Chen et al. 2021 (HumanEval), section 3.1; a fence is ours
STOPS = re.compile(r"\n(?=class |def |#|if |print|```)")
# the modules whose names LiveCodeBench's answers may use. Source: lcb_runner/evaluation/testing_util.py, import_string
_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json builtins typing"
)
_CHECKED = """\
import builtins, io, json, sys
_texts = dict(zip(("input.txt", "correct_output.txt", "solution_output.txt"), json.loads(sys.stdin.read())))
_open = builtins.open
def _read(file, mode="r", *given, **named):
    if file not in _texts:
        return _open(file, mode, *given, **named)
    return io.BytesIO(_texts[file].encode()) if "b" in mode else io.StringIO(_texts[file])
builtins.open = io.open = _read
sys.argv = ["checker.py", *_texts]
"""


def code_of(answer: str) -> str | None:
    """Return the last fenced block of an answer that is closed, or None. Its lines come without the indent of its fence, as Markdown reads them."""
    last: str | None = None
    block: list[str] = []
    fence: re.Match[str] | None = None
    for line in answer.split("\n"):
        if fence is None:
            block, fence = [], FENCE.fullmatch(line)
            continue
        indent = min(len(fence[1]), len(line) - len(line.lstrip(" \t")))
        mark = line[indent:].rstrip()
        if len(mark) >= len(fence[2]) and set(mark) == {fence[2][0]}:  # no deeper than it opened: a fence in a docstring closes nothing
            last, fence = "".join(block), None
        else:
            block.append(f"{line[indent:]}\n")
    return last


def grade_code(item: Item, answer: str, sandbox: Sandbox) -> Graded:
    """Return the outcome of an item of kind code. Tests that cannot be used, and what the sandbox itself fails at, are faults.

    answer: what `format.answer_of` left of the response.
    """

    def graded(outcome: Outcome, why: str = "") -> Graded:
        return Graded(id=item.id, outcome=outcome, why=" ".join(why.split())[:MAX_WHY])

    tests = item.tests
    try:
        if isinstance(tests, Mapping) and "packed_cases" in tests:
            tests = with_cases(tests)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return graded("fault", f"the tests: {error}")
    problem = _problem(tests)
    if problem or tests is None:
        return graded("fault", problem)
    code = code_of(answer) if "prompt" not in tests else completed(answer, tests["prompt"], tests["entry_point"])
    if code is None:
        return graded("no_format", "no fenced block of code in the answer")
    if "\0" in code:
        return graded("wrong", "a null byte in the code")
    outcome, why = {"stdin": _by_cases, "call": _by_calls, "asserts": _by_asserts}[tests["kind"]](code, tests, _limited(sandbox, tests))
    return graded(outcome, why)


def _limited(sandbox: Sandbox, tests: Mapping[str, Any]) -> Sandbox:
    """Return a sandbox with the tests' own time limit, and room for twice the longest expected output."""
    limits = sandbox.limits
    if limit_s := tests.get("time_limit_s"):
        limits = replace(limits, cpu_s=math.ceil(limit_s), wall_s=max(limits.wall_s, 2.0 * limit_s))
    cases = () if tests["kind"] == "asserts" else tests["cases"]
    longest = max((len(case["output"].encode("utf-8", "surrogatepass")) for case in cases), default=0)
    return replace(sandbox, limits=replace(limits, output_bytes=max(limits.output_bytes, 2 * longest)))


def completed(answer: str, prompt: str, entry_point: str) -> str:
    """Return the program of a prompt that ends in a function's docstring, and an answer: the whole function again, or its body.

    The answer is the last fenced block, else the text itself up to what its first function ends before. It comes without the blanks before
    its first line.
    """
    prompt, code = prompt if prompt.endswith("\n") else f"{prompt}\n", code_of(answer)
    if re.search(rf"^(async )?def {re.escape(entry_point)}\b", answer if code is None else code, re.MULTILINE):
        return f"{prompt}\n{answer if code is None else code}"
    if code is not None:
        return f"{prompt}{textwrap.indent(textwrap.dedent(code), ' ' * 4)}"
    return f"{prompt}    {STOPS.split(answer, maxsplit=1)[0].lstrip()}\n"


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


def tests_problem(tests: Mapping[str, Any] | None) -> str:
    """Return what is wrong with an item's tests, or an empty text. Packed cases are not unpacked: what they hold is seen when they are run."""
    return _problem(tests) or (_values_problem(tests["cases"]) if tests and tests["kind"] == "call" and "cases" in tests else "")


def _problem(tests: Mapping[str, Any] | None) -> str:
    """Return what is wrong with tests but for the values of their calls, which are megabytes and are read as they are called."""
    if not isinstance(tests, Mapping) or tests.get("kind") not in KINDS:
        return f"the tests have no kind {', '.join(KINDS[:-1])} or {KINDS[-1]}"
    limit_s = tests.get("time_limit_s", 1)
    if isinstance(limit_s, bool) or not isinstance(limit_s, (int, float)) or not 0 < limit_s < math.inf:
        return "the tests have a time_limit_s that is no number of seconds"
    if not isinstance(tests.get("imports", False), bool):
        return "the tests have imports that is neither true nor false"
    if not all(isinstance(tests.get(key, ""), str) for key in ("checker", "prompt", "entry_point", "function")):
        return "the tests have a checker, prompt, entry_point or function that is no text"
    if tests["kind"] != "asserts":
        packed, cases = tests.get("packed_cases"), tests.get("cases", ())
        if "packed_cases" in tests and not (isinstance(packed, str) and packed):
            return "the tests have packed_cases that are no text"
        is_whole = isinstance(cases, (list, tuple)) and all(
            isinstance(case, Mapping) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str) for case in cases
        )
        if not is_whole or not (cases or packed):
            return "the tests have no cases of input and output"
        is_named = tests["kind"] != "call" or tests.get("function", "").isidentifier()
        return "" if is_named else "the tests have no function to call"
    if "prompt" in tests and not tests.get("entry_point"):
        return "the tests have a prompt to continue, and no entry_point"
    if not isinstance(tests.get("code"), str):
        return "the tests have no code"
    try:
        names, has_asserts = free_names(tests["code"]), asserts_when_run(tests["code"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the tests are no Python: {error}"
    if not names and not tests.get("entry_point"):
        return "the tests name nothing of the answer"
    return "" if has_asserts else "the tests run no assert: none at the top, nor in a function that is called there"


def _values_problem(cases: Sequence[Mapping[str, Any]]) -> str:
    try:
        for case in cases:
            _arguments(case["input"])
            _json(case["output"])
    except (ValueError, RecursionError) as error:
        return f"{NO_JSON}: {error}"
    return ""


class _Digits(str):
    """An integer of JSON as it is spelt: this process reads no more than 4,300 digits, the sandbox more."""

    __repr__ = str.__str__


def _json(text: str) -> Any:
    """Return JSON as values whose repr is Python's."""
    return json.loads(text, parse_int=_Digits)


def _arguments(text: str) -> list[Any]:
    return [_json(line) for line in text.strip("\n").split("\n")]


def _with_imports(code: str) -> str:
    """Return code behind what LiveCodeBench puts before every answer: imports, and a higher limit of recursion."""
    if "from __future__" in code:  # which must come first
        return code
    imports = [f"from {module} import *\nimport {module}\n" for module in _MODULES.split()]
    return f"{''.join(imports)}sys.setrecursionlimit(50000)\n{code}"


def _by_cases(code: str, tests: Mapping[str, Any], sandbox: Sandbox) -> tuple[Outcome, str]:
    code = _with_imports(code) if tests.get("imports") else code
    for number, case in enumerate(tests["cases"], 1):
        result = sandbox.run(code, case["input"])
        if result.is_fault:
            return "fault", result.why
        if result.ended != "exit":
            return "wrong", f"case {number}: ended by {result.ended}"
        if result.exit_code != 0:
            return "wrong", f"case {number}: exit code {result.exit_code}: {result.why.strip()[-100:]}"
        said = result.stdout.decode("utf-8", "replace")
        if checker := tests.get("checker"):
            outcome, why = _checked(checker, case, said, sandbox)
            if outcome != "right":
                return outcome, f"case {number}: {why}"
        elif not is_same_output(said, case["output"]):
            return "wrong", f"case {number}: another output"
    return "right", ""


def _checked(checker: str, case: Mapping[str, Any], said: str, sandbox: Sandbox) -> tuple[Outcome, str]:
    """Judge an output by a program that reads input.txt, correct_output.txt and solution_output.txt and prints 1 for a right one.

    The program runs in a sandbox of its own; its files are in memory. One that does not even accept the expected output is a fault.
    Source: open-r1/codeforces, generated_checker.
    """
    for is_expected, output in ((False, said), (True, case["output"])):
        result = sandbox.run(_CHECKED + checker, json.dumps([case["input"], case["output"], output]))
        words = result.stdout.split()
        if result.is_fault:
            return "fault", result.why
        if result.ended == "exit" and result.exit_code == 0 and words and _is_score(words[-1]):
            is_accepted = float(words[-1]) == 1
            if is_expected:
                return ("wrong", "its checker fails on the output") if is_accepted else ("fault", "the checker refuses the expected output")
            return ("right", "") if is_accepted else ("wrong", "its checker refuses the output")
    return "fault", f"the checker gives no verdict: {result.why.strip()[-100:]}"


def _is_score(word: bytes) -> bool:
    return NUMBER.fullmatch(word.decode("ascii", "replace")) is not None


def _by_calls(code: str, tests: Mapping[str, Any], sandbox: Sandbox) -> tuple[Outcome, str]:
    """Call the answer's function, or the method of its class Solution, once a case, each in a new process. Values are compared with ==.

    A tuple counts as a list. Source: LiveCodeBench, lcb_runner/evaluation/testing_util.py, grade_call_based.
    """
    name, is_method = tests["function"], re.search(r"^class Solution\b", code, re.MULTILINE) is not None
    target, code = f"Solution().{name}" if is_method else name, _with_imports(code)
    for number, case in enumerate(tests["cases"], 1):
        try:
            given, expected = repr(_arguments(case["input"])), repr(_json(case["output"]))
        except (ValueError, RecursionError) as error:
            return "fault", f"case {number}: {NO_JSON}: {error}"
        test = f"value = {target}(*{given})\nvalue = list(value) if type(value) is tuple else value\nassert value == {expected}"
        outcome, why = _judged(sandbox, code, test, ["Solution" if is_method else name])
        if outcome != "right":
            return outcome, f"case {number}: {why}"
    return "right", ""


def _by_asserts(code: str, tests: Mapping[str, Any], sandbox: Sandbox) -> tuple[Outcome, str]:
    """Judge by asserts. tests["entry_point"], where given, is asked of the answer even where it has a builtin's name."""
    names = {*free_names(tests["code"]), *([tests["entry_point"]] if tests.get("entry_point") else [])}
    return _judged(sandbox, code, tests["code"], sorted(names))


def _judged(sandbox: Sandbox, code: str, tests: str, names: list[str]) -> tuple[Outcome, str]:
    result = sandbox.judge(code, tests, names)
    if result.is_fault:
        return "fault", result.why
    verdict, _, why = result.verdict.partition(": ")
    if verdict == "passed":
        return "right", ""
    if verdict == "broken":
        return "fault", f"the tests: {why}"
    return "wrong", why or f"ended by {result.ended}"
