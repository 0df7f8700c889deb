"""Sets whose answers are programs, through `load` and the grader: HumanEval's solutions pass and mutants fail; LiveCodeBench, Codeforces."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import pickle
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.eval.grading import grade_config, item_of
from megatron_prism.eval.question import Question
from megatron_prism.eval.sets.published import SETS, read
from megatron_prism.grade.code import completed
from megatron_prism.grade.grader import Grader

HUMANEVAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "humaneval.jsonl.gz"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    try:
        with Grader(grade_config(SETS["livecodebench"].protocol, GradeConfig()), ["code"]) as one:
            yield one
    except EnvironmentFault as error:
        if os.environ.get("PRISM_REQUIRE_SANDBOX") == "1":
            raise
        pytest.skip(str(error))


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def load(name: str, path: Path, chat: bool = False) -> tuple[Question, ...]:
    return read(name, path, chat).questions


def outcomes(grader: Grader, question: Question, *sources: str) -> list[str]:
    """Grade programs, each as the one block of a response."""
    items = [item_of(question, f"So:\n```python\n{source}\n```", str(number), False) for number, source in enumerate(sources)]
    graded = grader.grade(items).values()
    if any("too busy" in one.why for one in graded):
        pytest.skip("the machine is too busy to say")
    return [one.outcome for one in graded]


MUTATE = """

def _changed(value):
    for kind, more in ((bool, None), (int, 1), (float, 1.0), (str, "x"), (list, [0]), (tuple, (0,))):
        if isinstance(value, kind):
            return not value if kind is bool else value + more
    return {{**value, "x": 0}} if isinstance(value, dict) else 0

def _mutant(function, calls=[]):
    def called(*arguments):
        calls.append(arguments)
        is_first = len(calls) == 1
        value = function(*arguments)
        return _changed(value) if is_first else value
    return called

