"""The folder of a prepared source: one shard per input file, with its .bin/.idx pairs and its manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prism.data import indexed

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass(frozen=True)
class File:
    """A written file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Pair:
    """A written .bin/.idx pair."""

    num_tokens: int
    num_documents: int
    bin: File
    idx: File


@dataclass(frozen=True)
class Shard:
    """A shard as its manifest describes it. made_from: a hash of the recipe and of the input files.

    special_tokens_in_text: how many of its texts spell special tokens, and how many tokens they spell.
    """

    number: int
    input: str
    made_from: str
    train: Pair | None
    valid: Pair | None
    left_out: dict[str, int]
    bad_records: int
    special_tokens_in_text: dict[str, int] = field(default_factory=dict)

    def pairs(self) -> dict[Split, Pair]:
        """Return the existing pairs, by split."""
        return {split: pair for split, pair in (("train", self.train), ("valid", self.valid)) if pair}  # type: ignore[misc]


def prefix(folder: Path, number: int, split: Split) -> Path:
    """Return the path prefix of a shard's pair."""
    return folder / f"{number:05}.{split}"


def files(folder: Path, number: int, split: Split) -> tuple[Path, Path]:
    """Return a shard's .bin and .idx."""
    place = prefix(folder, number, split)
    return indexed.bin_path(place), indexed.idx_path(place)
