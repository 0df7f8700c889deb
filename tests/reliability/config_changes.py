"""Ways to change a config: other values, misspelt keys, damaged bytes, odd overrides. `make` draws one and writes it down."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOPS = {
    "tiny/base.yaml": "train",
    "tiny/mid.yaml": "train",
    "tiny/base_mixture.yaml": "prepare",
    "tiny/mid_mixture.yaml": "prepare",
    "mixtures/math.yaml": "prepare",
    "mixtures/math_code.yaml": "prepare",
    "mixtures/math_code_science.yaml": "prepare",
    "mixtures/longctx.yaml": "prepare",
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "x",
        "none",
        "true",
        "1",
        "1e3",
        "-",
        "~",
        "/",
        "..",
        "\n",
        "a\nb: c",
        "\t",
        "\u00e9\u4e2d\U0001f600",
        "\u202e",
        "a\u0000b",
        "x" * 5000,
        "*",
        "[a-",
        "{",
        "}",
        "{a",
    ),
    *(
        "${steps}",
        "${absent}",
        "${",
        "${a.b",
        "\\${steps}",
        "${oc.env:HOME}",
        "${oc.env:PRISM_ABSENT}",
        "${oc.decode:1}",
        "${.}",
        "${..a}",
        "???",
    ),
    *(
        [],
        [None],
        [[]],
        [1, "a"],
        {},
        {"a": None},
        {"": 1},
        {1: 2},
        {None: 1},
        {True: 1},
        {"a": {"a": {"a": [{"a": [1]}]}}},
        {"base": "x.yaml"},
        {"_target_": "os.system"},
    ),
]
TEXTS = [
    *("2020-13-45", "2020-01-01", "2020-01-01T99:00:00Z", "1:30", "0x1F", "0o17", "0b1", "1_000", "9" * 5000, "1e999", "-.inf", ".nan"),
    *(
        "!!binary aGk=",
        "!!binary \u00e9",
        "!!set {a, b}",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!null x",
        "!!python/name:os.system",
        "!unknown x",
        "!!omap [a: 1]",
        "!!pairs [a]",
    ),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*absent",
        "<<",
        "{<<: 1}",
        "{<<: [1]}",
        "{a: 1, a: 2}",
        "[1, 2",
        "{a: 1",
        "'x",
        '"x',
        '"\\q"',
        "|",
        ">",
        "- a",
        "@",
        "%",
        "`",
        "a: b: c",
        "? [a]",
        "{? [a] : b}",
        "{[a, b]: c}",
    ),
    *("[" * 60 + "]" * 60, "[" * 3000 + "]" * 3000, "{a: " * 3000 + "1" + "}" * 3000),
]
OVERRIDES = [
    *(
        "a",
        "=",
        "a=",
        ".=1",
        "a.=1",
        ".a=1",
        "a..b=1",
        "steps=1=2",
        "steps=[1",
        "steps={a: b",
        "steps='",
        "steps=${",
        "steps=${steps}",
        "steps=${absent}",
        "steps=\t1",
        "steps=- a",
    ),
    *(
        "ste ps=1",
        "\u00e9=1",
        "\u4e2d.\u00e9=1",
        "steps.x=1",
        "steps[0]=1",
        "[0]=1",
        "0=1",
        "data.0=1",
        "sources.0.weight=x",
        "sources.99.weight=1",
        "sources.a=1",
        "sources.0=1",
        "sources=1",
        "sources.01.weight=1",
    ),
    *(
        "sources={}",
        "sources=[]",
        "sources.0={}",
        "data=",
        "data=1",
        "data.weights={a: 1, b: [1]}",
        "data.weights.a=x",
        "base=x.yaml",
        "steps=!!python/name:os.system",
        "steps=*a",
        "steps=" + "9" * 5000,
        "x" * 5000 + "=1",
    ),
    *(
        "steps=" + "[" * 3000,
        "model=null",
        "model.family=x",
        "optimizer={lr: nan}",
        "optimizer.lr=.inf",
        "batch.global_size=-1",
        "seed=1.5",
        "seed=true",
        "steps=\u0663",
        "\u0663=1",
        "sources.\u0663=1",
        "sources.\u00b2=1",
        "a.b.c.d.e=1",
    ),
]


@dataclass(frozen=True)
class Case:
    """What one example gives the command line: a command, a config, overrides; and what was done to it, for the message."""

    command: str
    config: Path
    overrides: list[str]
    done: str


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each value below the top."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def at(values: Any, path: tuple) -> Any:
    for key in path:
        values = values[key]
    return values


def misspelt(key: str, rng: random.Random) -> str:
    index = rng.randrange(len(key) + 1)
    return rng.choice(
        [
            key[:index] + key[index + 1 :],
            key[:index] + "x" + key[index:],
            key.upper(),
            key + "s",
            key.replace("_", "-"),
            key[::-1],
            f" {key}",
            "",
        ]
    )


def changed_values(values: Any, rng: random.Random) -> str:
    """Change one place of a config's values, and say what was done."""
    path = rng.choice(list(places(values)))
    parent, key = at(values, path[:-1]), path[-1]
    kind = rng.choice(["drop", "misspell", "replace", "replace", "replace", "wrap", "junk", "repeat"])
    where = ".".join(map(str, path))
    if kind == "drop":
        del parent[key]
    elif kind == "misspell" and isinstance(parent, dict):
        name = misspelt(str(key), rng)
        parent[name] = parent.pop(key)
        where += f" to {name!r}"
    elif kind == "wrap":
        parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, str(parent[key])])
    elif kind == "junk" and isinstance(parent, dict):
        parent[rng.choice(["junk", "base", "model", "sources", "0", "a.b", "\u00e9", "x" * 3000])] = rng.choice(VALUES)
    elif kind == "repeat" and isinstance(parent, list):
        parent.extend(parent[:] * rng.choice([1, 3]))
    else:
        parent[key] = rng.choice(VALUES)
        where += f" = {parent[key]!r:.60}"
    return f"{kind} {where}"


