"""The 13 sub-tasks, and their questions at a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.eval.question import Protocol, Question
from megatron_prism.eval.ruler import counting, documents, needles, tracking
from megatron_prism.eval.ruler.draft import Draft, Sources
from megatron_prism.eval.ruler.fit import fit
from megatron_prism.eval.ruler.needles import Needles

PROTOCOL = Protocol(
    num_samples=1,
    temperature=0.0,
    top_p=1.0,
    max_tokens=100,
    think="free",
    answer="boxed_or_plain",
    source="HELMET configs/ruler.yaml and ruler_short.yaml: 100 questions a length, 50 or 100 new tokens, greedy, no chat template",
)


@dataclass(frozen=True, kw_only=True)
class SubTask:
    """max_tokens: of a response (HELMET's). wanted: all expected strings, of which the share counts, or any one (documents)."""

    shape: Needles | str
    max_tokens: int = 50
    wanted: str = "all"


SUB_TASKS = {
    "niah_single_1": SubTask(shape=Needles(haystack="noise")),
    "niah_single_2": SubTask(shape=Needles(haystack="essay")),
    "niah_single_3": SubTask(shape=Needles(haystack="essay", value="uuid")),
    "niah_multikey_1": SubTask(shape=Needles(haystack="essay", num_keys=4)),
    "niah_multikey_2": SubTask(shape=Needles(haystack="needle")),
    "niah_multikey_3": SubTask(shape=Needles(haystack="needle", key="uuid", value="uuid"), max_tokens=100),
    "niah_multivalue": SubTask(shape=Needles(haystack="essay", num_values=4)),
    "niah_multiquery": SubTask(shape=Needles(haystack="essay", num_keys=4, num_queries=4), max_tokens=100),
    "vt": SubTask(shape="vt"),
    "cwe": SubTask(shape="cwe", max_tokens=100),
    "fwe": SubTask(shape="fwe"),
    "qa_1": SubTask(shape="squad", wanted="any"),
    "qa_2": SubTask(shape="hotpotqa", wanted="any"),
}


def make(
    sub_task: str,
    length_tokens: int,
    num_questions: int,
    seed: int,
    count_tokens: Callable[[str], int],
    sources: Sources | None = None,
) -> tuple[Question, ...]:
    """Return the questions of a sub-task at a length. A seed gives the same ones each time.

    A prompt and its response's max_tokens together have at most length_tokens; one more unit of the haystack would have more. A unit is a
    word (essays), a line of noise, a needle, a word of the list (cwe), a word of the text (fwe) or a document (qa).
    count_tokens: of a prompt as the model gets it, a begin-of-text token included.
    Raises: InputError for an unknown sub-task, for a file that is missing or does not fill the length, for a length that is too short.
    """
    if sub_task not in SUB_TASKS:
        raise InputError(Problem("ruler.sub_tasks", repr(sub_task), f"one of {', '.join(SUB_TASKS)}"))
    task = SUB_TASKS[sub_task]
    questions = []
    for index in range(num_questions):
        name = f"{sub_task}/{length_tokens}/{index}"
        draft = _draw(task.shape, length_tokens, f"{seed}/{sub_task}/{length_tokens}", index, sources or Sources())
        size = fit(lambda size: count_tokens(draft.write(size)), length_tokens - task.max_tokens, draft.smallest, draft.largest, name)  # noqa: B023
        questions.append(
            Question(
                id=name,
                prompt=draft.write(size),
                kind="strings",
                gold=task.wanted,
                choices=draft.golds,
                tags={"sub_task": sub_task, "length": str(length_tokens), **draft.tags},
                max_tokens=task.max_tokens,
            )
        )
    return tuple(questions)


def _draw(shape: Needles | str, length_tokens: int, seed: str, index: int, sources: Sources) -> Draft:
    random = Random(f"{seed}/{index}")
    if isinstance(shape, Needles):
        return needles.draw(shape, random, sources)
    if shape == "vt":
        return tracking.draw(random)
    if shape == "cwe":
        return counting.draw_common(length_tokens, random)
    if shape == "fwe":
        return counting.draw_frequent(length_tokens, random)
    return documents.draw(shape, sources.squad if shape == "squad" else sources.hotpotqa, seed, index, random)
