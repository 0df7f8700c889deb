"""How responses are graded, in reinforcement learning and in evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_prism.core.config.section import Range, Section

Think = Literal["required", "opened", "free"]
AnswerForm = Literal["boxed", "last_line", "boxed_or_plain", "boxed_or_last"]


@dataclass(frozen=True, kw_only=True)
class GradeLimits(Section):
    """What judging an answer may cost."""

    num_workers: Annotated[int, Range(ge=1)] = 2
    """Processes that compare mathematical expressions, and programs that run at once."""
    cpu_limit_s: Annotated[int, Range(ge=1)] = 5
    """CPU-seconds of one comparison; a response that needs more is wrong."""
    wall_limit_s: Annotated[float, Range(gt=0)] = 60.0
    """Seconds of one comparison on the clock; one that takes longer within its CPU-seconds is a fault of the machine, and tried once more."""


@dataclass(frozen=True, kw_only=True)
class GradeConfig(GradeLimits):
    """How an answer is found in a response, and what judging it may cost."""

    think: Think = "required"
    """required: `<think> ... </think> answer` (the paper's); opened: the prompt's template wrote `<think>`; free: the tags may be missing."""
    answer: AnswerForm = "boxed_or_plain"
    """Of math: the last \\boxed{}, the last line, or the last \\boxed{} and without any box an answer that is one word, such as `42`
    (boxed_or_plain), or what follows the last `answer is`, else the last number (boxed_or_last: for base models)."""
