"""What a prompt set is: a folder with prompts.jsonl, a prompt a line, and manifest.json, which counts what was left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prism.core import disk
from megatron_prism.core.config import Domain
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import build
from megatron_prism.core.manifest import read_json, sha256_file
from megatron_prism.grade.outcome import Kind

FILE, MANIFEST, KIND = "prompts.jsonl", "manifest.json", "prompts"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked, and what grades its answer (grade/outcome.Item).

    id: from the problem's content, the same in every set. prompt: a text to be continued, or the turns of a chat. gold, choices, tests: what
    its kind needs.
    """

    id: str
    domain: Domain
    kind: Kind
    prompt: str | tuple[dict[str, str], ...]
    gold: str = ""
    choices: tuple[str, ...] = ()
    tests: dict[str, Any] | None = None


def to_line(prompt: Prompt) -> str:
    """Return a prompt as a line of prompts.jsonl, without what its kind has not."""
    values = {name: value for name, value in dataclasses.asdict(prompt).items() if value not in ("", (), None)}
    return json.dumps(values, ensure_ascii=False) + "\n"


def manifest_of(folder: Path) -> Mapping[str, Any]:
    """Return a prompt set's manifest. Raises: InputError where the folder is no prompt set, or prompts.jsonl is not as it was written."""
    where = str(folder / MANIFEST)
    try:
        with disk.reading(folder):
            described = read_json(folder / MANIFEST)
            if described.get("kind") != KIND:
                raise InputError(Problem(where, f"a manifest of kind {described.get('kind')!r}", "a prompt set's", "run prism prompts"))
            sha256 = sha256_file(folder / FILE)
    except OSError as error:
        raise InputError(Problem(str(folder), disk.unread(folder, error), "a prompt set", "run prism prompts")) from None
    except ValueError as error:
        raise InputError(Problem(where, str(error), "a prompt set", "run prism prompts")) from None
    if sha256 != described.get("sha256"):
        raise InputError(
            Problem(str(folder / FILE), f"sha256 {sha256}", f"{described.get('sha256')}, as its manifest says", "make it again")
        )
    return described


def read(folder: Path) -> tuple[Prompt, ...]:
    """Return a prompt set's prompts, in order.

    Raises: InputError where the set is damaged, empty, or a line is no prompt.
    """
    manifest_of(folder)
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    with (folder / FILE).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{folder / FILE}:{number}"
            try:
                prompts.append(build(json.loads(line), Prompt, lambda key, place=place: f"{place}:{'.'.join(map(str, key))}"))  # type: ignore[misc]
            except InputError as error:
                problems += error.problems
            except ValueError as error:
                problems.append(Problem(place, str(error), "a prompt as JSON"))
    raise_problems(problems)
    if not prompts:
        raise InputError(Problem(str(folder / FILE), "no prompt", "at least one"))
    return tuple(prompts)
