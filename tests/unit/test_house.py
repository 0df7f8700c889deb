"""The law of the house, read from the source by ast: layers, heavy packages, sizes, and what no file may hold.

What could run a stranger's code is tests/reliability/test_static_gate.py's to find.

Each rule is a function from one source file to its offences, and is fed an offender, so that it is known to be able to fail.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_prism"
ROOMS_BY_LAYER = [
    ["core"],
    ["parallel", "families", "hf", "grade"],
    ["data", "models", "planning"],
    ["prepare", "checkpoint", "train", "generate"],
    ["analysis", "eval", "launch", "merge", "report", "study"],
    ["rl"],
    ["jobs"],
    ["cli"],
]
LAYER = {room: layer for layer, rooms in enumerate(ROOMS_BY_LAYER) for room in rooms}
HEAVY = {"megatron", "transformer_engine", "apex", "mamba_ssm", "nemo", "nemo_aligner", "nemo_rl", "vllm", "transformers"}
LIGHT_ROOMS = {"core", "families", "cli", "jobs", "planning", "data", "prepare", "grade"}  # no heavy package at import
NO_TORCH_ROOMS = {"core", "families", "planning", "cli", "prepare", "grade"}  # nor torch
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
FORBIDDEN_WORDS = ("TO" + "DO", "FIX" + "ME")  # in two parts: this file is read as well


@dataclass(frozen=True)
class Source:
    """One Python file: its path below the repository, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The directory below the package, or the module's name where it stands alone; empty for the package itself."""
        part = self.path.split("/")[1].removesuffix(".py")
        return "" if part == "__init__" else part


