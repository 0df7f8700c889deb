"""What the code grader reads without running anything: the fenced code of an answer, tests' asserts, and outputs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_prism.grade import code
from megatron_prism.grade.asserts import asserts_when_run

MIB = 1 << 20


def test_the_last_closed_block_counts_and_is_found_in_one_pass() -> None:
    assert code.code_of("```\na\n```\n```py\nb\n```\n") == "b\n"
    assert code.code_of("```\na\n``` \n```py\nb\n") == "a\n"
    assert code.code_of("```py\n```js\nb\n```") == "```js\nb\n"
    assert code.code_of("x\n````py\na\n```\nb\n````") == "a\n```\nb\n"
    assert code.code_of("```\na\n`````\n") == "a\n" and code.code_of("````\na\n```") is None
    assert code.code_of("1. so\n\n   ```python\n   if x:\n       y\n\n   z\n   ```\n2. done") == "if x:\n    y\n\nz\n"
    assert code.code_of("* so\n\t```\n\ta\n```") == "a\n"
    assert code.code_of("~~~python\na\n```\nb\n~~~") == "a\n```\nb\n"
    assert code.code_of("```\ndef f():\n    '''\n    ```\n    '''\n```") == "def f():\n    '''\n    ```\n    '''\n"
    assert code.code_of("~~~~\na\n~~~~") == "a\n" and code.code_of("~~~\na\n```\n") is None
    start = time.process_time()
    assert code.code_of("```a\n" * 1_000_000) is None
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda: code.is_same_output("1" * MIB + "-1", "YES"), False),
        (lambda: code.is_same_output("." + "1" * MIB + "e", "YES"), False),
        (lambda: code.is_same_output("1" * MIB, "1" * MIB + ".0"), True),
        (lambda: code.code_of("~" * MIB + "`\nx"), None),
        (lambda: code.code_of("`" * MIB + "x`\nx"), None),
    ],
    ids=["digits", "decimals", "a number", "tildes", "backticks"],
)
def test_a_mebibyte_of_one_character_is_read_in_time(read: Callable[[], Any], expected: Any) -> None:
    def ring(*_: object) -> None:
        raise TimeoutError("not read in 60 s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    try:
        assert read() == expected
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("tests", "asserts"),
    [
        ("assert f(1) == 2", True),
        ("for x in (1, 2):\n  with y:\n    if x:\n      assert f(x)", True),
        ("def check(candidate):\n  assert candidate(1) == 2\ncheck(f)", True),
        ("def a():\n  assert f(1)\ndef b():\n  a()\nb()", True),
        ("class T:\n  def a(self):\n    assert f(1)\nT().a()", True),
        ("def a():\n  assert f(1)\nfor t in [a]:\n  t()", True),
        ("def a():\n  assert f(1)\nrun(a)", True),
        ("if f(1) != 2:\n  raise ValueError", True),
        ("numpy.testing.assert_allclose(f(1), 2)", True),
        ("class T:\n  def a(self):\n    assert f(1)", False),
        ("def a():\n  assert f(1)\nif __name__ == '__main__':\n  a()", False),
        ("if False:\n  assert f(1)", False),
        ("def a():\n  assert f(1)\ndef b():\n  a()", False),
        ("check = lambda g: g(1)\ncheck(f)", False),
        ("def assert_same(a, b):\n  return a == b\nassert_same(f(1), 2)", False),
        ("print(f(1))", False),
    ],
)
def test_which_tests_assert_when_they_run(tests: str, asserts: bool) -> None:
    assert asserts_when_run(tests) is asserts


@pytest.mark.parametrize(
    ("said", "expected", "is_same"),
    [
        ("3\n", "3", True),
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("1.0 2e0", "1 2.00", True),
        ("0.1000000000000000000001", "0.1", False),
        ("1. .5 +1.5E-007", "1 0.50 .00000015", True),
        ("nan", "NaN", False),
        *[(text, "0", False) for text in (".", "e1", "1e", "1e1000", "+", "1.2.3", "--1", "\u0661", "0_0")],
        ("1\n2", "1 2", False),
        ("1", "1 1", False),
        ("Yes", "YES", False),
        ("", "0", False),
    ],
)
def test_outputs_are_compared_exactly(said: str, expected: str, is_same: bool) -> None:
    assert code.is_same_output(said, expected) is is_same
