"""A prepared source as its folder holds it: a shard a file that was read, its .bin/.idx pairs, and what its manifest says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prism.data import indexed

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass(frozen=True)
class File:
    """A file as it was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Pair:
    """A .bin/.idx pair as it was written."""

    num_tokens: int
    num_documents: int
    bin: File
    idx: File


@dataclass(frozen=True)
class Shard:
    """A shard as its manifest describes it; made_from: a hash of the recipe and of the files it was made from."""

    number: int
    input: str
    made_from: str
    train: Pair | None
    valid: Pair | None
    left_out: dict[str, int]
    bad_records: int

    def pairs(self) -> dict[Split, Pair]:
        """Return the pairs there are, by split."""
        return {split: pair for split, pair in (("train", self.train), ("valid", self.valid)) if pair}  # type: ignore[misc]


def prefix(folder: Path, number: int, split: Split) -> Path:
    """Return where a shard's pair is."""
    return folder / f"{number:05}.{split}"


def files(folder: Path, number: int, split: Split) -> tuple[Path, Path]:
    """Return a shard's .bin and .idx."""
    place = prefix(folder, number, split)
    return indexed.bin_path(place), indexed.idx_path(place)
