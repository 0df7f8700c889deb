"""Read prompts with their answers, and write the text that NeMo-Aligner encodes to the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prism.core.errors import InputError, Problem, first_of, raise_problems
from megatron_prism.core.manifest import write_text
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data import tokenizer
from megatron_prism.grade import code
from megatron_prism.grade.outcome import Kind

KEYS = {"id", "domain", "kind", "prompt", "gold", "choices", "tests"}
KINDS = ("math", "choice", "code")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem: its text, and what its answer is graded against. The fields are grade.outcome.Item's."""

    id: str
    domain: str
    kind: Kind
    prompt: str
    gold: str = ""
    choices: tuple[str, ...] = ()
    tests: Mapping[str, Any] | None = None


def read(path: Path) -> list[Prompt]:
    """Return the prompts of a jsonl file, of a prompt set (`prism prompts`) or written by hand.

    Raises: InputError with the first problems of its lines, or where it has none, cannot be read, or is not as its prompt set's manifest says.
    """
    if path.name == prompt_set.FILE and path.with_name(prompt_set.MANIFEST).is_file():
        prompt_set.manifest_of(path.parent)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(str(path), getattr(error, "strerror", None) or str(error), "a jsonl file of prompts")) from None
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    ids: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(where, f"no JSON ({error})", "a JSON object"))
            continue
        wrong = list(_problems(record, where))
        if not wrong and record["id"] in ids:
            wrong = [Problem(f"{where}:id", repr(record["id"]), "an id of its own")]
        problems += wrong
        if not wrong:
            ids.add(record["id"])
            prompts.append(Prompt(**{**record, "choices": tuple(record.get("choices") or ())}))
    raise_problems(first_of(problems, str(path)))
    if not prompts:
        raise InputError(Problem(str(path), "no prompt", "at least one line"))
    return prompts


def _problems(record: Any, where: str) -> Iterator[Problem]:
    if not isinstance(record, dict):
        yield Problem(where, type(record).__name__, "a JSON object")
        return
    if unknown := sorted(set(record) - KEYS):
        yield Problem(where, f"the keys {', '.join(unknown)}", f"only {', '.join(sorted(KEYS))}")
    for key in ("id", "domain", "kind", "prompt"):
        if not isinstance(record.get(key), str) or not record[key]:
            yield Problem(f"{where}:{key}", repr(record.get(key)), "a text")
    if (kind := record.get("kind")) not in KINDS:
        yield Problem(f"{where}:kind", repr(kind), f"one of {', '.join(KINDS)}")
    if kind in ("math", "choice") and not (isinstance(record.get("gold"), str) and record["gold"]):
        yield Problem(f"{where}:gold", repr(record.get("gold")), "a text")
    if kind == "choice":
        choices = record.get("choices")
        if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, str) for choice in choices)):
            yield Problem(f"{where}:choices", repr(choices), "a list of at least two texts")
        elif record.get("gold") not in (letters := [chr(ord("A") + index) for index in range(min(len(choices), 26))]):
            yield Problem(f"{where}:gold", repr(record.get("gold")), f"the letter of a choice, {letters[0]} to {letters[-1]}")
    if kind == "code" and (wrong := code.tests_problem(record.get("tests"))):
        yield Problem(f"{where}:tests", wrong, "how the code is tested: docs/GRADE.md")


def texts(prompts: Sequence[Prompt], spec: tokenizer.TokenizerSpec, max_tokens: int, path: Path) -> tuple[list[str], list[list[int]]]:
    """Return each prompt as NeMo-Aligner's text, and the tokens of that text.

    NeMo-Aligner adds no token to a text, so a begin-of-text token that the tokenizer puts before a prompt is spelled out in it.
    Raises: InputError where the spelled text has other tokens than the prompt, or a prompt is longer than max_tokens (NeMo-Aligner would
    silently put another prompt in its place).
    """
    all_texts, all_ids, problems = [], [], []
    for prompt in prompts:
        wanted, text = tokenizer.encode_prompt(prompt.prompt, spec), prompt.prompt
        ids = tokenizer.encode_text(text, spec)
        if ids != wanted and wanted[0] == spec.bos_id:
            text = tokenizer.decode(wanted[:1], spec) + text
            ids = tokenizer.encode_text(text, spec)
        if ids != wanted:
            problems.append(
                Problem(f"{path}: {prompt.id}", f"{len(ids)} tokens where nothing is added", f"the prompt's own {len(wanted)} tokens",
                        "NeMo-Aligner cannot spell what this tokenizer adds")
            )  # fmt: skip
        elif len(ids) > max_tokens:
            problems.append(Problem(f"{path}: {prompt.id}", f"{len(ids)} tokens", f"at most max_prompt_tokens {max_tokens}"))
        all_texts.append(text)
        all_ids.append(ids)
    raise_problems(first_of(problems, str(path)))
    return all_texts, all_ids


def write(path: Path, lines: Sequence[str]) -> None:
    """Write texts as the jsonl that NeMo-Aligner's RLHFDataset reads."""
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in lines))
