"""From responses to results, on rank 0: each response is graded once, and its grade is kept by the response and how it is graded.

A fault says nothing of the response. It is not kept: the next start of the evaluation grades that response again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_prism import __version__
from megatron_prism.core.config.grade import GradeConfig, GradeLimits
from megatron_prism.core.manifest import sha256_json
from megatron_prism.eval.cache import Kept
from megatron_prism.eval.grading import grade_config, item_of, tags_of
from megatron_prism.eval.question import Result
from megatron_prism.eval.requests import Request
from megatron_prism.eval.tasks import Task
from megatron_prism.grade.outcome import Graded, Item


class Grades(Protocol):
    """What grades responses (grade.grader.Grader)."""

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        """Return each item's outcome by its id."""
        ...


@dataclass(frozen=True)
class Judge:
    """The responses and grades that are kept, and who grades. faults: by the key of a response, those of this start, in words.

    One thread calls `grade`, and no other reads grades meanwhile.
    """

    tasks: Mapping[str, Task]
    limits: GradeLimits
    samples: Kept
    grades: Kept
    grader_of: Callable[[GradeConfig], Grades]
    versions: Mapping[str, str]
    faults: dict[str, str] = field(default_factory=dict)
    _sums: dict[tuple[str, str], str] = field(
        default_factory=dict, repr=False
    )  # of what is known of a question, whose tests may be megabytes

    def ungraded(self, requests: Iterable[Request]) -> list[Request]:
        """Return the requests whose response is kept, and whose grade is not."""
        return [one for one in requests if one.key in self.samples and self._grade_key(one, self.samples[one.key]) not in self.grades]

    def grade(self, requests: Sequence[Request]) -> Counter[tuple[str, str]]:
        """Grade responses that are kept, keep their grades, and return the counts by task and outcome."""
        by_task: dict[str, list[Request]] = {}
        for request in requests:
            by_task.setdefault(request.task, []).append(request)
        counts: Counter[tuple[str, str]] = Counter()
        for name, own in by_task.items():
            samples = {one.key: self.samples[one.key] for one in own}
            takes_cut = self.tasks[name].protocol.takes_cut
            items = [
                item_of(one.asked.question, samples[one.key]["text"], one.key, samples[one.key]["ended"] != "end_token", takes_cut)
                for one in own
            ]
            graded = self.grader_of(self._config(self.tasks[name])).grade(items)
            values = {}
            for one in own:
                outcome = graded[one.key]
                counts[name, outcome.outcome] += 1
                if outcome.outcome == "fault":
                    self.faults[one.key] = outcome.why
                else:
                    self.faults.pop(one.key, None)
                    values[self._grade_key(one, samples[one.key])] = {**vars(outcome), "id": ""}
            self.grades.write(values)
        return counts

    def result(self, request: Request) -> Result:
        """Return a request's result, once its response is kept and graded, or a fault."""
        question = request.asked.question
        sample = self.samples.get(request.key, {})
        known = {name: sample[name] for name in ("num_tokens", "ended", "mean_logprob", "text") if name in sample}
        if (why := self.faults.get(request.key)) is not None:
            graded = Graded(id=request.key, outcome="fault", why=why)
        else:
            graded = Graded(**self.grades[self._grade_key(request, sample)])
        return Result(
            task=request.task,
            id=question.id,
            sample=request.sample,
            seed=request.seed,
            outcome=graded.outcome,
            score=_score(graded),
            why=graded.why,
            prompt_sha256=request.asked.prompt_sha256,
            tags=tags_of(question, graded),
            **known,
        )

    def _config(self, task: Task) -> GradeConfig:
        return grade_config(task.protocol, self.limits)

    def _grade_key(self, request: Request, sample: Mapping[str, Any]) -> str:
        question, protocol = request.asked.question, self.tasks[request.task].protocol
        place = request.task, question.id
        if place not in self._sums:
            tests = None if question.tests is None else dict(question.tests)
            self._sums[place] = sha256_json([question.kind, question.gold, question.choices, tests])
        response = [sample["text"], sample["ended"], isinstance(question.prompt, str)]
        how = [protocol.think, protocol.answer, protocol.takes_cut, self.limits.cpu_limit_s, __version__, dict(self.versions)]
        return sha256_json([self._sums[place], response, how])


def _score(graded: Graded) -> float | None:
    """Return a grade as a number: a fault has none."""
    if graded.outcome == "fault":
        return None
    return float(graded.outcome == "right") if graded.score is None else graded.score
