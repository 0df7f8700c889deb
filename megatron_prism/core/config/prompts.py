"""`prism prompts`'s config: what RL asks a model, and how an answer is graded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.prepare import DecontaminateConfig, KeepConfig, Name
from megatron_prism.core.config.section import IS_PATH, Range, Section

Domain = Literal["math", "code", "science"]


@dataclass(frozen=True, kw_only=True)
class PromptSourceConfig(Section):
    """Files, and how their records become prompts with what grades an answer."""

    name: Name
    """The source's name, used once in a prompt set."""

    domain: Domain
    """The domain that rewards and mixes are counted by."""

    kind: Literal["math", "choice", "code"]
    """How an answer is graded: as mathematics, as the letter of a choice, or by running code."""

    path: Annotated[tuple[str, ...], IS_PATH]
    """Files or globs, as those of `prism prepare`."""

    keep: tuple[KeepConfig, ...] = ()
    """Conditions on a record. All must hold."""

    text: str
    """How a record becomes a prompt: `{field}` in braces stands for the record's field. A dot leads into an object, into a list by
    number from 0, and into JSON that is written in a text, as for `gold`, `choices` and `tests`."""

    formats: tuple[str, ...] = ()
    """Instruction templates with `{prompt}`. The seed and the prompt choose one for each (paper, Appendix 15: science, balanced)."""

    chat: bool = False
    """The prompt is a user's turn, which the model's chat template renders. False: plain text, as in the paper's mid-training."""

    gold: str | None = None
    """The field with the right answer, for math and for choice (there a letter)."""

    gold_after: str | None = None
    """The answer is what follows this text in the field, where it stands last: `####` for GSM8K."""

    choices: tuple[str, ...] = ()
    """For choice: the fields with the options, the right one first. They are shuffled by seed and prompt, and listed below the text."""

    num_choices: Annotated[int | None, Range(ge=2, le=26)] = None
    """For choice without `choices`: the number of options that the text lists already, A, B, and so on."""

    tests: str | None = None
    """For code: the field with the tests. Programs: {inputs, outputs}, or a list of {input, output}. Functions: a list of assert statements, or of
    LiveCodeBench's {testtype: functional, input, output, metadata: {func_name}}. Each may be written as JSON in a text."""

    limit: Annotated[int | None, Range(ge=1)] = None
    """The most prompts of the source, drawn by lot (seed and id): the same ones in whatever order the files are read. Null: all."""

    hf_id: str | None = None
    """The data's origin, for the reader."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Section):
    """`prism prompts`: records become a prompt set for RL, prompts.jsonl and a manifest."""

    out: Path
    """The folder to write."""

    sources: tuple[PromptSourceConfig, ...]
    """The sources, in order. Of equal prompts the first is kept."""

    seed: int = 1234
    """The seed of formats and of the order of choices."""

    decontaminate: DecontaminateConfig | None = None
    """Leave out prompts that share words with an evaluation set. Null: no decontamination."""

    max_record_bytes: Annotated[int, Range(ge=1)] = 16_777_216
    """A record of more bytes is left out and counted (ours)."""

    on_bad_record: Literal["error", "skip"] = "error"
    """A record that gives no prompt ends the job (error), or is left out and counted (skip)."""


@dataclass(frozen=True, kw_only=True)
class MixRuleConfig(Section):
    """Which prompts of a domain a mix keeps, by the right answers among num_samples."""

    least_right: Annotated[int, Range(ge=0)] = 1
    """The fewest right answers."""

    most_right: Annotated[int | None, Range(ge=1)] = None
    """The most right answers. Null: all samples."""

    target: Annotated[int | None, Range(ge=1)] = None
    """The number of prompts: of more, as many are drawn by lot. Null: all."""

    top_up: bool = False
    """Where there are fewer than `target`, add prompts without a right answer, drawn by lot (paper: the balanced mix)."""


@dataclass(frozen=True, kw_only=True)
class MixDomainsConfig(Section):
    """The rule of each domain. Prompts of a domain without one are left out."""

    math: MixRuleConfig | None = None

    code: MixRuleConfig | None = None

    science: MixRuleConfig | None = None

    @property
    def rules(self) -> dict[Domain, MixRuleConfig]:
        """The rules that there are, by domain."""
        rules: dict[Domain, MixRuleConfig | None] = {"math": self.math, "code": self.code, "science": self.science}
        return {domain: rule for domain, rule in rules.items() if rule is not None}


@dataclass(frozen=True, kw_only=True)
class MixSetConfig(Section):
    """A prompt set, and how often a model answered its prompts right."""

    prompts: Path
    """The prompt set's folder (`prism prompts`)."""

    passes: Path
    """The folder of its pass counts (`prism rl filter`), or a file of lines {id, num_right, num_samples}."""


@dataclass(frozen=True, kw_only=True)
class MixConfig(Section):
    """`prism rl mix`: the prompts that RL trains on, chosen by domain and pass count (paper, section 9.1, Appendix 15)."""

    out: Path
    """The folder to write, a prompt set."""

    sets: tuple[MixSetConfig, ...]
    """The prompt sets, in order. Of equal prompts the first is taken."""

    domains: MixDomainsConfig

    num_samples: Annotated[int, Range(ge=1)] = 16
    """The responses that were sampled to each prompt (paper: 16)."""

    seed: int = 1234
    """The seed of what is drawn."""
