"""The keys that both exports to another trainer share: the paper's RL run in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_prism.core.config.section import IS_PATH, Pattern, Range, Section

Place = Annotated[str, IS_PATH, Pattern(r"/[^\n'$\\]*", "an absolute path without quotes, backslashes, $ and line breaks")]
Count = Annotated[int, Range(ge=1, lt=2**31)]


@dataclass(frozen=True, kw_only=True)
class ExportedRunConfig(Section):
    """The paper's RL run (section 9.1), for another trainer to do."""

    num_prompts: Count = 64
    """The prompts of a step (the paper's 1,024 rollouts are 64 x 16)."""

    num_samples: Annotated[int, Range(ge=2, lt=2**31)] = 16
    """The samples of a prompt."""

    steps: Count = 1000
    """The steps of the run (the paper's)."""

    lr: Annotated[float, Range(gt=0)] = 5e-7
    """The learning rate, which falls linearly to 0 (the paper's)."""

    seq_length: Count = 16384
    """The tokens of a prompt and its response (the paper's)."""
