"""`prism prepare`'s config: a weighted mixture of sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.section import IS_PATH, Pattern, Range, Section

Name = Annotated[str, Pattern(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*", "letters, digits, '_', '-' and '.', the first no '.': it names a folder")]


@dataclass(frozen=True, kw_only=True)
class KeepConfig(Section):
    """A condition on a field of the record. Exactly one of the five operations must be set.

    A record that does not meet the condition is left out and counted. A record without the field is a bad record.
    """

    field: str
    """The record's field. `a.b` is a field within a field."""

    equals: str | int | float | bool | None = None
    """The field has this value."""

    not_equals: str | int | float | bool | None = None
    """The field has another value."""

    at_least: float | None = None
    """The field is this number, or more."""

    one_of: tuple[str, ...] = ()
    """The field is one of these texts."""

    starts_with: str | None = None
    """The field is a text that begins with this."""


@dataclass(frozen=True, kw_only=True)
class TurnsConfig(Section):
    """Text from a list of turns ({role, content}, or {from, value}), joined with one line break. System turns are left out (ours).

    A content may be a list of parts {type: text, text}, whose texts are joined. A turn with a call or another part is a bad record.
    """

    field: str = "messages"
    """The record's field that holds the turns."""

    prefix: bool = False
    """Every utterance begins "User: " or "Assistant: " (paper, section 3.1: chat)."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """A random sample: a number of different texts for each value of a field of the record (paper, section 3.1)."""

    counts: dict[str, int]
    """The number of texts, by the field's value. Records with other values are left out."""

    field: str | None = None
    """The record's field. Null: all records are of one group, `all`."""


@dataclass(frozen=True, kw_only=True)
class PartConfig(Section):
    """Files, and how their records become texts."""

    path: Annotated[tuple[str, ...], IS_PATH] = ()
    """Files or globs: JSON lines (.jsonl, .json, .ndjson) or .txt, also .gz and .zst; .parquet; save_to_disk folders."""

    keep: tuple[KeepConfig, ...] = ()
    """Conditions on a record. All must hold."""

    text: str = "{text}"
    """How a record becomes a text: `{field}` in braces stands for the record's field. Or use turns."""

    turns: TurnsConfig | None = None
    """How a record of turns becomes a text."""

    sample: SampleConfig | None = None
    """Take a sample of the records. Null: all of them."""

    split: Literal["paragraph", "file"] = "file"
    """A .txt file is split into documents at blank lines (paragraph), or taken whole (file)."""

    hf_id: str | None = None
    """The data's origin, for the reader."""

    hf_files: str | None = None
    """The origin's files, a pattern for `hf download` that the dry run prints. `{number}` stands for a file's number, so that a part is taken."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(PartConfig):
    """One source of a mixture: a single part, or several `parts`, concatenated."""

    name: Name
    """The source's name, used once in a mixture."""

    weight: Annotated[float, Range(gt=0)]
    """Percent of the training tokens. All sources' weights sum to 100."""

    parts: tuple[PartConfig, ...] = ()
    """Several parts, in place of the source's own path, keep, text, turns, sample and split."""

    valid_path: Annotated[tuple[str, ...], IS_PATH] = ()
    """Files held out for validation, read like the source's own."""

    valid_percent: Annotated[float, Range(ge=0, lt=100)] = 0.0
    """Without valid_path: the percent of the documents held out for validation, chosen by their hash."""

    min_tokens: Annotated[int, Range(ge=1)] = 1
    """Shorter documents are left out (the paper does so before the 128k step, and does not give its threshold)."""

    dedup: Literal["none", "exact", "minhash"] = "none"
    """`exact` leaves out repeated texts, `minhash` near-duplicates too (the paper names no method: ours)."""

    decontaminate: bool = True
    """Leave out what the mixture's `decontaminate` finds."""

    domain: str | None = None
    """The group of sources that reports add this one to."""

    available_tokens: Annotated[int | None, Range(ge=1)] = None
    """The tokens that the source is expected to hold, for a plan without data."""


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig(Section):
    """Leave out documents that share words with an evaluation set (the paper describes no decontamination: ours)."""

    against: tuple[PartConfig, ...]
    """The evaluation sets' texts."""

    ngram: Annotated[int, Range(ge=1)] = 13
    """A document that shares this many words in a row with an evaluation text is left out."""

    shortest: Annotated[int, Range(ge=1)] = 8
    """A text of fewer than ngram words is searched for as a whole. A text of fewer words than this is counted and not searched for."""


@dataclass(frozen=True, kw_only=True)
class PackingConfig(Section):
    """Best-fit-decreasing packing into sequences, in place of plain concatenation (paper, section 8.1)."""

    seq_length: Annotated[int, Range(ge=2)]
    """The tokens of a sequence. A longer document is cut into chunks. A chunk's last token has no loss, so one token would be none to learn from."""

    overlap: Annotated[int, Range(ge=0)] = 0
    """The tokens that the chunks of a document overlap by (paper: optional, no number: 0 is ours)."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """`prism prepare`: weighted sources, tokenized once into Megatron .bin/.idx files."""

    out: Path
    """The folder to write."""

    tokenizer: Path
    """The tokenizer's folder."""

    sources: tuple[SourceConfig, ...]
    """The sources of the mixture."""

    tokens: Annotated[int | None, Range(ge=1)] = None
    """The training budget: what its blend needs of each source is read. Null: all is read, for the largest budget of at most one epoch."""

    margin: Annotated[float, Range(ge=0)] = 0.02
    """The share of a source's tokens that is prepared beyond what `tokens` needs of it (ours)."""

    read: Literal["needed", "all"] = "needed"
    """With tokens: pieces of each source by lot until they hold what is needed, or all of it. Without tokens all is read."""

    reuse: Path | None = None
    """A mixture prepared before, with other tokens or weights: shards that are the same are linked from it, and not made again."""

    max_record_bytes: Annotated[int, Range(ge=1)] = 16_777_216
    """A record, or its text in UTF-8, of more bytes is left out and named (ours). It bounds the memory of a worker."""

    max_epochs: Annotated[float | None, Range(gt=0, finite=False)] = None
    """The most epochs of a source that the budget may read. Null: no limit."""

    seed: int = 1234
    """The seed of `sample`."""

    decontaminate: DecontaminateConfig | None = None
    """Null: no decontamination."""

    packing: PackingConfig | None = None
    """Null: documents follow each other, and are cut where a sequence ends."""

    append_eos: bool = True
    """End each document with the tokenizer's end-of-text token."""

    special_tokens_in_text: Literal["text", "ids", "error"] = "text"
    """A text that spells a special token, such as <|endoftext|>, is encoded as ordinary text (text: ours), gets the token's id (ids: as
    transformers and Megatron-LM), or is a bad record (error)."""

    num_workers: Annotated[int | None, Range(ge=1)] = None
    """The number of processes that tokenize. Null: one per core."""

    tokenizer_backend: Literal["tokenizers", "gigatoken"] = "tokenizers"
    """gigatoken gives the same ids, several times as fast, for the kinds of tokenizer that it reads."""

    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be read ends the job (error), or is left out and counted (skip)."""
