"""Sets whose answer is a program: LiveCodeBench, Codeforces, HumanEval."""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_prism.eval.question import Question
from megatron_prism.eval.sets.prompt import asked, id_of
from megatron_prism.eval.sets.rows import Row
from megatron_prism.grade.packed import unpacked

LIVECODEBENCH_FIELDS = (
    *("question_id", "question_content", "starter_code", "contest_date", "difficulty", "platform"),
    *("public_test_cases", "private_test_cases", "metadata"),
)
CODEFORCES_FIELDS = (
    *("id", "title", "time_limit", "description", "input_format", "output_format", "interaction_format", "note", "editorial", "rating"),
    *("examples", "official_tests", "official_tests_complete", "generated_checker", "input_mode"),
)
HUMANEVAL_FIELDS = ("task_id", "prompt", "entry_point", "test")
WINDOW = ("2024-08", "2025-02")  # of LiveCodeBench's contests: from the first month to before the second
LCB_TIME_LIMIT_S = 6  # LiveCodeBench, lcb_runner/evaluation/testing_util.py, run_test
CODEFORCES_TIME_LIMIT_S = 10.0  # at least: a problem's own limit is meant for compiled programs
CASES = "a list of {input, output}, at least one"
# Evalchemy, eval/chat_benchmarks/LiveCodeBenchv5/eval_instruct.py: a program, or a function
STDIN = (
    "Generate an executable Python function generated from the given prompt. The function should take stdin as input and print the output. "
    "Simply call the function after the definition."
)
FUNCTION = "Generate an executable Python function generated from the given prompt. Return the function body without invoking it at the final solution."
# LiveCodeBench, lcb_runner/prompts/code_generation.py: the harness of the paper does not show the starter code, which names the function
STARTER = "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
# Evalchemy, eval/chat_benchmarks/CodeForces/eval_instruct.py
CODEFORCES = (
    "You are a coding expert. Given a competition-level coding problem, you need to write a Python program to solve it. You may start by "
    "outlining your thought process. In the end, please provide the complete code in a code block enclosed with ``` ```. The code should take "
    "stdin as input and print the output. Your program should be a Python function generated from the given prompt. Simply call the function "
    "after the definition."
)
COMPLETE = "Complete this Python function. Give the whole function in one block of code, enclosed with ``` ```.\n\n```python\n{prompt}```"


def livecodebench(row: Row, chat: bool) -> Question | str:
    """Read a problem of LiveCodeBench's code_generation_lite; public and private tests count. A text says why a problem is left out."""
    if (date := row.get("contest_date")) is not None and not WINDOW[0] <= str(date)[:7] < WINDOW[1]:
        return f"contests outside {WINDOW[0]} to before {WINDOW[1]}"
    content = row.text("question_content").strip()
    starter = row.text("starter_code", may_be_empty=True) if row.get("starter_code") is not None else ""
    public = _cases(row, "public_test_cases", row.json("public_test_cases"), may_be_empty=True)
    cases = [*public, *_cases(row, "private_test_cases", _private(row))]
    kinds = {case.get("testtype", "stdin") for case in cases}
    tests: dict[str, Any] = {
        "kind": "stdin",
        "cases": [{"input": case["input"], "output": case["output"]} for case in public],
        "packed_cases": row.get("private_test_cases"),
        "time_limit_s": LCB_TIME_LIMIT_S,
        "imports": True,
    }
    if kinds == {"functional"}:
        tests |= {"kind": "call", "function": _function(row, starter)}
        _check_calls(row, cases)
    elif cases and kinds != {"stdin"}:
        row.wrong(f"tests of the types {', '.join(sorted(map(str, kinds)))}", "stdin, or functional, for all of a problem")
    text = f"{FUNCTION if tests['kind'] == 'call' else STDIN}{content}"
    if starter.strip():
        text += f"\n\n{STARTER}\n```python\n{starter.rstrip()}\n```"
    tags = {key: str(row.get(key)) for key in ("difficulty", "platform") if row.get(key) is not None}
    return Question(id=id_of(row, content, "question_id"), prompt=asked(text, chat), kind="code", tests=tests, tags=tags)


def _private(row: Row) -> Any:
    text = row.text("private_test_cases")
    try:
        return unpacked(text) if text else None
    except (ValueError, RecursionError) as error:
        row.wrong(f"field 'private_test_cases': {error}", "JSON, or base64 of zlib of a pickle of one text")
        return None


def _cases(row: Row, name: str, value: Any, may_be_empty: bool = False) -> list[dict[str, Any]]:
    if row.problems and value is None:
        return []
    is_list = isinstance(value, list) and all(
        isinstance(case, dict) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str) for case in value
    )
    if not is_list or not (value or may_be_empty):
        row.wrong(f"field {name!r} of another form", CASES)
        return []
    return list(value)


