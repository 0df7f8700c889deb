"""Nothing that is shipped can run what a file says, or open a door: read from the source by ast.

Looked at is every reference, not only calls: `map(pickle.loads, ...)` and a subclass of Unpickler are found, under any alias. The
exceptions stand in ALLOWED, each with its reason. Each rule is fed its offenders, and lawful neighbours that must pass.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _names(modules: str, names: str) -> set[str]:
    return {f"{module}.{name}" for module in modules.split() for name in names.split()}


FORBIDDEN = {
    *_names("pickle _pickle cPickle dill cloudpickle marshal", "load loads Unpickler _load _loads _Unpickler *"),
    *_names("shelve", "open Shelf DbfilenameShelf *"),
    *_names("joblib jsonpickle", "load decode *"),
    *_names("pandas", "read_pickle"),
    *_names(
        "yaml",
        "load load_all full_load full_load_all unsafe_load unsafe_load_all Loader FullLoader UnsafeLoader CLoader CFullLoader CUnsafeLoader *",
    ),
    *_names("os", "system popen *"),
    *_names("subprocess", "getoutput getstatusoutput *"),
    *_names("pty", "spawn"),
    *_names("tempfile", "mktemp"),
    *_names("builtins", "eval exec compile __import__ *"),
    *("eval", "exec", "compile", "__import__"),
    *_names("torch", "jit.load hub.load package.PackageImporter serialization.add_safe_globals serialization.safe_globals"),
    *_names("numpy", "lib.format.read_array lib.npyio.NpzFile"),
}
HANDED_ON = {
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "builtins",
}  # modules that are only named to take a part of them
TORCH_LOAD = {"torch.load", "torch.serialization.load"}
NETWORK = {
    "requests",
    "httpx",
    "aiohttp",
    "urllib",
    "urllib3",
    "http",
    "ftplib",
    "smtplib",
    "socketserver",
    "xmlrpc",
    "websockets",
    "uvicorn",
    "fastapi",
    "flask",
}
HARMLESS = {"urllib.parse", "http.HTTPStatus"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
EVERYWHERE = {"0.0.0.0", "::", "[::]", "*:0"}
FALSE_ONLY = ("shell", "allow_pickle", "trust_remote_code")  # keywords that may only say False

# (file, what it names): why it may
ALLOWED = {
    ("megatron_prism/checkpoint/unpickle.py", "pickle._Unpickler"): "the one unpickler: it finds only an allow list",
    ("megatron_prism/checkpoint/unpickle.py", "pickle"): "its harmless names pass unchanged to the modules that are guarded",
    ("megatron_prism/checkpoint/unpickle.py", "torch.load"): "wrapped so that it is weights_only whatever it is asked for",
    (
        "megatron_prism/rl/aligner/server.py",
        "http.server.BaseHTTPRequestHandler",
    ): "the reward server that NeMo-Aligner asks, started by a command",
    ("megatron_prism/rl/aligner/server.py", "http.server.ThreadingHTTPServer"): "the same",
    ("megatron_prism/rl/aligner/server.py", "bind(self.server_address)"): "a loopback address, or one where every request needs a token",
    ("megatron_prism/rl/aligner/forward.py", "http.client"): "asks the reward server that the job names",
    ("megatron_prism/rl/aligner/forward.py", "http.server.BaseHTTPRequestHandler"): "serves on 127.0.0.1 alone",
    ("megatron_prism/rl/aligner/forward.py", "http.server.ThreadingHTTPServer"): "the same",
    ("megatron_prism/eval/endpoint.py", "http.client"): "asks the address that the config names, and follows neither proxy nor redirection",
    ("megatron_prism/eval/endpoint.py", "urllib.error"): "the same",
    ("megatron_prism/eval/endpoint.py", "urllib.request"): "the same",
    ("megatron_prism/grade/sandbox/inside.py", "exec"): "it runs judged code, and only inside the sandbox, as the text of `python -c`",
    ("megatron_prism/grade/sandbox/inside.py", "compile"): "of the same code",
    ("megatron_prism/grade/sandbox/exchange.py", "exec"): "it runs the tests, and only inside the sandbox",
    ("megatron_prism/grade/sandbox/exchange.py", "compile"): "of the same tests",
    ("megatron_prism/grade/code.py", "builtins"): "only its names are listed",
}


def aliases(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def references(tree: ast.Module) -> Iterator[tuple[ast.expr, str, bool]]:
    """Yield each name and attribute with its full dotted name, and whether it is only named to take a part of it."""
    names = aliases(tree)
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            first, dot, rest = ast.unparse(node).partition(".")
            yield node, names.get(first, first) + dot + rest, id(node) in owners


def offences(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, what is named) for each thing a shipped file may not do."""
    tree = ast.parse(text)
    full = {id(node): name for node, name, _ in references(tree)}
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node, name, is_owner in references(tree):
        keywords = {keyword.arg: keyword.value for keyword in called[id(node)].keywords} if id(node) in called else {}
        is_weights_only = _constant(keywords.get("weights_only")) is True
        if name in FORBIDDEN or (name in HANDED_ON and not is_owner) or (name in TORCH_LOAD and not is_owner and not is_weights_only):
            yield node.lineno, name
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, name) for name in _imported(node) if _is_forbidden_import(name))
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, said) for said in _call(node, full.get(id(node.func), "")))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in EVERYWHERE:
                yield node.lineno, repr(node.value)
            elif "\n" in node.value and "import " in node.value:  # a program kept as a text
                yield from ((node.lineno, name) for _, name in _of_program(node.value))


