"""Solves RULER's questions from nothing but their prompts, rightly or off by one."""

from __future__ import annotations

import re
from collections import Counter

NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")
ASKED = re.compile(r"The special magic \w+ for (.+) mentioned in the provided text (?:is|are)$")
CAPITAL = re.compile(r"The capital of (\w+) is (\w+)\.")


def solve(prompt: str, off: int = 0) -> str:
    """Return an answer to a prompt: with off 1, the one beside each right one."""
    if asked := ASKED.search(prompt):
        return _needles(prompt, re.split(r", and |, ", asked[1]), off)
    if "VAR " in prompt:
        return " ".join(_variables(prompt.rsplit("Memorize and track", 1)[1], off))
    if "numbered list" in prompt:
        listed = re.findall(r"\d+\. (\w+)", prompt.rsplit("numbered list", 1)[1].split("\nQuestion:")[0])
        return " ".join(word for word, _ in Counter(listed).most_common(20)[10 * off :][:10])
    if "coded text" in prompt:
        coded = Counter(word for word in prompt.split("\n")[1].split() if word != "...")
        return " ".join(word for word, _ in coded.most_common(4)[off:][:3])
    capitals = list(CAPITAL.findall(prompt))
    country = re.search(r"Question: What is the capital of (\w+)\?\nAnswer:$", prompt)
    assert country is not None
    index = [name for name, _ in capitals].index(country[1])
    return capitals[(index + off) % len(capitals)][1]


def _needles(prompt: str, keys: list[str], off: int) -> str:
    hidden = NEEDLE.findall(prompt)
    values = [value for name, value in hidden if name in keys]
    assert all(any(name == key for name, _ in hidden) for key in keys)
    return ", ".join(value[:-1] + str((int(value[-1], 16) + off) % 10) if off else value for value in values)


def _variables(text: str, off: int) -> list[str]:
    value = re.search(r"assigned the value (\d+) in the text", text)
    assert value is not None
    names: list[str] = []
    known = {value[1]}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        if source in known:
            known.add(name)
            names.append(name)
    return [name[:-1] + chr((ord(name[-1]) - 65 + off) % 26 + 65) for name in names]