def bomb(depth: int) -> str:
    """Return YAML whose aliases stand for 9 ** depth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, depth)]
    return "\n".join(lines) + "\n"


def changed_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a config's bytes with one thing done to them, and what it was."""
    lines = data.splitlines(keepends=True)
    index = rng.randrange(len(lines))
    before, line, after = b"".join(lines[:index]), lines[index], b"".join(lines[index + 1 :])
    text = rng.choice(TEXTS).encode()
    key = line.split(b":")[0] if b":" in line else b"x"
    position = rng.randrange(len(data))
    options: dict[str, Callable[[], bytes]] = {
        "line twice": lambda: before + line + line + after,
        "line away": lambda: before + after,
        "tab": lambda: before + b"\t" + line + after,
        "indent": lambda: before + b" " + line + after,
        "invalid utf-8": lambda: (
            data[:position] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\x85", b"\x1b"]) + data[position:]
        ),
        "another encoding": lambda: data.decode().encode(rng.choice(["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])),
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "empty": lambda: rng.choice([b"", b"\n", b"# nothing\n", b"---\n", b"null\n"]),
        "other top": lambda: rng.choice([b"- a\n- b\n", b"a\n", b"1\n", b"[]\n", b"{}\n", b"---\na: 1\n---\nb: 2\n"]),
        "bomb": lambda: data + bomb(rng.choice([2, 4, 9, 30])).encode(),
        "text": lambda: before + key + b": " + text + b"\n" + after,
        "text as the whole": lambda: text + b"\n",
        "cut": lambda: data[:position],
        "bytes": lambda: data[:position] + rng.randbytes(rng.randrange(1, 5)) + data[position + 1 :],
        "base": lambda: (
            rng.choice(
                [
                    b"base: absent.yaml\n",
                    b"base: .\n",
                    b"base: [x, 1]\n",
                    b"base: /dev/null\n",
                    b"base: ''\n",
                    b"base: a\\0b\n",
                    b"base: ${oc.env:HOME}\n",
                    b'base: "a\\0b"\n',
                    b"base: " + b"x" * 5000 + b"\n",
                    b"base: base.yaml\n",
                    b"base: math.yaml\n",
                    b"base: [mid.yaml, longctx.yaml]\n",
                ]
            )
            + data
        ),
    }
    name = rng.choice(list(options))
    return options[name](), f"{name} at line {index + 1}" + (f": {text[:40]!r}" if "text" in name else "")


def make(root: Path, real: dict[str, str], rng: random.Random) -> Case:
    """Write the configs into a new folder, change one of them (or the overrides), and return what is to be run."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(CONFIGS, root)
    top = rng.choice(list(TOPS))
    sources = [path for path in sorted((root / "sources").glob("*.yaml")) if path.name in (root / top).read_text()]
    victim = rng.choice([root / top, root / top, *([rng.choice(sources)] if sources else [])])
    overrides = [f"{key}={value}" for key, value in real.items()] if TOPS[top] == "train" and rng.random() < 0.7 else []
    kind = rng.randrange(5)
    if kind == 0:
        overrides += rng.sample(OVERRIDES, rng.choice([1, 1, 2]))
        return Case(TOPS[top], root / top, overrides, f"overrides {[text[:60] for text in overrides]}")
    if kind <= 2:
        values = yaml.safe_load(victim.read_text())
        done = changed_values(values, rng)
        victim.write_text(yaml.safe_dump(values, allow_unicode=rng.random() < 0.5, sort_keys=False))
    else:
        data, done = changed_bytes(victim.read_bytes(), rng)
        victim.write_bytes(data)
    return Case(TOPS[top], root / top, overrides, f"{victim.relative_to(root)}: {done}")
