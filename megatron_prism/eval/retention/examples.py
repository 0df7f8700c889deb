"""Few-shot examples that are evaluated documents: taken out of the pool, or else the documents that see themselves left out of the scores.

lm-eval itself takes out only the document at hand, and only where examples and documents are named as one split.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.errors import Problem


def separate(task: Any, limit: int | None, where: str) -> tuple[int, list[Problem]]:
    """Take the documents that will be evaluated out of a built task's pool of examples. Return how many, or the problem where too few are left.

    Examples that stand in the task's own config are kept, since its published scores rest on them (see Watch).
    """
    num_fewshot = task.config.num_fewshot or 0
    if not num_fewshot or task.fewshot_cfg.samples is not None:
        return 0, []
    evaluated = {_question(task, doc) for _, doc in task.doc_iterator(limit=limit)}
    pool = task.sampler.fewshot_docs()
    others = [doc for doc in pool if _question(task, doc) not in evaluated]
    num_out = len(pool) - len(others)
    if num_out and len(others) <= num_fewshot:
        found = f"{num_out} of the {len(pool)} few-shot examples to draw from are evaluated documents"
        fix = "give a file of other documents, or set num_fewshot to 0"
        return 0, [Problem(where, found, f"more than {num_fewshot} that are none", fix)]
    if num_out:
        log.get().warning("%s: %d evaluated documents taken out of the pool of few-shot examples", where, num_out)
        task.sampler.replace_df(others)
    return num_out, []


class Watch:
    """Records the documents whose own question stands among the examples before them. Put around a built task, before its requests."""

    def __init__(self, task: Any):
        self.leaked: set[str] = set()  # documents, as JSON
        self._task = task
        self._drawn: list[Any] = []  # the examples of the last prompt
        if task.config.num_fewshot:
            sample, context = task.sampler.sample, task.fewshot_context
            task.sampler.sample = self._drawing(sample)
            task.fewshot_context = self._looking(context)

    def _drawing(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        def draw(*arguments: Any, **named: Any) -> Any:
            self._drawn = list(sample(*arguments, **named))
            return self._drawn

        return draw

    def _looking(self, context: Callable[..., Any]) -> Callable[..., Any]:
        def look(doc: Any, *arguments: Any, **named: Any) -> Any:
            made = context(doc, *arguments, **named)
            question = _question(self._task, doc)
            if any(_question(self._task, example) == question for example in self._drawn):
                self.leaked.add(as_json(doc))
            return made

        return look


def as_json(doc: Any) -> str:
    return json.dumps(doc, sort_keys=True, default=str)


def _question(task: Any, doc: Any) -> str:
    """Return what a document asks: its rendered text, or the document itself where its choices are the texts."""
    text = task.doc_to_text(doc)
    return text.strip() if isinstance(text, str) and text.strip() else as_json(doc)