{name} = _mutant({name})
"""


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="no ../shared/data/humaneval.jsonl.gz")
def test_humaneval_s_solutions_pass_and_mutants_of_them_fail(grader: Grader) -> None:
    import gzip

    loaded = read("humaneval", HUMANEVAL)
    with gzip.open(HUMANEVAL, "rt") as file:
        records = [json.loads(line) for line in file]
    assert loaded.notes == () and len(loaded.questions) == 164
    items = []
    for question, record in zip(loaded.questions, records, strict=True):
        assert question.id == record["task_id"] and question.prompt == record["prompt"]
        body = f"{record['canonical_solution']}\n\nif __name__ == '__main__':\n    print(1"  # a base model goes on
        mutant = f"```python\n{record['prompt']}{record['canonical_solution']}{MUTATE.format(name=record['entry_point'])}\n```"
        items += [item_of(question, body, f"{question.id} body", False), item_of(question, mutant, f"{question.id} mutant", False)]
    graded = grader.grade(items)
    assert Counter((id_.split()[1], one.outcome) for id_, one in graded.items()) == {("body", "right"): 164, ("mutant", "wrong"): 164}


PROMPT = 'from typing import List\n\n\ndef double(x: int) -> int:\n    """ Double. """\n'


@pytest.mark.parametrize(
    "answer",
    [
        "return 2 * x",
        "y = x\n    return x + y",
        "y = x\n    return x + y\ndef other():\n    pass",
        "if x:\n        return 2 * x\n    return 0\n\nprint(double(1))",
        "So:\n```python\ndef double(x: int) -> int:\n    return 2 * x\n```",
        "```python\n    return 2 * x\n```",
        "```python\nreturn 2 * x\n```\nIt doubles.",
        "def double(x):\n    values: List[int] = [x, x]\n    return sum(values)",
    ],
)
def test_a_completion_may_be_a_body_or_the_whole_function(answer: str) -> None:
    names: dict[str, Any] = {}
    exec(completed(answer, PROMPT, "double"), names)
    assert names["double"](21) == 42


def test_a_base_model_that_goes_on_has_ended_its_function(grader: Grader, tmp_path: Path) -> None:
    record = {"task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "double", "test": "def check(f):\n    assert f(1) == 2\n"}
    (question,) = load("humaneval", written(tmp_path / "a.jsonl", record))
    said = {
        "    return 2 * x\n\ndef other(y):\n    return": "right",
        "\n    return 2 * x\nUser: next": "right",
        "    return 2 *": "truncated",
        "```python\n    return 2 * x\n```\nIt": "right",
        "```python\n    return 2 * x": "truncated",
    }
    graded = grader.grade([item_of(question, text, text, True, takes_cut=True) for text in said])
    assert {text: one.outcome for text, one in graded.items()} == said


def test_humaneval_as_a_chat_asks_for_the_whole_function(tmp_path: Path) -> None:
    record = {"task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "double", "test": "def check(f):\n    assert f(1) == 2\n"}
    (question,) = load("humaneval", written(tmp_path / "a.jsonl", record), chat=True)
    assert isinstance(question.prompt, tuple) and question.prompt[0]["content"].endswith(f"```python\n{PROMPT}```")


# ---------------------------------------------------------------- LiveCodeBench


def lcb(private: list[dict[str, str]], **changes: Any) -> dict[str, Any]:
    kind = private[0]["testtype"]
    public = {"stdin": {"input": "1 2\n", "output": "3\n"}, "functional": {"input": "[1, 2]\n1", "output": "[2, 3]"}}[kind]
    record = {
        "question_id": "1",
        "question_content": "Do it.",
        "starter_code": "" if kind == "stdin" else "class Solution:\n    def add(self, nums: List[int], by: int) -> List[int]:\n        ",
        "contest_date": "2024-09-07T00:00:00",
        "public_test_cases": json.dumps([{**public, "testtype": kind}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(private)))).decode(),
        "metadata": "{}" if kind == "stdin" else '{"func_name": "add"}',
    }
    return record | changes


def test_livecodebench_runs_programs_on_public_and_private_tests(grader: Grader, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lcb([{"input": "20 22", "output": "42", "testtype": "stdin"}]))
    (question,) = load("livecodebench", path)
    assert question.prompt == (
        "User: Generate an executable Python function generated from the given prompt. The function should take stdin as input and print the "
        "output. Simply call the function after the definition.Do it.\nAssistant:"
    )
    assert outcomes(
        grader,
        question,
        "def f():\n    print(sum(map(int, input().split())))\nf()",
        "print(3)",  # the public test alone
        "print(42)",  # the private one alone
    ) == ["right", "wrong", "wrong"]


def test_livecodebench_calls_a_method_or_a_function(grader: Grader, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lcb([{"input": "[20]\n22", "output": "[42]", "testtype": "functional"}]))
    (question,) = load("livecodebench", path)
    assert question.tests is not None and question.tests["kind"] == "call" and question.tests["function"] == "add"
    assert "```python\nclass Solution:\n    def add(self, nums: List[int], by: int) -> List[int]:\n```" in str(question.prompt)
    right = "class Solution:\n    def add(self, nums: List[int], by: int) -> List[int]:\n        return [n + by for n in nums]"
    assert outcomes(
        grader,
        question,
        right,  # List is imported for it
        "def add(nums, by):\n    return tuple(n + by for n in nums)",
        right.replace("n + by", "n + 1"),
        "class Solution:\n    def other(self):\n        pass",
        "class Solution:\n    def add(self, nums, by):\n        return Equal()\nclass Equal:\n    def __eq__(self, other):\n        return True",
        "import os\nos._exit(0)",
        "class Solution:\n    def add(self, nums, by):\n        raise NameError('add')",
    ) == ["right", "right", *["wrong"] * 5]
    no_name = lcb([{"input": "[20]", "output": "[42]", "testtype": "functional"}], metadata="{}", starter_code="")
    with pytest.raises(InputError, match="without a function's name"):
        load("livecodebench", written(tmp_path / "b.jsonl", no_name))
    no_json = lcb([{"input": "x", "output": "[42]", "testtype": "functional"}])
    with pytest.raises(InputError, match="test 2, which is no JSON"):
        load("livecodebench", written(tmp_path / "c.jsonl", no_json))


def test_a_problem_s_time_limit_holds(grader: Grader, tmp_path: Path) -> None:
    (question,) = load("livecodebench", written(tmp_path / "a.jsonl", lcb([{"input": "20 22", "output": "42", "testtype": "stdin"}])))
    assert question.tests is not None and question.tests["time_limit_s"] == 6
    question = dataclasses.replace(question, tests={key: value for key, value in question.tests.items() if key != "packed_cases"})
    slow = "import time\nt = time.process_time()\nwhile time.process_time() < t + 3: pass\nprint(sum(map(int, input().split())))"
    assert outcomes(grader, question, slow) == ["right"]
    hurried = dataclasses.replace(question, tests={**question.tests, "time_limit_s": 1})  # type: ignore[dict-item]
    assert outcomes(grader, hurried, slow) == ["wrong"]


# ---------------------------------------------------------------- Codeforces

ANY_ORDER = """import sys
def main(input_path, correct_path, solution_path):
    with open(correct_path) as f: correct = sorted(map(int, f.read().split()))
    with open(solution_path) as f: said = sorted(map(int, f.read().split()))
    with open(input_path) as f: int(f.read())
    print(1 if said == correct else 0)
