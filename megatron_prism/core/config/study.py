"""The keys of a study's YAML: stages that feed each other, and the claims that their results are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.cluster import JobConfig, Name
from megatron_prism.core.config.section import Range, Section


@dataclass(frozen=True, kw_only=True)
class StageConfig(JobConfig):
    """One stage of a study: a job of prism, or a script."""

    title: str | None = None
    """What the stage does, in words for a reader of the report. Null: its name."""

    model: str | None = None
    """The model that the stage makes, measures or changes, as the report names it: base, MCS, MCS -> RL."""

    kind: Literal["prism", "python"] = "prism"
    """What the command's words are: a job of prism and its arguments, or a Python script and its arguments."""

    output: Path | None = None
    """What a script writes. Null: a job's output follows from its config or its --out."""

    on_failure: Literal["stop", "report"] = "stop"
    """Exit code 1 (a gate says NO-GO): stop the stages that need this one, or only report it."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Section):
    """A figure that must lie above, below or near another one.

    A figure is a number, or STAGE:KEY.KEY, a place in a stage's result (its --json): evaluate_mcs:tasks.math.score. A key with a dot, a colon or a space is quoted: weights:total.changed."0.01".
    """

    value: str | float
    """The figure."""

    above: str | float | None = None
    """It must be more than this one, by `by`."""

    below: str | float | None = None
    """It must be less than this one, by `by`."""

    near: str | float | None = None
    """It must differ from this one by less than `by`."""

    by: Annotated[float, Range()] = 0.0
    """The margin. Negative, for `above` and `below`: the figure may lie so far on the other side, as where something is kept that may rise too."""


@dataclass(frozen=True, kw_only=True)
class ClaimConfig(Section):
    """A claim of the paper, and the checks that say whether the study shows it."""

    name: Name
    """A short name."""

    says: str
    """The claim, in a sentence."""

    source: str = ""
    """Where the paper says so: T5, section 7."""

    judged_at: str = ""
    """How the figures were sampled: T 1, greedy."""

    requires: tuple[CheckConfig, ...] = ()
    """What must hold before the claim is judged. Otherwise its prerequisite is not met."""

    shows: tuple[CheckConfig, ...]
    """The claim holds where all of these do."""

    null: tuple[CheckConfig, ...] = ()
    """What tells the claim from chance (a dense update of the same norm, shuffled prompts). Where one of these fails, the claim says no more than its null."""

    note: str = ""
    """What a reader must know beside it."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Section):
    """`prism study`: a graph of stages, run here or as a chain of Slurm jobs. A finished stage is not run again unless an input changed."""

    name: Name
    """The study's name."""

    run_dir: Path
    """The study's folder. run_dir/study holds each stage's record, result and log. Stages write where their commands say."""

    variables: dict[str, str] = field(default_factory=dict)
    """Values for ${variables.NAME} in commands."""

    num_parallel: Annotated[int, Range(ge=1)] = 2
    """How many stages run at once on this machine."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every stage's process."""

    stages: tuple[StageConfig, ...]
    """The stages."""

    claims: tuple[ClaimConfig, ...] = ()
    """The claims that the report judges."""
