"""The config of `prism rl filter`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_prism.core.config.gang import GangConfig
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.config.rl import SamplingConfig
from megatron_prism.core.config.run import LimitsConfig
from megatron_prism.core.config.section import MAY_CHANGE, Range
from megatron_prism.core.config.train import InitConfig


@dataclass(frozen=True, kw_only=True)
class FilterConfig(GangConfig):
    """`prism rl filter`: how often a checkpoint's model answers each prompt of a set right. Started again, it goes on."""

    out: Annotated[Path, MAY_CHANGE]
    """The folder to write: passes.jsonl and manifest.json."""

    prompts: Annotated[Path, MAY_CHANGE]
    """The prompt set's folder (`prism prompts`). A filter that goes on may find the same set at another path, and no other set."""

    init: InitConfig
    """`init.checkpoint` is the model. A filter that goes on may find it at another path, and no other checkpoint."""

    rollout: SamplingConfig

    grade: GradeConfig = field(default_factory=GradeConfig)

    shard_prompts: Annotated[int, Range(ge=1)] = 64
    """The prompts of a shard, which is sampled and graded as one and written whole: what a killed filter loses at most (ours)."""

    limits: Annotated[LimitsConfig, MAY_CHANGE] = field(default_factory=LimitsConfig)