main(sys.argv[1], sys.argv[2], sys.argv[3])
"""


def codeforces(**changes: Any) -> dict[str, Any]:
    return {
        "id": "2063/A",
        "title": "Two numbers",
        "time_limit": 2.0,
        "description": "Print the two numbers after n.",
        "input_format": "n",
        "output_format": "Two numbers in any order.",
        "interaction_format": None,
        "note": None,
        "editorial": "Print n + 1 and n + 2.",
        "rating": 800,
        "examples": [{"input": "1", "output": "2 3"}],
        "official_tests": [{"input": "1", "output": "2 3"}, {"input": "7", "output": "8 9"}],
        "official_tests_complete": True,
        "generated_checker": ANY_ORDER,
        "input_mode": "stdio",
    } | changes


FORWARD, BACKWARD, FALSE = (f"n = int(input())\nprint({said})" for said in ("n + 1, n + 2", "n + 2, n + 1", "n + 1, n + 3"))


def test_codeforces_as_the_harness_has_it(grader: Grader, tmp_path: Path) -> None:
    records = [
        codeforces(),
        codeforces(id="2", interaction_format="ask"),
        codeforces(id="3", editorial=None, generated_checker=None, rating=None),
    ]
    loaded = read("codeforces", written(tmp_path / "a.jsonl", *records))
    assert [one.id for one in loaded.questions] == ["2063/A", "3"] and loaded.notes[0] == "1 interactive problems are left out"
    first, second = loaded.questions
    assert first.tags == {"difficulty": "easy", "checker": "yes", "editorial": "yes"}
    assert second.tags == {"difficulty": "easy", "checker": "no", "editorial": "no"}
    assert "<h2>Editorial</h2><div>Print n + 1 and n + 2.</div>" in first.prompt and "Editorial" not in second.prompt
    assert outcomes(grader, first, FORWARD, BACKWARD, FALSE) == ["right", "wrong", "wrong"]  # without a checker one output is right


def test_codeforces_with_checkers_and_without_editorials(grader: Grader, tmp_path: Path) -> None:
    records = [codeforces(), codeforces(id="2", official_tests_complete=False), codeforces(id="3", generated_checker=None)]
    loaded = read("codeforces_checked", written(tmp_path / "a.jsonl", *records))
    assert loaded.notes[0] == "1 problems whose tests are cut in the published file are left out"
    checked, plain = loaded.questions
    assert "Editorial" not in checked.prompt and "editorial" not in checked.tags
    assert outcomes(grader, checked, FORWARD, BACKWARD, FALSE, "print('no number')") == ["right", "right", "wrong", "wrong"]
    assert outcomes(grader, plain, FORWARD, BACKWARD) == ["right", "wrong"]


@pytest.mark.parametrize(
    "checker", ["raise ValueError", "print(0)", "print('ok')", "import sys\nprint(1)\nsys.exit(3)", "while True: pass"]
)
def test_a_checker_that_does_not_accept_the_expected_output_is_a_fault(checker: str, grader: Grader, tmp_path: Path) -> None:
    (question,) = load("codeforces_checked", written(tmp_path / "a.jsonl", codeforces(generated_checker=checker)))
    question = dataclasses.replace(question, tests={**question.tests, "time_limit_s": 1})  # type: ignore[dict-item]
    expected = ["wrong"] if checker == "print(0)" else ["fault"]
    assert outcomes(grader, question, FALSE) == expected


def test_codeforces_in_the_hub_s_columnar_form_gives_the_same_questions(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [codeforces(), codeforces(id="2", interaction_format="ask"), codeforces(id="3", rating=None, editorial=None)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read("codeforces", tmp_path / "a.parquet") == read("codeforces", written(tmp_path / "a.jsonl", *records))


def test_a_record_of_codeforces_that_lacks_what_is_needed_is_named(tmp_path: Path) -> None:
    records = [codeforces(official_tests=[]), codeforces(id="2", time_limit=None), codeforces(id="3", official_tests=[{"input": "1"}])]
    path = written(tmp_path / "a.jsonl", *records)
    with pytest.raises(InputError) as caught:
        load("codeforces", path)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{number}" for number in (1, 2, 3)]
