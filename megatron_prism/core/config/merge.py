"""The config of `prism merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.section import Range, Section

Method = Literal["linear", "slerp", "task_arithmetic", "ties"]
Sums = Literal["xxh128", "sha256"]
OutputDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class MergeModelConfig(Section):
    """A model that goes into the merge."""

    path: Path
    """A Hugging Face folder, a checkpoint, or a run (its latest checkpoint)."""

    weight: Annotated[float | None, Range()] = None
    """Its weight. slerp takes none: it has `t`."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Section):
    """`prism merge`: models of one architecture become one, tensor by tensor (paper, section 8.1: 0.15 base + 0.85 mid-trained, linear)."""

    out: Path
    """The Hugging Face folder to write; it must be new or empty."""

    models: tuple[MergeModelConfig, ...]
    """The models. The first gives config.json, tokenizer, files, dtypes and shards, unless `base_model` or `config_from` does."""

    method: Method = "linear"
    """linear: the weighted sum. slerp: between two models, along the sphere. task_arithmetic: the base and the weighted sum of what each model
    moved. ties: the same of the largest moves alone, and of those that agree in sign."""

    base_model: Path | None = None
    """task_arithmetic and ties: the model that the others were trained from. It gives the files, unless `config_from` does."""

    config_from: Path | None = None
    """The model, as `models` or `base_model` names it, that gives config.json, tokenizer, files, dtypes and shards. It must be named where the
    configs differ in what the same weights compute."""

    dtype: OutputDtype | None = None
    """The dtype of the output; a hybrid's A_log, dt_bias and D keep theirs. Null: each tensor's own."""

    normalize: bool | None = None
    """Divide by the sum of the weights; ties: of those that have a say at that place. Null: ties does, the others do not (mergekit's defaults)."""

    any_sum: bool = False
    """linear: accept weights that do not sum to 1, and do not divide by their sum."""

    t: Annotated[float | None, Range(ge=0, le=1)] = None
    """slerp: 0 is the first model, 1 the second."""

    density: Annotated[float | None, Range(gt=0, le=1)] = None
    """ties: the share of each tensor's moves that is kept, the largest. Null: all."""

    sums: Sums = "xxh128"
    """What merge.json has of each parent's files. A SHA-256 is slower by far; an XXH3-128 costs little more than reading, and is no signature."""

    scale: Annotated[float, Range()] = 1.0
    """task_arithmetic and ties: what the merged move is multiplied by before it is added to the base (mergekit's lambda)."""
