"""What a report is made of, read from folders (read.py): a study's record, and the results that runs, evaluations and analyses left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prism.report.blend import BlendPart

Figures = Mapping[str, Any]  # a result's JSON object


@dataclass(frozen=True)
class Stage:
    """A stage of a study, as study.json describes it (docs/STUDY.md)."""

    name: str
    title: str
    model: str | None
    job: str
    after: tuple[str, ...]
    state: str
    reason: str
    seconds: float | None
    cpu_s: float | None
    num_starts: int | None
    failure: str | None


@dataclass(frozen=True)
class Claim:
    """A claim of a study: its state, and the checks that it was judged by."""

    name: str
    says: str
    source: str
    judged_at: str
    note: str
    state: str
    checks: tuple[Figures, ...]
    figures: Figures


@dataclass(frozen=True)
class Run:
    """A run of training or RL. name: the model that it made. records: a line a logged step; validations: those of a validation."""

    name: str
    stage: str
    is_rl: bool
    steps: int
    plan: Figures
    records: tuple[Figures, ...]
    validations: tuple[Figures, ...]

    @property
    def step(self) -> int:
        """Return the last step that was logged."""
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return int(self.plan.get("world_size") or 1)

    @property
    def seconds(self) -> float:
        """Return the time of the steps."""
        return self.total("step_s") or 0.0

    def total(self, metric: str) -> float | None:
        """Return the sum of a metric over all steps, a logged step standing for those since the one before. None: no step has it."""
        steps = [int(record["step"]) for record in self.records]
        gaps = [now - before for before, now in zip([0, *steps], steps, strict=False)]
        parts = [gap * float(value) for gap, record in zip(gaps, self.records, strict=True) if (value := record.get(metric)) is not None]
        return sum(parts) if parts else None


@dataclass(frozen=True)
class Mixture:
    """A prepared mixture, or a set of prompts: its sources and their shares. unit: what the shares are of."""

    name: str
    unit: str
    parts: tuple[BlendPart, ...]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation. name: the model. tasks: each one's part of summary.json; empty where the evaluation has not ended.

    questions: by task, the mean score of each question; empty where results.jsonl is not there, or damaged.
    """

    name: str
    stage: str
    folder: Path
    model_sha256: str
    has_ended: bool
    tasks: Mapping[str, Figures] = field(default_factory=dict)
    questions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Any other result: a verdict, a merge, a scan for contamination, an analysis. name: of the stage or the file."""

    name: str
    model: str
    values: Figures


@dataclass(frozen=True)
class Material:
    """All that one study, or the folders that were named together, came to. told: what was half-written or damaged."""

    name: str
    stages: tuple[Stage, ...] = ()
    claims: tuple[Claim, ...] = ()
    runs: tuple[Run, ...] = ()
    mixtures: tuple[Mixture, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    verdicts: tuple[Result, ...] = ()
    merges: tuple[Result, ...] = ()
    contaminations: tuple[Result, ...] = ()
    analyses: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)
    told: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Say whether nothing was read."""
        parts = (self.stages, self.runs, self.mixtures, self.evaluations, self.verdicts, self.merges, self.contaminations, self.analyses)
        return not any(parts) and not self.told