def _call(call: ast.Call, name: str) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    for key in FALSE_ONLY:
        if key in keywords and _constant(keywords[key]) is not False:
            yield f"{key}={ast.unparse(keywords[key])}"
    parts = name.split(".")
    if parts[-1] == "from_pretrained" and parts[-2:-1] and parts[-2].startswith("Auto") and "trust_remote_code" not in keywords:
        yield f"{name} without trust_remote_code=False"  # left out, it asks at a terminal
    if isinstance(call.func, ast.Attribute) and call.func.attr == "bind" and len(call.args) == 1:
        address = call.args[0]
        host = _constant(address.elts[0]) if isinstance(address, ast.Tuple) and address.elts else None
        if host not in LOOPBACK:
            yield f"bind({ast.unparse(address)})"
    if name == "importlib.import_module" and (
        not call.args or not isinstance(_constant(call.args[0]), str) or _is_forbidden_import(f"{_constant(call.args[0])}.*")
    ):
        yield f"{name}({', '.join(map(ast.unparse, call.args))})"


def _constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if node.module and not node.level else []


def _is_forbidden_import(name: str) -> bool:
    return name in FORBIDDEN or (
        name.split(".")[0] in NETWORK and not any(name == part or name.startswith(f"{part}.") for part in HARMLESS)
    )


def _of_program(text: str) -> list[tuple[int, str]]:
    try:
        return list(offences(text))
    except SyntaxError:
        return []


