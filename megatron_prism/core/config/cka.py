"""The config of `prism analyze cka`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.gang import GangConfig
from megatron_prism.core.config.run import LimitsConfig
from megatron_prism.core.config.section import IS_PATH, MAY_CHANGE, Pattern, Range, Section


@dataclass(frozen=True, kw_only=True)
class ComparedConfig(Section):
    """A model whose hidden states are compared: a checkpoint or a Hugging Face folder."""

    name: Annotated[str, Pattern(r"[^|\n]{1,100}", "a text without |")]
    """What the result calls it: base, MCS."""

    checkpoint: Annotated[Path | None, MAY_CHANGE] = None
    """A checkpoint, or a run's folder (its latest)."""

    hf: Annotated[Path | None, MAY_CHANGE] = None
    """A Hugging Face folder. Its weights are read straight into the ranks' shards: nothing is converted on the disk."""


@dataclass(frozen=True, kw_only=True)
class DistributionConfig(Section):
    """Where prompts come from: files of texts, or the questions of a set of `prism evaluate`."""

    path: Annotated[tuple[str, ...], IS_PATH, MAY_CHANGE]
    """Files or globs: JSON lines (.jsonl, .json, .ndjson) or .txt, also .gz and .zst; .parquet; save_to_disk folders. Of a set: its one file."""

    set: str | None = None
    """A set of `prism evaluate` (gsm8k, math500): its prompts as evaluation asks them. Null: the files are texts."""

    text: str = "{text}"
    """How a record becomes a text: `{field}` in braces stands for the record's field."""

    split: Literal["paragraph", "file"] = "paragraph"
    """A .txt file is split into texts at blank lines (paragraph), or taken whole (file)."""

    min_characters: Annotated[int, Range(ge=1)] = 1
    """Shorter texts are left out: WikiText's headings."""


@dataclass(frozen=True, kw_only=True)
class CkaConfig(GangConfig):
    """`prism analyze cka`: how alike the layers of models represent the same prompts, beside what chance gives. Started again, it goes on."""

    out: Annotated[Path, MAY_CHANGE]
    """The folder to write: cka.json, and each model's pooled states, so that another pair or a start after a kill computes none again."""

    models: tuple[ComparedConfig, ...]
    """The models. One is in memory at a time."""

    pairs: tuple[str, ...] = ()
    """Which are compared, each as `FIRST|OTHER`. Empty: each with the first, and neighbours."""

    distributions: dict[str, DistributionConfig]
    """The prompts by name (paper: Wikipedia, C4, GSM8K)."""

    num_prompts: Annotated[int, Range(ge=8)] = 200
    """The prompts of a distribution, drawn by `seed` (paper: 200)."""

    max_tokens: Annotated[int, Range(ge=1)] = 512
    """A longer prompt is cut after so many tokens. The paper does not say: ours."""

    micro_size: Annotated[int, Range(ge=1), MAY_CHANGE] = 8
    """The prompts of a microbatch. Padding is left out of the mean, so it changes rounding alone (paper: 1)."""

    final_norm: bool = True
    """Take the last layer's states behind the model's final norm, as transformers' output_hidden_states does. The paper does not say: ours."""

    num_permutations: Annotated[int, Range(ge=2)] = 200
    """How often the prompts of one side are put in another order, for the null."""

    num_subsamples: Annotated[int, Range(ge=2)] = 20
    """The subsamples of the spread (paper: 20, with replacement; ours are without)."""

    subsample: Annotated[int | None, Range(ge=4)] = None
    """The prompts of a subsample. Null: half of num_prompts (paper: 100 of 200)."""

    num_directions_removed: tuple[Annotated[int, Range(ge=1)], ...] = (1, 2, 5)
    """Also say what is left without so many directions of the largest variance of each side."""

    null_update: bool = False
    """Also compare each pair's first model with itself after a dense Gaussian update that has, in each of Megatron-Core's tensors, the norm of
    what the other model changed. Each pair costs a model more."""

    limits: Annotated[LimitsConfig, MAY_CHANGE] = field(default_factory=LimitsConfig)
