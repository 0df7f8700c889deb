"""Make the shards of a source's pieces, whole and with their duplicates: whole ones that are there are reused, the others written.

What a shard was made from is a hash of all that its bytes depend on. `raw_hash` is that of a piece alone. `final_hash` is that of a shard
without duplicates, which also depends on the pieces before it; without dedup the two are the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_prism.core import log, manifest
from megatron_prism.core.config import SourceConfig
from megatron_prism.core.errors import InputError
from megatron_prism.data import indexed
from megatron_prism.data.formats import Shard
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.prepare import dedup, documents, shards, sources
from megatron_prism.prepare.documents import Made, Recipe
from megatron_prism.prepare.limits import Limits
from megatron_prism.prepare.pieces import Piece
from megatron_prism.prepare.shards import Cut
from megatron_prism.prepare.work import Work

SHOWN = 20  # bad records named at once; records too long, of a source
TOKENS_A_BYTE = 0.25  # a guess for the first round: it decides how many pieces are hashed at once, and no more
AHEAD = 0.05  # of the tokens needed: about what workers may tokenize beyond them


class Maker:
    """The shards of one source in reading order, as far as they are made. need: the training tokens wanted in the end, None for all."""

    def __init__(self, source: SourceConfig, order: tuple[Piece, ...], spec: TokenizerSpec, work: Work, need: int | None):
        config = work.config
        self.recipe = Recipe(
            source.name,
            spec,
            config.append_eos,
            config.special_tokens_in_text,
            source.min_tokens,
            sources.dedup(source),
            source.valid_percent,
            config.seed,
            config.decontaminate if source.decontaminate else None,
            config.max_record_bytes,
        )
        self.folder = work.folder / source.name
        self.shards: list[Shard] = []
        self._source, self._order, self._work, self._need = source, order, work, need
        self._is_partial = False  # the last shard ends before its piece does
        self._finals: list[str] = []
        self._limits = Limits(self.recipe, [piece.file for piece in order], work)
        self._dtype = indexed.token_dtype(spec.vocab_size)
        self._row = shards.row_dtype(dedup.KEY_NUMBERS[self.recipe.dedup]) if self.recipe.dedup != "none" or need is not None else None
        against = self.recipe.decontaminate
        self._against = documents.evaluation_identity(against, work.sha256) if against else None
        self._old = {shard["made_from"]: shard["number"] for shard in work.old_shards(source.name)}
        self.num_taken_over = self._num_too_long = 0

    @property
    def num_tokens(self) -> int:
        """Return the training tokens made, duplicates included."""
        return sum(map(shards.num_train_tokens, self.shards))

    @property
    def is_exhausted(self) -> bool:
        """Say whether there is nothing more to read."""
        return len(self.shards) == len(self._order) and not self._is_partial

    @property
    def is_final(self) -> bool:
        """Say whether all shards are without their duplicates."""
        return all(map(self.is_finished, self.shards))

    def is_finished(self, shard: Shard) -> bool:
        """Say whether a shard is without its duplicates, and whole."""
        return shard.made_from == self.final_hash(shard.number)

    def make_until(self, num_tokens: int | None) -> None:
        """Make shards in order until they have so many training tokens, duplicates included. None: all."""
        if self._is_partial:
            self.shards.pop()
            self._is_partial = False
        while len(self.shards) < len(self._order) and (num_tokens is None or self.num_tokens < num_tokens):
            first = len(self.shards)
            for shard in self._make(range(first, first + self._estimate(num_tokens)), num_tokens):
                self.shards.append(shard)
                is_whole = shard.made_from in (self.raw_hash(shard.number), self.final_hash(shard.number))
                self._is_partial = not is_whole

    def make(self, numbers: Sequence[int]) -> list[Shard]:
        """Make the shards of these numbers, whole and with their duplicates, whatever those before them are."""
        return list(self._make(numbers, None, in_order=False))

    def in_old_mixture(self) -> set[int]:
        """Return the numbers of the shards that the mixture that is reused seems to have, by number and piece. Who takes them over checks them."""
        inputs = {shard["number"]: shard["input"] for shard in self._work.old_shards(self._source.name)}
        return {number for number, piece in enumerate(self._order) if inputs.get(number) == piece.file.name}

    def raw_hash(self, number: int) -> str:
        """Return what a shard is made from that holds all documents of its piece."""
        return self._hash(number, None, **({"stage": "raw"} if self.recipe.dedup != "none" else {}))

    def final_hash(self, number: int) -> str:
        """Return what a shard is made from that holds no duplicates. The pieces before it must be hashed."""
        if self.recipe.dedup == "none":
            return self._hash(number, None)
        for index in range(len(self._finals), number + 1):
            self._finals.append(self._hash(index, self._finals[-1] if self._finals else None))
        return self._finals[number]

    def cut_hash(self, number: int, num_tokens: int) -> str:
        """Return what a shard is made from that holds no duplicates, and ends where its training tokens reach num_tokens."""
        return manifest.sha256_json([self.final_hash(number), num_tokens])

    def _make(self, numbers: Sequence[int], num_tokens: int | None, in_order: bool = True) -> Iterator[Shard]:
        """Yield the shards of these numbers, up to the one in which the source's training tokens reach num_tokens."""
        self._work.hash(self._order[number].file for number in numbers)
        ready = self._ready(numbers, num_tokens, in_order)
        parts = self._read([number for number in numbers if ready[number] is None])
        made_tokens = self.num_tokens if in_order else 0
        for number in numbers:
            cut = None if num_tokens is None else self._cut(number, num_tokens - made_tokens)
            shard, one = ready[number], parts
            is_to_cut = shard and cut and shard.made_from != cut.made_from and shards.num_train_tokens(shard) >= cut.num_tokens
            if is_to_cut and not shards.has_tables(self.folder, number):
                shard, one = None, self._read([number])  # it cannot be cut without its tables
            if shard is None:
                one_piece = documents.of_one_file(one)
                shard = shards.write(self.folder, number, self.raw_hash(number), one_piece, self._dtype, self._row, cut)
            yield shard
            made_tokens += shards.num_train_tokens(shard)
            if num_tokens is not None and made_tokens >= num_tokens:
                return

    def _ready(self, numbers: Sequence[int], num_tokens: int | None, in_order: bool) -> dict[int, Shard | None]:
        """Return the shards that are there, whole and made from the same: here, or in the mixture that is reused."""
        names = {number: {self.raw_hash(number), *([self.final_hash(number)] if in_order else [])} for number in numbers}
        known = self._work.run(_read_shard, [(self.folder, number, *names[number]) for number in numbers])
        ready = dict(zip(numbers, known, strict=True))
        made_tokens: int | None = self.num_tokens if in_order else None  # before the shard; None: not known yet
        for number in numbers:
            if ready[number] is None and num_tokens is not None and made_tokens is not None and made_tokens < num_tokens:
                ready[number] = shards.read(self.folder, number, self._cut(number, num_tokens - made_tokens).made_from)
            if ready[number] is None and self._old and (in_order or self.recipe.dedup == "none"):
                ready[number] = self._taken_over(number)
            shard = ready[number]
            if shard and shard.bad_records and self._work.config.on_bad_record == "error":
                ready[number] = None  # made with bad records skipped: made again, to name them
            shard = ready[number]
            made_tokens = None if made_tokens is None or shard is None else made_tokens + shards.num_train_tokens(shard)
        is_done = num_tokens is None and in_order and all(shard and self.is_finished(shard) for shard in ready.values())
        if self.recipe.dedup != "none" and not is_done:
            ready = {number: shard if shard and shards.has_tables(self.folder, number) else None for number, shard in ready.items()}
        return ready

    def _taken_over(self, number: int) -> Shard | None:
        """Take a shard from the mixture that is reused, if it has it: under dedup with its tables, for the shards after it."""
        made_from, old = self.final_hash(number), self._work.reuse / self._source.name  # type: ignore[operator]
        old_number = self._old.get(made_from)
        if old_number is None or (self.recipe.dedup != "none" and not shards.has_tables(old, old_number)):
            return None
        shard = shards.take_over(old, old_number, self.folder, number, made_from)
        self.num_taken_over += shard is not None
        return shard

    def _cut(self, number: int, num_tokens: int) -> Cut:
        if self.recipe.dedup == "none":
            return Cut(num_tokens, self.cut_hash(number, num_tokens))
        return Cut(num_tokens, manifest.sha256_json([self.raw_hash(number), num_tokens]))

    def _read(self, numbers: Sequence[int]) -> Iterator[Made]:
        """Yield the batches of these pieces. Name the records that are too long, and raise at the first bad one unless they are skipped."""
        order, config, num_bytes = self._order, self._work.config, None
        if self._need is not None:
            in_flight = 2 * (config.num_workers or len(os.sched_getaffinity(0))) + 1
            num_bytes = min(documents.BATCH_BYTES, max(documents.LEAST_BATCH_BYTES, int(self._need * AHEAD / TOKENS_A_BYTE) // in_flight))
        files = self._limits.drawn([order[number].file for number in numbers])
        is_first = True
        with self._work.watched(self._source.name, [order[number] for number in numbers]) as opened:
            for part in self._work.run(documents.make, documents.batches(files, self.recipe, opened, num_bytes)):
                self._tell(part.too_long)
                if part.bad and config.on_bad_record == "error":
                    raise InputError(list(dict.fromkeys(part.bad))[:SHOWN])
                if part.bad and is_first:
                    log.get().warning("source %s: first record skipped: %s", self._source.name, part.bad[0])
                    is_first = False
                yield part

    def _tell(self, too_long: Iterable[str]) -> None:
        for place in too_long:
            self._num_too_long += 1
            if self._num_too_long <= SHOWN:
                limit = self.recipe.max_record_bytes
                log.get().warning("source %s: left out, too long: %s, more than max_record_bytes %d", self._source.name, place, limit)

    def _estimate(self, num_tokens: int | None) -> int:
        """Return how many of the next pieces should give the tokens that are missing."""
        rest = self._order[len(self.shards) :]
        if num_tokens is None:
            return len(rest)
        num_bytes = sum(piece.num_bytes for piece in self._order[: len(self.shards)] if not piece.file.is_held_out)
        rate = self.num_tokens / num_bytes if self.num_tokens else TOKENS_A_BYTE
        wanted = (num_tokens - self.num_tokens) / rate
        for count, piece in enumerate(rest, 1):
            wanted -= 0 if piece.file.is_held_out else piece.num_bytes
            if wanted <= 0:
                return count
        return len(rest)

    def _hash(self, number: int, before: str | None, **more: str) -> str:
        """Return a hash of all that a shard depends on: its piece, how it is read, and `before`, which stands for the pieces before it."""
        file, sha256, spec = self._order[number].file, self._work.sha256, self.recipe.tokenizer
        values = dataclasses.asdict(self.recipe) | {"tokenizer": spec.sha256, "eos_id": spec.eos_id, "named_ids": spec.named_ids}
        values["decontaminate"] = self._against
        facts = {**sources.how_read(file.part), "is_held_out": file.is_held_out, "sha256": sha256[file.name]}
        facts |= {"path": str(file.path), "hf_id": None, "drawn_from": self._limits.drawn_from(file), "before": before}
        facts |= {"span": file.span} if file.span else {}
        return manifest.sha256_json({"recipe": values, "file": facts, **more})


def _read_shard(wanted: tuple[Path, int, str]) -> Shard | None:
    folder, number, *made_from = wanted
    return shards.read(folder, number, *made_from)
