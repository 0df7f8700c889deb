"""`prism prepare`'s config: a weighted mixture of sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prism.core.config.section import Section


@dataclass(frozen=True, kw_only=True)
class KeepConfig(Section):
    """A condition on a field of the record (`a.b`: a field within one); one of the five operations is set.

    A record that does not meet it is left out and counted. A record without the field is a bad record.
    """

    field: str
    equals: str | int | float | bool | None = None
    not_equals: str | int | float | bool | None = None
    at_least: float | None = None
    one_of: tuple[str, ...] = ()
    starts_with: str | None = None


@dataclass(frozen=True, kw_only=True)
class TurnsConfig(Section):
    """Text from a list of turns ({role, content}, or {from, value}), joined with one line break; system turns are left out (ours).

    prefix: every utterance begins "User: " or "Assistant: " (paper, section 3.1: chat).
    """

    field: str = "messages"
    prefix: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """So many different texts for each value of a field of the record, chosen by lot (paper, section 3.1); other values are left out.

    Without a field all records are of one group, `all`.
    """

    counts: dict[str, int]
    field: str | None = None


@dataclass(frozen=True, kw_only=True)
class PartConfig(Section):
    """Files, and how their records become texts.

    path: files or globs (.jsonl or .txt, also .gz and .zst; .parquet; save_to_disk folders).
    keep: conditions on a record, all of which must hold. text: how a record becomes text, as `{field}` in braces; or turns.
    A .txt file is split into documents at blank lines (`split: paragraph`) or taken whole (`split: file`).
    hf_id: where it comes from, for the reader.
    """

    path: tuple[str, ...] = ()
    keep: tuple[KeepConfig, ...] = ()
    text: str = "{text}"
    turns: TurnsConfig | None = None
    sample: SampleConfig | None = None
    split: Literal["paragraph", "file"] = "file"
    hf_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig(PartConfig):
    """One source of a mixture: a part of its own, or several `parts` end to end. weight: percent of the training tokens.

    valid_path: files held out for validation, read like the source's own; else valid_percent of the documents, chosen by their hash.
    min_tokens: shorter documents are left out (the paper does so before the 128k step; its threshold is not given).
    dedup: `exact` leaves out a text that was there before, `minhash` also one much like it (the paper names no method: ours).
    decontaminate: leave out what the mixture's `decontaminate` finds. domain: what reports add it to.
    available_tokens: what it is said to hold, for a plan without data.
    """

    name: str
    weight: float
    parts: tuple[PartConfig, ...] = ()
    valid_path: tuple[str, ...] = ()
    valid_percent: float = 0.0
    min_tokens: int = 1
    dedup: Literal["none", "exact", "minhash"] = "none"
    decontaminate: bool = True
    domain: str | None = None
    available_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig(Section):
    """Leave out documents that share `ngram` words in a row with a text of `against` (the paper describes no decontamination: ours).

    A text of fewer words is looked for whole, one of fewer than `shortest` not at all (and counted).
    """

    against: tuple[PartConfig, ...]
    ngram: int = 13
    shortest: int = 8


@dataclass(frozen=True, kw_only=True)
class PackingConfig(Section):
    """Best-fit-decreasing packing into sequences of `seq_length`, in place of plain concatenation (paper, section 8.1).

    A document longer than seq_length is cut into chunks that overlap by `overlap` tokens (paper: optional, no number: 0 is ours).
    """

    seq_length: int
    overlap: int = 0


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """`prism prepare`: weighted sources, tokenized once into Megatron .bin/.idx files.

    tokens: the training budget whose blend is planned and reported; None: what the scarcest source gives in one epoch.
    seed: of `sample`. max_epochs: how often the budget may read a source over.
    tokenizer_backend: gigatoken gives the same ids, several times as fast, for the kinds of tokenizer it reads.
    """

    out: Path
    tokenizer: Path
    sources: tuple[SourceConfig, ...]
    tokens: int | None = None
    max_epochs: float | None = None
    seed: int = 1234
    decontaminate: DecontaminateConfig | None = None
    packing: PackingConfig | None = None
    append_eos: bool = True
    num_workers: int | None = None
    tokenizer_backend: Literal["tokenizers", "gigatoken"] = "tokenizers"
    on_bad_record: Literal["error", "skip"] = "error"
