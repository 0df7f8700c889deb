"""The code grader: honest answers are right, cheats are not, faults are neither. HumanEval is in tests/unit/eval."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.grade import code
from megatron_prism.grade.format import answer_of
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.grade.sandbox import choose
from megatron_prism.grade.sandbox.backend import Interpreter
from megatron_prism.grade.sandbox.result import Limits
from megatron_prism.grade.sandbox.sandbox import Sandbox

ADDS = {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "20 22\n", "output": "42\n"}]}
DOUBLES = {"kind": "asserts", "code": "assert double(2) == 4\nassert double(21) == 42\nassert double([1]) == [1, 1]"}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return choose.choose(Limits(wall_s=4, cpu_s=2))
    except EnvironmentFault as error:
        if os.environ.get("PRISM_REQUIRE_SANDBOX") == "1":
            raise
        pytest.skip(str(error))


def item(source: str, tests: dict[str, Any] | None, **given: Any) -> Item:
    return Item(
        id="1",
        kind="code",
        response=f"<think>hm\n```python\nprint(0)\n```\n</think>It is\n```python\n{source}\n```\n.",
        tests=tests,
        **given,
    )


def graded(one: Item, sandbox: Sandbox) -> Graded:
    """Grade as the grader does: the gate first."""
    answer = answer_of(one, "required")
    return answer if isinstance(answer, Graded) else code.grade_code(one, answer, sandbox)


def grade(source: str, tests: dict[str, Any], sandbox: Sandbox) -> Graded:
    return graded(item(source, tests), sandbox)


HONEST = {
    "reads and prints": ("a, b = map(int, input().split())\nprint(a + b)", ADDS),
    "reads to the end": (
        "import sys\ndef main():\n  print(sum(map(int, sys.stdin.read().split())))\nif __name__ == '__main__': main()",
        ADDS,
    ),
    "exits by itself": ("import sys\nprint(sum(map(int, input().split())), '')\nsys.exit(0)", ADDS),
    "exits by a builtin": ("a, b = map(int, input().split())\nif b > 9:\n  print(a + b); exit()\nprint(a + b)\nquit()", ADDS),
    "a checker that exits by a builtin": (
        "print(sum(map(int, input().split())))",
        {**ADDS, "checker": "same = open('solution_output.txt').read() == open('correct_output.txt').read()\nprint(int(same)); exit(0)"},
    ),
    "reads its input by name": ("print(sum(map(int, open('/dev/stdin').read().split())))", ADDS),
    "prints 40,000 digits": ("print(str(10 ** 40000))", {"kind": "stdin", "cases": [{"input": "", "output": f"1{'0' * 40000}"}]}),
    "returns 40,000 digits": (
        "def power(n, whole): return [-int(whole), 10 ** n, 0, int('1' + '0' * n)]",
        {
            "kind": "call",
            "function": "power",
            "cases": [{"input": f"40000\n{'2' * 5000}", "output": f"[-{'2' * 5000}, 1{'0' * 40000}, -0, 1{'0' * 40000}]"}],
        },
    ),
    "prints a number another way": ("print(float(sum(map(int, input().split()))))", ADDS),
    "doubles": ("def double(x):\n  return x * 2", DOUBLES),
    "prints while it doubles": ("def double(x):\n  print('passed', x)\n  return x + x", DOUBLES),
    "changes its argument": ("def double(x):\n  if type(x) is list: x.extend(x); return x\n  return 2 * x", DOUBLES),
    "returns a subclass": ("class L(list): pass\ndef double(x):\n  return L(x * 2) if type(x) is list else x * 2", DOUBLES),
    "a class with state": (
        "class Counter:\n  def __init__(self, start): self.n = start\n  def add(self, k=1): self.n += k; return self.n",
        {"kind": "asserts", "code": "c = Counter(3)\nassert c.add() == 4\nassert c.add(k=2) == 6\nassert c.n == 6"},
    ),
    "a program with LiveCodeBench's names": (
        "def depth(n): return n and 1 + depth(n - 1)\nassert depth(5000) == 5000\nc: Counter = Counter(map(int, input().split()))\n"
        "print(reduce(lambda a, b: a + b, c.elements()), pow(2, 0, 1) or '')",
        {**ADDS, "imports": True},
    ),
    "a program beside the function": (
        "def double(x):\n  return x * 2\nif __name__ == '__main__':\n  print(double(int(input())))\n  raise SystemExit",
        DOUBLES,
    ),
    "a program beside the method": (
        "class Solution:\n  def double(self, x):\n    return x * 2\nif __name__ == '__main__':\n  print(Solution().double(int(input())))",
        {"kind": "call", "function": "double", "cases": [{"input": "21", "output": "42"}]},
    ),
    "classes that are looked up in their module": (
        "import pickle, typing\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n  x: 'int'\n"
        "def double(x):\n  assert typing.get_type_hints(P) == {'x': int}\n  return pickle.loads(pickle.dumps(P(x))).x * 2",
        DOUBLES,
    ),
    "a generator": (
        "def f(n):\n  yield from range(n)",
        {"kind": "asserts", "code": "assert list(f(3)) == [0, 1, 2]\nassert sum(f(4)) == 6"},
    ),
    "an exception": (
        "def f(n):\n  raise ValueError(n)",
        {"kind": "asserts", "code": "try:\n  f(1)\n  assert False\nexcept ValueError as error:\n  assert str(error) == '1'"},
    ),
    "the types of values": (
        "def f(*x, **k): return x, k",
        {
            "kind": "asserts",
            "code": "v = [1, -2**70, 1.5, float('inf'), 'caf\\u00e9\\ud800', b'x', None, True, {1}, frozenset('a'), {(1, 2): [3]}, 2j, ()]\n"
            "assert f(*v, a=v) == (tuple(v), {'a': v}) and type(f(1)[0][0]) is int and f(float('nan'))[0][0] != 1",
        },
    ),
    "a builtin's name": ("def sum(a, b): return a * b", {"kind": "asserts", "code": "assert sum(3, 5) == 15", "entry_point": "sum"}),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_answer_is_right(name: str, sandbox: Sandbox) -> None:
    result = grade(*HONEST[name], sandbox)
    assert result == Graded(id="1", outcome="right"), result


EQUAL = "class E(int):\n  __eq__ = lambda s, o: True\n  __ne__ = lambda s, o: False\n  __hash__ = int.__hash__\n"
FRAMES = (
    "import sys\nf = sys._getframe()\nwhile f:\n  f.f_globals.update(judge=lambda *a: 'passed', passed=True); f.f_locals; f = f.f_back\n"
)
CHEATS = {
    "prints both outputs": ("print('3\\n42')", ADDS),
    "prints the first output": ("print(3)", ADDS),
    "prints markers": ("print('passed\\nOK\\n1 passed\\nright')", ADDS),
    "looks for the tests in files": (
        "import os\nfor d, _, files in os.walk('/tmp'):\n  for f in files: print(open(os.path.join(d, f)).read())",
        ADDS,
    ),
    "prints, then fails": ("print(sum(map(int, input().split())))\nraise ValueError", ADDS),
    "prints, then exits with a code": ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(3)", ADDS),
    "prints, then hangs in a thread": (
        "import threading, time\nprint(sum(map(int, input().split())), flush=True)\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        ADDS,
    ),
    "prints without end": ("while True: print(3)", ADDS),
    "exits": ("exit(0)", DOUBLES),
    "returns other digits": (
        "def power(n): return 10 ** n + 1",
        {"kind": "call", "function": "power", "cases": [{"input": "40000", "output": f"1{'0' * 40000}"}]},
    ),
    "exits by a builtin with a code": ("print(sum(map(int, input().split())))\nexit(3)", ADDS),
    "exits after its function": ("def double(x): return x * 2\nquit()", DOUBLES),
    "exits in the method": (
        "class Solution:\n  def double(self, x): exit(0)",
        {"kind": "call", "function": "double", "cases": [{"input": "21", "output": "42"}]},
    ),
    "exits at once": ("import os; os._exit(0)", DOUBLES),
    "exits in the function": ("import sys\ndef double(x): sys.exit(0)", DOUBLES),
    "raises SystemExit": ("def double(x): raise SystemExit(0)", DOUBLES),
    "exits the process in the function": ("import os\ndef double(x): os._exit(0)", DOUBLES),
    "equals everything": (f"{EQUAL}def double(x): return E(7)", DOUBLES),
    "an object equals everything": ("class E:\n  def __eq__(s, o): return True\ndef double(x): return E()", DOUBLES),
    "a class stands for the function": ("class double:\n  def __init__(s, x): pass\n  def __eq__(s, o): return True", DOUBLES),
    "patches builtins": (
        "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.list = builtins.int = str\ndef double(x): return 0",
        DOUBLES,
    ),
    "patches print and stdout": (
        "import sys, os\nsys.stdout = open(os.devnull, 'w')\nsys.stdout.write = print = lambda *a: 3\nos.write(1, b'passed')\ndef double(x): return 0",
        DOUBLES,
    ),
    "patches unittest and json": (
        "import unittest, json\nunittest.TestCase.run = json.loads = json.dumps = lambda *a, **k: True\ndef double(x): return 0",
        DOUBLES,
    ),
    "runs at exit": (
        "import atexit, os\natexit.register(lambda: os.write(1, b'passed') and os._exit(0))\ndef double(x): return 0",
        DOUBLES,
    ),
    "writes a verdict to each descriptor": (
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'passed')\n  except OSError: pass\ndef double(x): return 0",
        DOUBLES,
    ),
    "forges replies": (
        "import os\ndef double(x): return 0\nfor fd in range(3, 64):\n  try:\n    for _ in range(99): os.write(fd, b'0000000dt2;s5;valueN')\n"
        "  except OSError: pass",
        DOUBLES,
    ),
    "changes its caller's frames": (f"{FRAMES}def double(x): return 0", DOUBLES),
    "patches the encoder": (
        "import sys\nsys._getframe(1).f_globals['encode'] = lambda *a: b't2;s5;valueT'\ndef double(x): return 0",
        DOUBLES,
    ),
    "recurses": ("def double(x): return double(x)", DOUBLES),
    "returns what is infinitely deep": ("def double(x):\n  a = []\n  a.append(a)\n  return a", DOUBLES),
    "hangs": ("def double(x):\n  while True: pass", DOUBLES),
    "leaves a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\ndef double(x): return 0",
        DOUBLES,
    ),
    "raises AssertionError's opposite": ("def double(x): raise StopIteration(x)", DOUBLES),
    "empties its argument": (
        "def f(x): x.clear(); return []",
        {"kind": "asserts", "code": "l = [3, 1]\nassert f(l) == sorted(l)"},
    ),
    "is lost, and the tests catch everything": (
        "import os\ndef f(): os._exit(0)",
        {"kind": "asserts", "code": "try:\n  f()\nexcept BaseException: pass\nassert True"},
    ),
    "claims that the tests are broken": ("def double(x): raise NameError('x is not defined')", DOUBLES),
    "gives the tests' parser no Python": (
        "def double(x): return '('",
        {"kind": "asserts", "code": "import ast\nassert ast.literal_eval(double('[2'))"},
    ),
    "gives objects for a set that is handed on": (
        "class T: pass\ndef f(): return [T()]\ndef double(x): return 0",
        {"kind": "asserts", "code": "assert double({*f()}) == double(frozenset(f())) == 2"},
    ),
    "claims that the machine is full": ("import os, sys\nsys.stderr.write('bwrap: Cannot fork')\nos._exit(137)", DOUBLES),
    "gives no function": ("x = 1", DOUBLES),
    "is no Python": ("def double(x) return", DOUBLES),
    "redefines a builtin of the tests": (
        "def abs(x): return 0\ndef f(x): return 99.0",
        {"kind": "asserts", "code": "assert abs(f(1) - 1.0) < 1e-6"},
    ),
    "answers to numpy's protocol": (
        "class E:\n  __array_priority__ = 1e9\n  def __array_ufunc__(s, *a, **k): return True\n  __array_function__ = __array_ufunc__\n"
        "  def __getattr__(s, n): return lambda *a: True\ndef double(x): return E()",
        DOUBLES,
    ),
    "tampers with sys.modules": (
        "import sys\nclass M:\n  def __getattr__(s, n): return lambda *a, **k: True\nfor n in list(sys.modules): sys.modules[n] = M()\n"
        "sys.modules['__main__'] = M()\ndef double(x): return 0",
        DOUBLES,
    ),
    "reads what its descriptors hold": (
        "import os\nsaid = b''\nfor fd in range(3, 64):\n  for way in (lambda: os.pread(fd, 1 << 16, 0), lambda: open(f'/proc/self/fd/{fd}', 'rb').read()):\n"
        "    try: said += way()\n    except OSError: pass\nprint(said.decode('latin-1'))",
        ADDS,
    ),
    "reads the tests from a file": (
        "import os, sys\nfor p in (__file__ if '__file__' in globals() else 'tests.py', 'tests.py', '/proc/self/cmdline', '/proc/1/environ', *sys.argv):\n"
        "  try: print(open(p).read())\n  except OSError: pass",
        ADDS,
    ),
    "looks for the tests in memory": (
        "import gc, sys\nfor o in gc.get_objects():\n  if type(o) is dict and 'cases' in o: print(o['cases'][0]['output'])\n"
        "f = sys._getframe()\nwhile f:\n  if 'job' in f.f_locals: print(f.f_locals['job'])\n  f = f.f_back",
        ADDS,
    ),
    "prints the outputs at exit": (
        "import atexit\nfor n in (42, 3): atexit.register(print, n)\n",
        ADDS,
    ),
    "traces and profiles": (
        "import sys, threading\ndef t(frame, event, arg):\n  for n in ('verdict', 'said', 'value'):\n    if n in frame.f_locals: frame.f_locals[n] = 'passed'\n"
        "  return t\nsys.settrace(t)\nsys.setprofile(t)\nthreading.settrace(t)\ndef double(x): return 0",
        DOUBLES,
    ),
    "patches every builtin": (
        "import builtins\nfor n in ('len', 'isinstance', 'all', 'any', 'sorted', 'abs', 'type', 'str', 'int', 'bool'):\n"
        "  setattr(builtins, n, lambda *a, **k: True)\ndef double(x): return 0",
        DOUBLES,
    ),
    "exits in an import": (
        "import sys, os\nclass F:\n  def find_spec(s, n, p=None, t=None): os._exit(0)\nsys.meta_path.insert(0, F())\nimport nothing\ndef double(x): return 0",
        DOUBLES,
    ),
    "becomes another program": (
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo passed; exit 0'])",
        DOUBLES,
    ),
    "claims another class": (
        "class E:\n  __class__ = property(lambda s: int)\n  def __eq__(s, o): return True\n  def __int__(s): return 4\n  __index__ = __int__\n"
        "def double(x): return E()",
        DOUBLES,
    ),
    "signals itself with an alarm": (
        "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, 0.001)\n"
        "def double(x):\n  while True: pass",
        DOUBLES,
    ),
    "keeps writing behind the tests' back": (
        "import threading, os\ndef w():\n  while True:\n    for fd in range(3, 64):\n      try: os.write(fd, b'0000000dt2;s5;valueT')\n      except OSError: pass\n"
        "def double(x):\n  threading.Thread(target=w, daemon=True).start()\n  return 0",
        DOUBLES,
    ),
    "contains what it is asked for": (
        "class E:\n  def __contains__(s, x): return True\n  def __iter__(s): return iter([0])\ndef f(): return E()",
        {"kind": "asserts", "code": "assert 7 in f()"},
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_wrong(name: str, sandbox: Sandbox) -> None:
    result = grade(*CHEATS[name], sandbox)
    assert (result.outcome == "wrong" and result.why) or "too busy" in result.why, result


def test_what_is_no_answer() -> None:
    def outcome(response: str, **given: Any) -> str:
        return graded(Item(id="1", kind="code", response=response, tests=ADDS, **given), None).outcome  # type: ignore[arg-type]

    assert outcome("```python\nprint(3)\n```") == "no_format"
    assert outcome("<think>```python\nprint(3)\n```</think> so it is") == "no_format"
    assert outcome("<think></think>```python\nprint(3)") == "no_format"
    assert outcome("<think>hm", is_truncated=True) == "truncated"
    assert outcome("<think></think>```\nprint(3)\n```</think>```\nprint(3)\n```") == "no_format"  # a spoofed tag


@pytest.mark.parametrize(
    "tests",
    [
        None,
        {},
        {"kind": "stdin", "cases": []},
        {"kind": "stdin", "cases": [{"input": "1"}]},
        {**ADDS, "imports": "yes"},
        {"kind": "asserts", "code": "assert ("},
        {"kind": "asserts", "code": "assert 1 == 1"},
        {"kind": "asserts", "code": ""},
        {"kind": "asserts", "code": "double(1)"},
        {"kind": "asserts", "code": "def test_a():\n  assert double(1) == 2"},
        {"kind": "asserts", "code": "def check(candidate):\n  assert candidate(1) == 2", "entry_point": "double"},
        {"kind": "asserts", "code": "import nothing_of_the_kind\nassert double(1) == 2"},
        {"kind": "asserts", "code": "assert double(lambda x: x) == 2"},
    ],
)
def test_tests_that_cannot_judge_are_a_fault(tests: dict[str, Any] | None, sandbox: Sandbox) -> None:
    result = graded(item("def double(x): return 2 * x", tests), sandbox)
    assert result.outcome == "fault" and result.why, result


def test_the_values_of_a_call_are_read_as_it_is_made(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a million integers takes this process most of a second, in which no other response is graded."""
    cases = [{"input": "21", "output": "42"}, {"input": "no JSON", "output": "42"}, {"input": "1", "output": "2"}]
    tests, read, reads = {"kind": "call", "function": "double", "cases": cases}, list[str](), code._json
    monkeypatch.setattr(code, "_json", lambda text: read.append(text) or reads(text))
    assert grade("def double(x): return 0", tests, sandbox).outcome == "wrong" and read == ["21", "42"]
    assert grade("def double(x): return 2 * x", tests, sandbox).outcome == "fault"
    assert code.tests_problem(tests).startswith(code.NO_JSON) and not code.tests_problem({**tests, "cases": cases[:1]})
    assert code.tests_problem({**tests, "function": "no name"}) == "the tests have no function to call"


def test_an_output_may_be_as_long_as_the_expected_one(sandbox: Sandbox) -> None:
    tests = {"kind": "stdin", "cases": [{"input": "", "output": "1\n" * 600_000}]}  # 1.2 MB
    assert grade("print('1\\n' * 600_000)", tests, sandbox).outcome == "right"
    assert grade("while True: print(1)", tests, sandbox).outcome == "wrong"


def test_a_fault_of_the_sandbox_is_a_fault(sandbox: Sandbox) -> None:
    broken = dataclasses.replace(sandbox, interpreter=Interpreter(Path("/usr/bin/no-python"), Path("/usr")))
    assert grade("print(3)", ADDS, broken).outcome == grade("def double(x): return x", DOUBLES, broken).outcome == "fault"
