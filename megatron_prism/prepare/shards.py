"""A shard is one prepared piece of a source: its .bin/.idx pairs, and a manifest that is written last.

A shard with a manifest is whole. A shard without one is written again. A source's folder holds 00000.train.bin and .idx, 00000.valid.*,
00000.json and, where a later step or a later mixture needs them, the tables 00000.keys.npy (per document its record's number, its side, the
special tokens it spells and its dedup key) and 00000.left_out.npy (per other record its number, and why it gave no document).

`write` makes a shard of all documents of its piece. `finish` takes the duplicates out, and what is beyond the tokens that are needed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prism.core import disk, manifest
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build, to_dict
from megatron_prism.data import indexed
from megatron_prism.data.formats import SPLITS, File, Pair, Shard, Split, files, prefix
from megatron_prism.prepare import tables
from megatron_prism.prepare.documents import LEFT_OUT, REASONS

if TYPE_CHECKING:
    from megatron_prism.prepare.documents import Made

KEYS, LEFT = "keys.npy", "left_out.npy"
TABLES = (KEYS, LEFT)
COPY_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a shard ends: with the document in which its training tokens reach num_tokens. made_from: the shard's own, if it is cut."""

    num_tokens: int
    made_from: str


def read(folder: Path, number: int, *made_from: str) -> Shard | None:
    """Return a shard of a source's folder, None where it is not whole or was made from other input or settings (none of `made_from`)."""
    try:
        shard = build(manifest.read_json(_manifest_path(folder, number)), Shard, str)
    except (OSError, ValueError, InputError):
        return None
    if shard.number != number or shard.made_from not in made_from:
        return None
    for split, pair in shard.pairs().items():
        for path, recorded in zip(files(folder, number, split), (pair.bin, pair.idx), strict=True):
            if not path.is_file() or path.stat().st_size != recorded.size_bytes or manifest.sha256_file(path) != recorded.sha256:
                return None
    return shard


def write(
    folder: Path, number: int, made_from: str, parts: Iterable[Made], dtype: np.dtype, row: np.dtype | None, cut: Cut | None
) -> Shard:
    """Write a shard from its piece's batches, up to `cut`. row: of the table of documents (`row_dtype`); None writes no tables."""
    folder.mkdir(exist_ok=True, parents=True)
    for path in folder.glob(f"{number:05}.*"):  # files of an outdated shard
        path.unlink()
    left_out, num_train, name, is_cut = np.zeros(len(REASONS), np.int64), 0, "", False
    num_spelled = Counter(texts=0, tokens=0)
    with ExitStack() as stack:
        pairs = {split: stack.enter_context(indexed.Writer(prefix(folder, number, split), dtype)) for split in SPLITS}
        keys = stack.enter_context(tables.Writer(_table(folder, number, KEYS), row)) if row else None
        left = stack.enter_context(tables.Writer(_table(folder, number, LEFT), LEFT_OUT)) if row else None
        for made in parts:
            name = made.file.name
            if cut:
                made, is_cut = _up_to(made, cut.num_tokens - num_train)
            num_train += int(made.lengths[~made.is_valid].sum())
            left_out += np.bincount(made.left_out["reason"], minlength=len(REASONS))
            num_spelled.update(_spelled(made.num_spelled))
            for split in SPLITS:
                chosen = made.is_valid == (split == "valid")
                if chosen.any():
                    pairs[split].add(made.tokens[np.repeat(chosen, made.lengths)], made.lengths[chosen])
            if keys and left and row:
                keys.add(_rows(made, row))
                left.add(made.left_out)
            if is_cut:
                break
    counts, num_bad = _counts(left_out)
    made_from = cut.made_from if cut and is_cut else made_from
    return _sealed(folder, Shard(number, name, made_from, None, None, counts, num_bad, dict(num_spelled)))


def finish(folder: Path, shard: Shard, made_from: str, is_duplicate: np.ndarray, cut: Cut | None, is_without_duplicates: bool) -> Shard:
    """Take the duplicates out of a shard with tables, and what is beyond `cut`. Its files are replaced, its tables stay.

    is_duplicate: bool [documents of the table]. is_without_duplicates: they are out already.
    """
    rows, left = keys_table(folder, shard.number), tables.read(_table(folder, shard.number, LEFT))
    stands = ~is_duplicate if is_without_duplicates else np.ones(len(rows), bool)  # the table's documents that the files hold
    kept = ~is_duplicate
    num_rows = len(rows)
    if cut:
        lengths = _lengths(folder, shard, rows, stands)
        ends = np.cumsum(np.where(rows["is_valid"] | ~kept, 0, lengths))
        if num_rows and ends[-1] >= cut.num_tokens:
            num_rows = int(np.searchsorted(ends, cut.num_tokens)) + 1
            kept[num_rows:] = False
            left = left[: np.searchsorted(left["number"], rows["number"][num_rows - 1], "right")]
            made_from = cut.made_from
    for split in SPLITS:
        _keep(folder, shard, split, kept[stands & (rows["is_valid"] == (split == "valid"))])
    counts, num_bad = _counts(np.bincount(left["reason"], minlength=len(REASONS)))
    counts |= {"dedup": num_again} if (num_again := int(is_duplicate[:num_rows].sum())) else {}
    spelled = _spelled(rows["num_spelled"][kept])
    shard = dataclasses.replace(shard, made_from=made_from, left_out=counts, bad_records=num_bad, special_tokens_in_text=spelled)
    return _sealed(folder, shard)


def num_train_tokens(shard: Shard) -> int:
    """Return a shard's training tokens."""
    return shard.train.num_tokens if shard.train else 0


