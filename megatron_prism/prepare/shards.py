"""A shard is one prepared file of a source: its .bin/.idx pairs, and a manifest that is written last.

A shard with a manifest is whole. A shard without one is written again. A source's folder holds 00000.train.bin and .idx, 00000.valid.*,
00000.json and, until the source is whole, 00000.keys.npy (the dedup keys).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prism.core import manifest
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build, to_dict
from megatron_prism.data import indexed
from megatron_prism.data.formats import SPLITS, File, Pair, Shard, Split, files, prefix

if TYPE_CHECKING:
    from megatron_prism.prepare.dedup import Seen
    from megatron_prism.prepare.documents import Made


def read(folder: Path, number: int, made_from: str) -> Shard | None:
    """Return a shard of a source's folder, None where it is not whole or was made from other input or settings."""
    try:
        shard = build(manifest.read_json(_manifest_path(folder, number)), Shard, str)
    except (OSError, ValueError, InputError):
        return None
    if (shard.number, shard.made_from) != (number, made_from):
        return None
    for split, pair in shard.pairs().items():
        for path, recorded in zip(files(folder, number, split), (pair.bin, pair.idx), strict=True):
            if not path.is_file() or path.stat().st_size != recorded.size_bytes or manifest.sha256_file(path) != recorded.sha256:
                return None
    return shard


def write(folder: Path, number: int, made_from: str, parts: Iterable[Made], seen: Seen | None, dtype: np.dtype) -> Shard:
    """Write a shard from its file's batches, without the documents that were `seen` before."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob(f"{number:05}.*"):  # files of an outdated shard
        path.unlink()
    left_out: Counter[str] = Counter()
    bad_records = 0
    num_spelled = Counter(texts=0, tokens=0)
    input_path = ""
    kept_keys = []
    writers = {split: indexed.Writer(prefix(folder, number, split), dtype) for split in SPLITS}
    with writers["train"] as train, writers["valid"] as valid:
        for made in parts:
            is_new = np.ones(len(made.keys), bool) if seen is None else seen.are_new(made.keys)
            left_out.update(made.left_out)
            left_out["dedup"] += int((~is_new).sum())
            bad_records += len(made.bad)
            num_spelled.update(texts=int((made.num_spelled[is_new] > 0).sum()), tokens=int(made.num_spelled[is_new].sum()))
            input_path = str(made.file.path)
            kept_keys += [made.keys[is_new]] if seen else []
            for writer, chosen in ((train, is_new & ~made.is_valid), (valid, is_new & made.is_valid)):
                if chosen.any():
                    writer.add(made.tokens[np.repeat(chosen, made.lengths)], made.lengths[chosen])
    if seen:
        _write_keys(_keys_path(folder, number), [part for part in kept_keys if part.size] or [np.zeros(0, np.uint64)])
    pairs = {split: _pair(folder, number, split) for split in SPLITS}
    counts = {name: count for name, count in left_out.items() if count}
    shard = Shard(number, input_path, made_from, pairs["train"], pairs["valid"], counts, bad_records, dict(num_spelled))
    manifest.write_json(_manifest_path(folder, number), to_dict(shard))
    return shard


def has_keys(folder: Path, number: int) -> bool:
    """Say whether a shard's dedup keys are still there."""
    return _keys_path(folder, number).is_file()


def keys(folder: Path, number: int) -> np.ndarray:
    """Return a shard's dedup keys."""
    return np.load(_keys_path(folder, number), allow_pickle=False)


def written(path: Path) -> File:
    """Return the size and hash of a file."""
    return File(path.stat().st_size, manifest.sha256_file(path))


def _pair(folder: Path, number: int, split: Split) -> Pair | None:
    paths = files(folder, number, split)
    if not paths[0].exists():
        return None
    held = indexed.verify(prefix(folder, number, split))
    return Pair(held.num_tokens, held.num_documents, *map(written, paths))


def _write_keys(path: Path, parts: list[np.ndarray]) -> None:
    with path.open("wb") as stream:  # on disk before the shard's manifest
        np.save(stream, np.concatenate(parts), allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())


def _manifest_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _keys_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.keys.npy"