def shipped() -> dict[str, str]:
    """Return every Python file that git tracks or would track, but the tests, by path."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = (
        listed.stdout.split("\0")
        if listed.returncode == 0
        else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in str(path)]
    )
    return {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in sorted(set(names))
        if name and not name.startswith("tests/") and (ROOT / name).is_file()
    }


def test_nothing_shipped_can_run_what_a_file_says() -> None:
    files = shipped()
    assert {"megatron_prism", "tools", "bench", "examples", "setup.py"} <= {name.split("/")[0] for name in files}
    found = [(path, line, name) for path, text in files.items() for line, name in offences(text)]
    assert not [f"{path}:{line}: {name}" for path, line, name in found if (path, name) not in ALLOWED]
    assert set(ALLOWED) == {(path, name) for path, _, name in found}, "an exception that is no longer needed"


BAD = """
import pickle; pickle.load(f)
import pickle as p; p.loads(b)
from pickle import load; load(f)
from pickle import loads as read
from pickle import *
import pickle; class_ = type("U", (pickle.Unpickler,), {})
import pickle; list(map(pickle.loads, parts))
import pickle; getattr(pickle, "lo" + "ads")(b)
import pickle; f = pickle; f.loads(b)
import _pickle; _pickle.loads(b)
import dill; dill.load(f)
import cloudpickle as c; c.loads(b)
import marshal; marshal.loads(b)
import shelve; shelve.open("a")
import joblib; joblib.load("a")
import pandas as pd; pd.read_pickle("a")
import importlib; importlib.import_module(name)
import importlib; importlib.import_module("requests")
from importlib import import_module; import_module("pickle").loads(b)
import torch; torch.load("a")
import torch as t; t.load("a", weights_only=False)
from torch import load as read; read("a", map_location="cpu")
import torch; torch.load("a", weights_only=flag)
import torch; read = torch.load
import torch; torch.hub.load("a", "b")
import torch; torch.serialization.add_safe_globals([eval_])
import torch.jit; torch.jit.load("a")
import yaml; yaml.load(f, Loader=yaml.SafeLoader)
import yaml; yaml.unsafe_load(f)
from yaml import full_load
import yaml as y; y.load_all(f)
from yaml import UnsafeLoader
import subprocess; subprocess.run("ls", shell=True)
import subprocess; subprocess.run("ls", shell=flag)
from subprocess import Popen; Popen("ls", shell=1)
import subprocess; subprocess.getoutput("ls")
import os; os.system("ls")
from os import popen
import os as o; o.popen("ls")
eval("1")
exec(text)
compile(text, "a", "exec")
__import__(name)
import builtins; builtins.exec(text)
f = eval
import numpy as np; np.load("a", allow_pickle=True)
import numpy; numpy.load("a", allow_pickle=flag)
from transformers import AutoModel; AutoModel.from_pretrained("a", trust_remote_code=True)
from transformers import AutoModel; AutoModel.from_pretrained("a", trust_remote_code=flag)
from transformers import AutoTokenizer; AutoTokenizer.from_pretrained("a")
import transformers; transformers.AutoConfig.from_pretrained("a")
import requests
from urllib import request
import urllib.request
import http.server
from aiohttp import web
import socket; socket.socket().bind(("0.0.0.0", 0))
import socket; s = socket.socket(); s.bind(("", 0))
s.bind((host, 0))
s.bind(address)
serve(host="0.0.0.0")
import tempfile; tempfile.mktemp()
from tempfile import mktemp
CODE = "import pickle\\nimport sys\\npickle.load(sys.stdin.buffer)"
def f(): from pickle import load
""".strip().splitlines()
GOOD = """
import pickle; pickle.dumps(a); pickle.UnpicklingError
import torch; torch.load("a", weights_only=True)
from torch import load; load("a", map_location="cpu", weights_only=True)
import yaml; yaml.safe_load(f); yaml.safe_dump(a)
from yaml import YAMLError
import subprocess; subprocess.run(["ls"], shell=False)
import os; os.replace(a, b); os.path.join(a, b)
model.eval()
import re; re.compile("a")
import torch; torch.compile(model)
import numpy as np; np.load("a", allow_pickle=False); np.load("a")
from transformers import AutoModel; AutoModel.from_pretrained("a", trust_remote_code=False)
from transformers import LlamaForCausalLM; LlamaForCausalLM.from_pretrained("a")
from urllib.parse import quote
import urllib.parse
import socket; socket.gethostname(); socket.socket().bind(("127.0.0.1", 0))
import importlib; importlib.import_module("megatron.core")
import tempfile; tempfile.mkdtemp()
import json; json.load(f); json.loads(a)
config.load(path)
TEXT = "import the folder\\nand load it"
def load(path): return load(path)
""".strip().splitlines()


@pytest.mark.parametrize("text", BAD)
def test_the_gate_sees(text: str) -> None:
    assert list(offences(text))


@pytest.mark.parametrize("text", GOOD)
def test_the_gate_lets_pass(text: str) -> None:
    assert not list(offences(text))