def num_kept_tokens(folder: Path, shard: Shard, is_duplicate: np.ndarray) -> int:
    """Return the training tokens of a shard as written once its duplicates are out."""
    rows = keys_table(folder, shard.number)
    lengths = _lengths(folder, shard, rows, np.ones(len(rows), bool))
    return int(lengths[~is_duplicate & ~rows["is_valid"]].sum())


def row_dtype(num_key_numbers: int) -> np.dtype:
    """Return the dtype of a row of the table of documents. num_key_numbers: 64-bit numbers of a dedup key; 0 for none."""
    return np.dtype([("number", "<i8"), ("is_valid", "?"), ("num_spelled", "<i4"), ("key", "<u8", (num_key_numbers,))])


def has_tables(folder: Path, number: int) -> bool:
    """Say whether a shard's tables are there."""
    return all(_table(folder, number, kind).is_file() for kind in TABLES)


def keys_table(folder: Path, number: int) -> np.ndarray:
    """Return a shard's table of documents, mapped into memory."""
    return tables.read(_table(folder, number, KEYS))


def keys(folder: Path, number: int) -> np.ndarray:
    """Return a shard's dedup keys, uint64 [documents, numbers of a key]."""
    return keys_table(folder, number)["key"]


def take_over(old: Path, old_number: int, folder: Path, number: int, made_from: str) -> Shard | None:
    """Link the files of another mixture's shard into `folder`, or copy them, and return it; None where it is not the same or not whole."""
    shard = read(old, old_number, made_from)
    if shard is None:
        return None
    folder.mkdir(exist_ok=True, parents=True)
    for path in folder.glob(f"{number:05}.*"):
        path.unlink()
    for path in old.glob(f"{old_number:05}.*"):
        if path != _manifest_path(old, old_number):
            disk.link_or_copy(path, folder / f"{number:05}{path.name.removeprefix(f'{old_number:05}')}")
    shard = dataclasses.replace(shard, number=number)
    manifest.write_json(_manifest_path(folder, number), to_dict(shard))
    return shard


def written(path: Path) -> File:
    """Return the size and hash of a file."""
    return File(path.stat().st_size, manifest.sha256_file(path))


def _sealed(folder: Path, shard: Shard) -> Shard:
    """Write a shard's manifest, and return the shard with its files' sizes and hashes."""
    shard = dataclasses.replace(shard, train=_pair(folder, shard.number, "train"), valid=_pair(folder, shard.number, "valid"))
    manifest.write_json(_manifest_path(folder, shard.number), to_dict(shard))
    return shard


def _up_to(made: Made, num_tokens: int) -> tuple[Made, bool]:
    """Return a batch up to the document in which its training tokens reach num_tokens, and whether they do."""
    ends = np.cumsum(np.where(made.is_valid, 0, made.lengths))
    if not ends.size or ends[-1] < num_tokens:
        return made, False
    count = int(np.searchsorted(ends, num_tokens)) + 1
    left_out = made.left_out[made.left_out["number"] <= made.numbers[count - 1]]
    columns = {name: getattr(made, name)[:count] for name in ("numbers", "lengths", "is_valid", "num_spelled", "keys")}
    return dataclasses.replace(made, tokens=made.tokens[: made.lengths[:count].sum()], left_out=left_out, **columns), True


def _rows(made: Made, row: np.dtype) -> np.ndarray:
    rows = np.empty(len(made.numbers), row)
    for name, column in zip(row.names or (), (made.numbers, made.is_valid, made.num_spelled, made.keys), strict=True):
        rows[name] = column
    return rows


def _spelled(num_spelled: np.ndarray) -> dict[str, int]:
    """Return how many texts spell special tokens, and how many they spell. num_spelled: of each text."""
    return {"texts": int((num_spelled > 0).sum()), "tokens": int(num_spelled.sum())}


def _counts(left_out: np.ndarray) -> tuple[dict[str, int], int]:
    """Return the number of records left out by each step, and of the bad ones. left_out: the number of each of REASONS."""
    counts = {reason: int(count) for reason, count in zip(REASONS, left_out, strict=True) if count}
    return counts, counts.pop("bad", 0)


def _lengths(folder: Path, shard: Shard, rows: np.ndarray, stands: np.ndarray) -> np.ndarray:
    """Return the tokens of each document of a table, 0 where the files do not hold it."""
    lengths = np.zeros(len(rows), np.int64)
    for split in shard.pairs():
        lengths[stands & (rows["is_valid"] == (split == "valid"))] = indexed.Reader([prefix(folder, shard.number, split)]).lengths()
    return lengths


def _keep(folder: Path, shard: Shard, split: Split, kept: np.ndarray) -> None:
    """Write a pair again with some of its documents (bool [documents of the pair]), unless it keeps them all."""
    if kept.all():
        return
    place = prefix(folder, shard.number, split)
    if not kept.any():
        for path in files(folder, shard.number, split):
            path.unlink()
        return
    reader = indexed.Reader([place])
    lengths = reader.lengths()
    starts = np.cumsum(lengths) - lengths
    # a new run of documents begins where one is left out before it, and after about COPY_TOKENS: a run is copied at once
    runs = np.split(
        chosen := np.flatnonzero(kept), np.flatnonzero((np.diff(chosen) > 1) | (np.diff(starts[chosen] // COPY_TOKENS) > 0)) + 1
    )
    with indexed.Writer(place, reader.dtype) as writer:
        for run in runs:
            writer.add(reader.tokens(int(starts[run[0]]), int(lengths[run].sum())), lengths[run])


def _pair(folder: Path, number: int, split: Split) -> Pair | None:
    paths = files(folder, number, split)
    if not paths[0].exists():
        return None
    held = indexed.verify(prefix(folder, number, split))
    return Pair(held.num_tokens, held.num_documents, *map(written, paths))


def _manifest_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _table(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:05}.{kind}"
