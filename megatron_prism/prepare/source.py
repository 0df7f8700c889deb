"""From a source's files to its shards: pieces are made into shards until there are enough tokens. Then the source is packed, if configured."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_prism.core import disk, log
from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data import formats, indexed, mixture, packed
from megatron_prism.data.formats import Shard
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.prepare import duplicates, packing, pieces, shards, sources
from megatron_prism.prepare.pieces import Piece
from megatron_prism.prepare.raw import Maker
from megatron_prism.prepare.shards import Cut
from megatron_prism.prepare.sources import Input
from megatron_prism.prepare.work import Work

ONCE_MORE = 1.02  # how many more tokens are made than should do, where duplicates have left too few: one more round is the exception


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A source's shards, and the pieces it has, in reading order. The first len(shards) are read, the last of them in part if `is_cut`."""

    shards: tuple[Shard, ...]
    pieces: tuple[Piece, ...]
    is_cut: bool

    @property
    def num_whole(self) -> int:
        """Return how many shards a mixture that reads more of the source can go on from; 0 where there is no more."""
        return len(self.shards) - self.is_cut if self.is_cut or len(self.shards) < len(self.pieces) else 0


def needed_tokens(config: PrepareConfig) -> dict[str, int | None]:
    """Return the training tokens that are made of each source: its part of `tokens` and `margin` more. None: all it has."""
    if config.tokens is None or config.read == "all":
        return {source.name: None for source in config.sources}
    planned = mixture.plan({source.name: source.weight for source in config.sources}, {}, config.tokens)
    # at least a document of each: a part of the blend may be less than a token
    return {part.name: max(math.ceil(part.tokens * (1 + Fraction(str(config.margin)))), 1) for part in planned}


def read_order(config: PrepareConfig, source: SourceConfig, files: Sequence[Input]) -> tuple[Piece, ...]:
    """Return a source's pieces in the order in which they are read: its files where all of it is read, else by lot."""
    if needed_tokens(config)[source.name] is None:
        return tuple(map(pieces.whole, files))
    return pieces.in_lot_order(files, config.seed, source.name)


def make_shards(source: SourceConfig, order: tuple[Piece, ...], spec: TokenizerSpec, work: Work) -> Prepared:
    """Write a source's missing shards in its folder, and return all shards.

    Raises: InputError for a bad record where on_bad_record is `error`, and where there is nothing to train on.
    """
    need = needed_tokens(work.config)[source.name]
    maker = Maker(source, order, spec, work, need)
    maker.make_until(need)
    again = _duplicates(maker, need)
    while need is not None and again is not None and not maker.is_exhausted and (kept := _num_kept(maker, again)) < need:
        maker.make_until(math.ceil(maker.num_tokens * ONCE_MORE * need / max(kept, 1)))
        again = _duplicates(maker, need)
    done = _finish(maker, again, need)
    _check(source, done)
    if work.reuse:
        log.get().info("source %s: %d of %d shards taken over from %s", source.name, maker.num_taken_over, len(done), work.reuse)
    return Prepared(tuple(done), order, is_cut=done[-1].made_from != maker.final_hash(done[-1].number))


