"""The answer table: from a prompt's tokens to its problem.

NeMo-Aligner keeps only the prompt's text, and sends the reward server prompt and response as one row of tokens, without the prompt's length.
The table is keyed by a hash of the prompt's tokens. A row is looked up at every length that a prompt has. This is exact because no prompt
is the beginning of another one: the export refuses such prompts, since a response could otherwise choose the problem it is graded by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_prism.core.errors import InputError, Problem, first_of, raise_problems
from megatron_prism.core.manifest import write_text
from megatron_prism.rl.aligner.prompts import Prompt

TOKEN = np.dtype("<i8")


@dataclass(frozen=True)
class Answers:
    """Problems by the key of their prompt's tokens, and the lengths (in tokens, ascending) that prompts have."""

    by_key: Mapping[str, Prompt]
    lengths: tuple[int, ...]

    def find(self, ids: np.ndarray) -> tuple[Prompt, int] | None:
        """Return the problem whose prompt a row of tokens begins with, and the prompt's length. None: no prompt of the table."""
        return next(((self.by_key[key], length) for key, length in _keys(ids, self.lengths) if key in self.by_key), None)


def key(ids: Sequence[int] | np.ndarray) -> str:
    """Return the key of a prompt's tokens."""
    return hashlib.sha256(np.asarray(ids, TOKEN).tobytes()).hexdigest()


def _keys(ids: np.ndarray, lengths: Sequence[int]) -> list[tuple[str, int]]:
    """Return the keys of a row's beginnings of these lengths, the shortest first. A length beyond the row is left out."""
    keys, digest, before = [], hashlib.sha256(), 0
    for length in lengths:
        if length > len(ids):
            break
        digest.update(np.ascontiguousarray(ids[before:length], TOKEN).tobytes())
        keys.append((digest.hexdigest(), length))
        before = length
    return keys


def table(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> Answers:
    """Return the table of prompts. Prompts of the same tokens and the same answer become one entry.

    Raises: InputError for prompts of the same tokens with different answers, and for a prompt that is the beginning of another one.
    """
    by_key: dict[str, Prompt] = {}
    problems: list[Problem] = []
    for prompt, tokens in zip(prompts, ids, strict=True):
        first = by_key.setdefault(key(tokens), prompt)
        if _answer(first) != _answer(prompt):
            problems.append(Problem(f"prompt {prompt.id}", f"the tokens of {first.id}, with another answer", "one answer for a prompt"))
    lengths = tuple(sorted({len(tokens) for tokens in ids}))
    for prompt, tokens in zip(prompts, ids, strict=True):
        shorter = lengths[: lengths.index(len(tokens))]
        start = next((by_key[one] for one, _ in _keys(np.asarray(tokens), shorter) if one in by_key), None)
        if start is not None:
            fix = "end every prompt alike, for example with the chat template's generation prompt"
            problems.append(Problem(f"prompt {start.id}", f"the beginning of prompt {prompt.id}", "prompts that no other begins with", fix))
    raise_problems(first_of(problems, "the prompts"))
    return Answers(by_key, lengths)


def _answer(prompt: Prompt) -> tuple[object, ...]:
    return prompt.kind, prompt.gold, prompt.choices, json.dumps(prompt.tests, sort_keys=True)


def write(path: Path, answers: Answers, num_tokens: Mapping[str, int]) -> None:
    """Write a table as jsonl. num_tokens: of the prompt, by key."""
    lines = []
    for one, prompt in answers.by_key.items():
        record = {name: value for name, value in asdict(prompt).items() if name != "prompt"}
        lines.append(json.dumps({"key": one, "num_tokens": num_tokens[one], **record}, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def read(path: Path) -> Answers:
    """Return a written table; its prompts have no text. Raises: InputError where the file is not one."""
    by_key: dict[str, Prompt] = {}
    lengths: set[int] = set()
    try:
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):  # a gold may hold U+2028, at which splitlines cuts
            record = json.loads(line)
            lengths.add(int(record.pop("num_tokens")))
            one = str(record.pop("key"))
            by_key[one] = Prompt(**{**record, "prompt": "", "choices": tuple(record["choices"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            Problem(str(path), f"{type(error).__name__}: {error}", "an answer table of prism rl export nemo_aligner")
        ) from None
    return Answers(by_key, tuple(sorted(lengths)))