def imports(source: Source, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield (line, full dotted name) of everything imported by `nodes`, relative imports made absolute."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = source.path.split("/")[: -node.level] if node.level else []
            start = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def at_import(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yield the statements that run when a module is imported: all but functions and `if TYPE_CHECKING`."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from at_import(node.orelse)
            continue
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from at_import(getattr(node, part, []))


def layers(source: Source) -> Iterator[str]:
    """A room imports only rooms of a lower layer, inside functions too."""
    if source.room and source.room not in LAYER:
        yield f"{source.path}: room {source.room!r} has no layer"
        return
    for line, name in imports(source, ast.walk(source.tree)):
        parts = name.split(".")
        if parts[0] != PACKAGE or len(parts) == 1 or parts[1] == source.room:
            continue
        if source.room and parts[1] not in LAYER and len(parts) == 2 and not (ROOT / PACKAGE / parts[1]).exists():
            continue  # a name of the package itself, such as __version__
        if LAYER.get(parts[1], 99) >= LAYER.get(source.room, 0):
            yield f"{source.path}:{line}: {source.room or PACKAGE} imports {name}, which is not of a lower layer"


def light_imports(source: Source) -> Iterator[str]:
    """Heavy packages, and torch, are not imported at the top of a module of the light rooms."""
    for line, name in imports(source, at_import(source.tree.body)):
        top = name.split(".")[0]
        if (source.room in LIGHT_ROOMS and (top in HEAVY or top.startswith("nemo"))) or (source.room in NO_TORCH_ROOMS and top == "torch"):
            yield f"{source.path}:{line}: {source.room} imports {name} at the top of a module"


def parallel_state(source: Source) -> Iterator[str]:
    """Only parallel/groups.py names Megatron-Core's global state in code (a docstring may)."""
    if source.path == f"{PACKAGE}/parallel/groups.py":
        return
    word = "parallel_state"
    for line, name in imports(source, ast.walk(source.tree)):
        if word in name.split("."):
            yield f"{source.path}:{line}: imports {name}; only parallel/groups.py may"
    for node in ast.walk(source.tree):
        named = isinstance(node, ast.Attribute) and node.attr == word
        written = isinstance(node, ast.Constant) and node.value == f"megatron.core.{word}"
        if named or written:
            yield f"{source.path}:{node.lineno}: names {word}; only parallel/groups.py may"  # type: ignore[attr-defined]


def sizes(source: Source) -> Iterator[str]:
    """A file stays within 400 lines, a function within 60."""
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{source.path}: {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{source.path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def plain_text(source: Source) -> Iterator[str]:
    """A file is ASCII, and finished."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            yield f"{source.path}:{number}: not ASCII: {ascii(line.strip())[:80]}"
        for word in FORBIDDEN_WORDS:
            if word in line:
                yield f"{source.path}:{number}: {word}"


def python_files() -> list[Source]:
    """Return every Python file of the working tree that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    names = (
        listed.stdout.split("\0") if listed.returncode == 0 else [str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.py")]
    )
    return [Source(name, (ROOT / name).read_text(encoding="utf-8")) for name in sorted(set(names)) if name and (ROOT / name).is_file()]


HOUSE = [source for source in python_files() if source.path.startswith(f"{PACKAGE}/")]
Rule = Callable[[Source], Iterator[str]]
RULES: list[tuple[Rule, list[Source]]] = [
    (layers, HOUSE),
    (light_imports, HOUSE),
    (parallel_state, HOUSE),
    (sizes, HOUSE),
    (plain_text, python_files()),
]


@pytest.mark.parametrize(("rule", "sources"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_the_tree_keeps_the_law(rule: Rule, sources: list[Source]) -> None:
    assert sources
    offences = [offence for source in sources for offence in rule(source)]
    assert not offences, "\n".join(["", *offences])


OFFENDERS: list[tuple[Rule, str, str]] = [
    (layers, "core/a.py", "from megatron_prism.parallel import host"),
    (layers, "models/a.py", "def f():\n    import megatron_prism.data.loader"),
    (layers, "families/a.py", "from ..models import build"),
    (layers, "jobs/a.py", "from megatron_prism import cli"),
    (layers, "train/a.py", "from megatron_prism import jobs as j"),
    (layers, "utils/a.py", ""),
    (layers, "__init__.py", "from megatron_prism.core import errors"),
    (light_imports, "jobs/a.py", "from transformers import AutoTokenizer"),
    (light_imports, "data/a.py", "try:\n    import nemo_run\nexcept ImportError:\n    pass"),
    (light_imports, "cli/a.py", "class A:\n    import torch.distributed"),
    (light_imports, "core/a.py", "if True:\n    from megatron.core import tensor_parallel"),
    (parallel_state, "parallel/host.py", "from megatron.core import parallel_state as mpu"),
    (parallel_state, "train/a.py", "def f():\n    from megatron.core.parallel_state import get_data_parallel_rank"),
    (parallel_state, "train/a.py", "import megatron.core as core\ncore.parallel_state.get_data_parallel_rank()"),
    (parallel_state, "train/a.py", "import importlib\nimportlib.import_module('megatron.core.parallel_state')"),
    (sizes, "core/a.py", "a = 1\n" * 401),
    (sizes, "core/a.py", "class A:\n    def f(self):\n" + "        a = 1\n" * 60),
    (plain_text, "core/a.py", "# caf\u00e9"),
    *((plain_text, "core/a.py", f"# {word}: later") for word in FORBIDDEN_WORDS),
]
LAWFUL = """
from typing import TYPE_CHECKING

from megatron_prism import __version__
from megatron_prism.core.errors import PrismError

if TYPE_CHECKING:
    import torch


def f(model, path):
    import torch
    import yaml
    from megatron.core import tensor_parallel

    return torch, yaml, tensor_parallel
"""


@pytest.mark.parametrize(("rule", "path", "text"), OFFENDERS)
def test_a_rule_finds_its_offender(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(f"{PACKAGE}/{path}", text)))


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES])
def test_a_rule_lets_a_lawful_file_pass(rule: Rule) -> None:
    assert not list(rule(Source(f"{PACKAGE}/jobs/a.py", LAWFUL)))


def imported_with(modules: list[str]) -> set[str]:
    """Return the top-level packages that importing `modules` brings into a fresh interpreter."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


EFFECTS = """
import importlib, logging, os, signal, sys, threading
sys.path[0] = os.getcwd()  # the empty name would follow a change of directory

def state():
    return {
        "environment": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "handlers": [list(logging.getLogger(name).handlers) for name in (None, "megatron_prism")],
        "threads": threading.active_count(),
        "directory": os.getcwd(),
    }

import torch  # what torch does at import is torch's
for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    if changed := [part for part in before if before[part] != after[part]]:
        print(f"importing {name} changes: {', '.join(changed)}")
"""


def effects_of(modules: list[str], folder: Path = ROOT) -> list[str]:
    """Return what importing each of `modules` changes in a fresh interpreter: environment, signals, log handlers, threads, working directory."""
    done = subprocess.run([sys.executable, "-c", EFFECTS, *modules], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_a_module_has_no_effect() -> None:
    paths = [source.path for source in HOUSE if not source.path.endswith("/__main__.py")]
    effects = effects_of([path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths])
    assert not effects, "\n".join(["", *effects])


def test_each_kind_of_effect_is_seen(tmp_path: Path) -> None:
    offenders = {
        "environment": "import os; os.environ['A'] = '1'",
        "signals": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "handlers": "import logging; logging.basicConfig()",
        "threads": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "directory": "import os; os.chdir('/')",
    }
    for part, line in offenders.items():
        (tmp_path / f"offender_{part}.py").write_text(line)
    names = [f"offender_{part}" for part in offenders]
    (tmp_path / "innocent.py").write_text("import json")
    assert effects_of(["innocent", *names], tmp_path) == [f"importing offender_{part} changes: {part}" for part in offenders]


def test_the_command_line_starts_without_torch() -> None:
    assert not imported_with([f"{PACKAGE}.cli"]) & {"torch", *HEAVY}


@pytest.mark.parametrize("room", ["core", "families", "grade", "planning", "prepare"])
def test_a_room_without_torch_stays_without_it(room: str) -> None:
    paths = [source.path for source in HOUSE if source.room == room]
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    if not modules:
        pytest.skip(f"no room {room} yet")
    assert not imported_with(modules) & {"torch", *HEAVY}


def test_the_subprocess_check_sees_torch() -> None:
    assert "torch" in imported_with(["torch"])
