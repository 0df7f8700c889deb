"""From rows of tokens to rewards: find each row's problem, decode its response, grade it. A fault never becomes a reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prism.core import log
from megatron_prism.data import tokenizer
from megatron_prism.grade.outcome import Graded, Item, item_of
from megatron_prism.rl.aligner.answers import Answers

Grade = Callable[[Sequence[Item]], Mapping[str, Graded]]
PAUSES_S = (0.5, 2.0, 8.0)  # before items that the grader failed on are graded again


class UnknownPrompt(ValueError):
    """A row begins with no prompt of the answer table. The message names the row."""


class GraderFault(RuntimeError):
    """The grader failed on a response in every try."""


@dataclass(frozen=True)
class Rewarder:
    """What turns rows of tokens into rewards. grade: from items to their outcomes, by id; threads call it at the same time."""

    answers: Answers
    spec: tokenizer.TokenizerSpec
    grade: Grade
    pauses_s: tuple[float, ...] = PAUSES_S

    def rewards(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Return rewards_B (float32): 1 for a right answer, 0 for a wrong one, no format, or a response that did not end.

        Raises: UnknownPrompt; GraderFault where a fault outlasts the tries.
        """
        items = [self.item(row, tokens_S[:length]) for row, (tokens_S, length) in enumerate(zip(tokens_BS, lengths_B, strict=True))]
        graded: dict[str, Graded] = {}
        for pause_s in (*self.pauses_s, None):
            pending = [item for item in items if item.id not in graded]
            why = self._grade(pending, graded)
            if len(graded) == len(items):
                return np.array([graded[item.id].outcome == "right" for item in items], np.float32)
            log.get().warning("the grader failed on %d of %d responses: %s", len(items) - len(graded), len(items), why)
            if pause_s is not None:
                time.sleep(pause_s)
        raise GraderFault(
            f"the grader failed on {len(items) - len(graded)} of {len(items)} responses, tried {len(self.pauses_s) + 1} times"
        )

    def _grade(self, items: Sequence[Item], graded: dict[str, Graded]) -> str:
        """Add the outcomes of items to `graded`, faults left out. Return why the last fault was one."""
        try:
            outcomes = self.grade(items)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        why = ""
        for item in items:
            outcome = outcomes.get(item.id) or Graded(id=item.id, outcome="fault", why="the grader gave no outcome")
            if outcome.outcome == "fault":
                why = outcome.why
            else:
                graded[item.id] = outcome
        return why

    def item(self, row: int, ids_S: np.ndarray) -> Item:
        """Return a row's response as an item. Raises: UnknownPrompt."""
        if ids_S.min() < 0 or ids_S.max() >= self.spec.vocab_size:
            raise UnknownPrompt(f"row {row} has tokens outside the vocabulary of {self.spec.vocab_size}")
        match = self.answers.find(ids_S)
        if match is None:
            raise UnknownPrompt(f"row {row} begins with no prompt of the answer table")
        problem, num_tokens = match
        response = ids_S[num_tokens:].tolist()
        is_truncated = not response or response[-1] not in self.spec.end_ids
        text = tokenizer.continuation(ids_S[:num_tokens].tolist(), response, self.spec)
        return item_of(problem, str(row), text, is_truncated)
