"""What an evaluation asks, and what it keeps of each response. All tasks, the scores, the verdict and the report meet in these two types."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_prism.core.config.grade import AnswerForm, Think
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.load import build
from megatron_prism.grade.outcome import Kind, Outcome


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a task: what the model is asked, and what grades its answer (grade/outcome.Item).

    id: unique within its task, and the same in every evaluation of the set. prompt: a text to be continued, or the turns of a chat.
    tags: what scores are broken down by, for example {"subject": "Algebra", "level": "3"} or {"length": "8192"}.
    max_tokens: the most tokens of a response, where the question has its own; None: the task's.
    """

    id: str
    prompt: str | tuple[dict[str, str], ...]
    kind: Kind
    gold: str = ""
    choices: tuple[str, ...] = ()
    tests: Mapping[str, Any] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a task is sampled and graded by default, and where that comes from. A config may change each but takes_cut.

    num_samples: the responses to each question. source: the paper's section or the harness, in words. takes_cut: a response that was cut is
    graded where it holds a closed answer after its thinking, as the paper's harnesses do; it is truncated otherwise.
    """

    num_samples: int
    temperature: float
    top_p: float
    max_tokens: int
    think: Think
    answer: AnswerForm
    source: str
    takes_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """One response to a question, graded: a line of results.jsonl.

    score: 1 for right and 0 for wrong, no_format and truncated, or a task's own figure between; None for a fault, which is left out of every mean.
    prompt_sha256: of the prompt's token ids (or of its text, where the model is served elsewhere). mean_logprob: of the response's tokens under
    softmax(logits / temperature), at temperature 0 softmax(logits), whatever top_p leaves out; None where the engine has none. tags: the question's, and what grading adds (a choice's letter).
    """

    task: str
    id: str
    sample: int
    seed: int
    outcome: Outcome
    score: float | None
    why: str = ""
    prompt_sha256: str = ""
    num_tokens: int = 0
    ended: str = ""
    mean_logprob: float | None = None
    text: str = ""
    tags: dict[str, str] = field(default_factory=dict)


def to_line(result: Result) -> str:
    """Return a result as a line of results.jsonl."""
    return json.dumps(asdict(result), ensure_ascii=False) + "\n"


def read_results(path: Path) -> Iterator[Result]:
    """Yield the results of a results.jsonl. Raises: InputError where a line is none."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InputError(Problem(place, str(error), "a result as JSON")) from None
            yield build(value, Result, lambda key, place=place: f"{place}:{'.'.join(map(str, key))}")  # type: ignore[misc]