def _function(row: Row, starter: str) -> str:
    """Return the name of the function that the tests call."""
    metadata = row.json("metadata") if row.get("metadata") is not None else {}
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    match = re.search(r"^\s*def\s+(\w+)\s*\(", starter, re.MULTILINE)
    name = name or (match[1] if match else "")
    return name if isinstance(name, str) and name.isidentifier() else row.wrong("functional tests without a function's name", "func_name")


def _check_calls(row: Row, cases: list[dict[str, Any]]) -> None:
    for number, case in enumerate(cases, 1):
        try:
            for text in (*case["input"].strip("\n").split("\n"), case["output"]):
                json.loads(text)
        except (ValueError, RecursionError) as error:
            row.wrong(f"test {number}, which is no JSON ({error})", "an argument a line, and the value returned, as JSON")
            return


def codeforces(row: Row, chat: bool) -> Question | str:
    """Read a problem of open-r1/codeforces as Evalchemy gives it: with its editorial, where it has one; outputs must be the expected text."""
    return _codeforces(row, chat, with_editorial=True, with_checker=False)


def codeforces_checked(row: Row, chat: bool) -> Question | str:
    """Read a problem of open-r1/codeforces without its editorial, judged by its checker where several outputs are right (ours)."""
    return _codeforces(row, chat, with_editorial=False, with_checker=True)


def _codeforces(row: Row, chat: bool, with_editorial: bool, with_checker: bool) -> Question | str:
    if row.get("interaction_format"):
        return "interactive problems"
    if with_checker and row.get("official_tests_complete") is False:
        return "problems whose tests are cut in the published file"
    cases = _cases(row, "official_tests", row.json("official_tests"))
    examples = _cases(row, "examples", row.json("examples"), may_be_empty=True)
    limit_s = row.get("time_limit")
    if isinstance(limit_s, bool) or not isinstance(limit_s, (int, float)) or not limit_s > 0:
        row.wrong(f"the time limit {limit_s!r}", "seconds, above 0")
        limit_s = 1.0
    title = row.text("title")
    checker = row.get("generated_checker") if with_checker else None
    tests = {
        "kind": "stdin",
        "cases": [{"input": case["input"], "output": case["output"]} for case in cases],
        "time_limit_s": max(CODEFORCES_TIME_LIMIT_S, float(limit_s)),
        **({"checker": str(checker)} if checker else {}),
    }
    parts = [f"<h1>{title}</h1>", f"<div>Time limit per test: {limit_s} s</div>"]
    for heading, name in (("Description", "description"), ("Input Format", "input_format"), ("Output Format", "output_format")):
        parts += [f"<h2>{heading}</h2><div>{row.get(name)}</div>"] if row.get(name) else []
    for case in examples:
        parts.append(f"<h2>Example</h2><h3>Input</h3><div>{case['input']}</div><h3>Output</h3><div>{case['output']}</div>")
    for heading, name in (("Note", "note"), *((("Editorial", "editorial"),) if with_editorial else ())):
        if row.get(name):
            parts.append(f"<h2>{heading}</h2><div>{row.get(name)}</div>")
    row.text("description")
    prompt = asked(f"{CODEFORCES}\n\n<html><body>{''.join(parts)}</body></html>", chat)
    tags = {"difficulty": _difficulty(row.get("rating")), "checker": "yes" if row.get("generated_checker") else "no"}
    tags |= {"editorial": "yes" if row.get("editorial") else "no"} if with_editorial else {}
    return Question(id=id_of(row, title, "id"), prompt=prompt, kind="code", tests=tests, tags=tags)


def _difficulty(rating: Any) -> str:
    """Return Evalchemy's class of a problem. Source: eval/chat_benchmarks/CodeForces/codeforces_utils.py, rating_to_difficulty."""
    return "easy" if not isinstance(rating, (int, float)) or rating < 1000 or rating > 3500 else "medium" if rating < 1300 else "hard"


def humaneval(row: Row, chat: bool) -> Question:
    """Read a problem of HumanEval. Its text form is the bare prompt, to be continued; the answer may be a body or the whole function."""
    prompt, entry_point = row.text("prompt"), row.text("entry_point")
    tests = {
        "kind": "asserts",
        "code": f"{row.text('test')}\ncheck({entry_point})",
        "entry_point": entry_point,
        "prompt": prompt,
    }
    said = asked(COMPLETE.format(prompt=prompt if prompt.endswith("\n") else f"{prompt}\n"), chat=True) if chat else prompt
    return Question(id=id_of(row, prompt, "task_id"), prompt=said, kind="code", tests=tests)