def make_task(source: SourceConfig, order: tuple[Piece, ...], spec: TokenizerSpec, work: Work, task: int, num_tasks: int) -> int:
    """Write the shards whose number is `task` modulo num_tasks, as many as the source seems to need. Return how many stand.

    They are whole, with their duplicates: whoever seals the mixture takes out what is too much. Tokens a byte are those of the task's own.
    """
    need = needed_tokens(work.config)[source.name]
    maker = Maker(source, order, spec, work, need)
    known = set() if sources.dedup(source) == "none" else maker.in_old_mixture()
    numbers = [number for number in range(task, len(order), num_tasks) if number not in known]
    before = [0, *itertools.accumulate(0 if piece.file.is_held_out else piece.num_bytes for piece in order)]
    num_tokens = num_bytes = 0
    made: list[int] = []
    while len(made) < len(numbers):
        wanted = [
            number for number in numbers[len(made) :] if need is None or not num_tokens or before[number] * num_tokens < need * num_bytes
        ]
        if not wanted:
            break
        if need is not None:  # half of them at a time, the first alone: what is made tells the tokens of a byte
            wanted = wanted[: (len(wanted) + 1) // 2] if num_tokens else wanted[:1]
        done = maker.make(wanted)
        num_tokens += sum(map(shards.num_train_tokens, done))
        num_bytes += sum(order[number].num_bytes for number in wanted if not order[number].file.is_held_out)
        made += wanted
    return len(made)


def pack_shards(source: SourceConfig, source_shards: Sequence[Shard], work: Work) -> dict[str, Any]:
    """Pack a source's training documents, if configured, and return the entry for the manifest."""
    wanted, folder = work.config.packing, work.folder / source.name
    if wanted is None:
        return {"packing": None, "packing_files": {}}
    prefixes = [formats.prefix(folder, shard.number, "train") for shard in source_shards if shard.train]
    made = packing.pack(indexed.Reader(prefixes).lengths(), wanted.seq_length, wanted.overlap)
    prefix = packed.prefix(folder)
    packed.save(made, prefix)
    files = {path.name: shards.written(path) for path in (packed.pieces_path(prefix), packed.bins_path(prefix))}
    held = mixture.Packing(made.seq_length, made.num_bins, made.efficiency)
    return {"packing": dataclasses.asdict(held), "packing_files": {name: dataclasses.asdict(file) for name, file in files.items()}}


def reading(done: Prepared) -> dict[str, Any]:
    """Return what was read of a source and what is left, for the manifest. The tokens left are estimated from those of a byte read."""
    read, unread = done.pieces[: len(done.shards)], done.pieces[len(done.shards) :]
    num_bytes, unread_bytes = (sum(piece.num_bytes for piece in part) for part in (read, unread))
    read_files = {piece.file.path for piece in read}
    unread_files = sorted({piece.file.path for piece in unread} - read_files)
    whole = [(piece, shard) for piece, shard in zip(read, done.shards, strict=True) if not piece.file.is_held_out]
    whole = whole[: len(whole) - done.is_cut]
    whole_tokens, whole_bytes = sum(shards.num_train_tokens(shard) for _, shard in whole), sum(piece.num_bytes for piece, _ in whole)
    return {
        "num_files": len(read_files),
        "num_pieces": len(read),
        "num_bytes": num_bytes,
        "is_last_cut": done.is_cut,
        "unread_pieces": len(unread),
        "unread_bytes": unread_bytes,
        "unread_tokens_estimate": round(unread_bytes * whole_tokens / whole_bytes) if whole_bytes else None if unread else 0,
        "unread_files": {str(path): path.stat().st_size for path in unread_files},
    }


def _duplicates(maker: Maker, need: int | None) -> list[Any] | None:
    """Return which documents of each shard are duplicates (bool), None without dedup, and where they are out and all is read."""
    kind = maker.recipe.dedup
    if kind == "none" or (need is None and maker.is_final):
        return None
    disk.allow_open_files(len(maker.shards) + duplicates.OPEN_FILES)  # each map holds its file open
    keys = [shards.keys(maker.folder, shard.number) for shard in maker.shards]
    is_again = duplicates.find(keys, kind, maker.folder / duplicates.SCRATCH)
    ends = [0, *itertools.accumulate(map(len, keys))]
    return [is_again[start:end] for start, end in itertools.pairwise(ends)]


def _num_kept(maker: Maker, again: Sequence[Any]) -> int:
    """Return the training tokens that are left once the duplicates are out."""
    return sum(
        shards.num_train_tokens(shard) if maker.is_finished(shard) else shards.num_kept_tokens(maker.folder, shard, again[shard.number])
        for shard in maker.shards
    )


def _finish(maker: Maker, again: Sequence[Any] | None, need: int | None) -> list[Shard]:
    """Take the duplicates out of the shards that hold them, and end the source with the document in which its tokens reach `need`."""
    done: list[Shard] = []
    num_tokens = 0
    for shard in maker.shards:
        cut = None if need is None else Cut(need - num_tokens, maker.cut_hash(shard.number, need - num_tokens))
        is_whole = maker.is_finished(shard) and (cut is None or shards.num_train_tokens(shard) < cut.num_tokens)
        if not is_whole and not (cut and shard.made_from == cut.made_from):
            is_again = np.zeros(len(shards.keys_table(maker.folder, shard.number)), bool) if again is None else again[shard.number]
            shard = shards.finish(maker.folder, shard, maker.final_hash(shard.number), is_again, cut, maker.is_finished(shard))
        done.append(shard)
        num_tokens += shards.num_train_tokens(shard)
        if need is not None and num_tokens >= need:
            break
    return done


def _check(source: SourceConfig, source_shards: Sequence[Shard]) -> None:
    """Raise InputError where there is nothing to train on, or nothing in the files held out."""
    has = {split for shard in source_shards for split in shard.pairs()}
    paths = [path for part in sources.parts(source) for path in part.path]
    left_out = sum((Counter(shard.left_out) for shard in source_shards), Counter())
    fix = f"left out: {', '.join(f'{name} {count}' for name, count in left_out.items())}" if left_out else ""
    fix += "; raise max_record_bytes, or split: paragraph for a .txt file" if left_out["too_long"] else ""
    fix += "valid_path holds out every file of it: name others" if source.valid_path and "valid" in has and not left_out else ""
    if "train" not in has:
        raise InputError(Problem(f"sources.{source.name}.path", f"no train document in {', '.join(paths)}", "at least one document", fix))
    if source.valid_path and "valid" not in has:
        raise InputError(
            Problem(
                f"sources.{source.name}.valid_path", f"no valid document in {', '.join(source.valid_path)}", "at least one document", fix
            )
        )
    if source.valid_percent and "valid" not in has:
        log.get().warning("source %s: valid_percent %g holds out none of its documents", source.name, source.valid_percent)
    if num_long := left_out["too_long"]:
        log.get().warning("source %s: %d records longer than max_record_bytes left out", source.name, num_long)
    if num_bad := sum(shard.bad_records for shard in source_shards):
        log.get().warning("source %s: %d bad records skipped", source.name, num_bad)
