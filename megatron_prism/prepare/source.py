"""From a source's files to its shards: whole shards are reused, the others written. Then the source is packed, if configured."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core import log, manifest
from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.data import formats, indexed, mixture, packed
from megatron_prism.data.formats import Shard
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.prepare import dedup, documents, packing, pool, sample, shards, sources
from megatron_prism.prepare.documents import Made, Recipe
from megatron_prism.prepare.sources import Input, Watched

if TYPE_CHECKING:
    from rich.progress import Progress

SHOWN = 20  # bad records named at once


@dataclasses.dataclass(frozen=True)
class Work:
    """What every source's preparation shares: where to write, the processes, the progress bar, the hashes of all files read."""

    config: PrepareConfig
    folder: Path
    run: pool.Map[Any, Any]
    progress: Progress
    sha256: Mapping[str, str]


def make_shards(source: SourceConfig, files: Sequence[Input], spec: TokenizerSpec, work: Work) -> tuple[Shard, ...]:
    """Write a source's missing shards in `work.folder`, and return all shards.

    Raises: InputError for a bad record where on_bad_record is `error`, and where there is nothing to train on.
    """
    config, folder = work.config, work.folder / source.name
    recipe = Recipe(
        source.name,
        spec,
        config.append_eos,
        config.special_tokens_in_text,
        source.min_tokens,
        sources.dedup(source),
        source.valid_percent,
        config.seed,
        config.decontaminate if source.decontaminate else None,
    )
    made_from = _made_from(recipe, files, work.sha256)
    ready = [shards.read(folder, number, made_from[number]) for number in range(len(files))]
    if config.on_bad_record == "error":  # a shard made with bad records skipped is made again, to name them
        ready = [shard if shard and not shard.bad_records else None for shard in ready]
    if all(ready):
        return _checked(source, [shard for shard in ready if shard])
    if recipe.dedup != "none":
        ready = [shard if shard and shards.has_keys(folder, shard.number) else None for shard in ready]
    to_read = [file for file, shard in zip(_drawn(recipe, files, work), ready, strict=True) if shard is None]
    made = work.run(documents.make, documents.batches(to_read, recipe, _watched(source.name, to_read, work)))
    good = _without_bad(made, source, config)
    seen = None if recipe.dedup == "none" else dedup.Seen(recipe.dedup)
    for number, shard in enumerate(ready):
        if shard is None:
            ready[number] = shards.write(
                folder, number, made_from[number], documents.of_one_file(good), seen, indexed.token_dtype(spec.vocab_size)
            )
        elif seen:
            seen.add(shards.keys(folder, number))
    return _checked(source, [shard for shard in ready if shard])


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


def _drawn(recipe: Recipe, files: Sequence[Input], work: Work) -> list[Input]:
    """Return the files with the limits of their samples. This reads the files of each sampled part once.

    Raises: InputError naming each group with fewer texts than its sample needs.
    """
    drawn = list(files)
    problems = []
    for part in [
        file.part for index, file in enumerate(files) if file.part.sample and file.part not in [other.part for other in files[:index]]
    ]:
        assert part.sample is not None
        mine = [index for index, file in enumerate(files) if file.part == part]
        to_read = [files[index] for index in mine]
        draw = sample.Draw(part.sample.counts)
        for lots in work.run(documents.lots, documents.batches(to_read, recipe, _watched(f"{recipe.source} (lots)", to_read, work))):
            for group, lot in lots:
                draw.add(group, lot)
        problems += [
            Problem(f"sources.{recipe.source}.sample.counts.{group}", f"{count} different texts", f"{part.sample.counts[group]}")
            for group, count in draw.short().items()
        ]
        for index in mine:
            drawn[index] = dataclasses.replace(files[index], limits=draw.limits())
    raise_problems(problems)
    return drawn


def _watched(title: str, files: Sequence[Input], work: Work) -> sources.OpenFile:
    """Return a function that opens files and shows a progress bar of the bytes read."""
    task = work.progress.add_task(title, total=sum(file.path.stat().st_size for file in files))
    return Watched.opener(lambda count: work.progress.advance(task, count))


def _without_bad(made: Iterable[Made], source: SourceConfig, config: PrepareConfig) -> Iterator[Made]:
    """Yield the batches. Raise at the first bad records, unless the config skips them."""
    is_first = True
    for part in made:
        if part.bad and config.on_bad_record == "error":
            raise InputError(list(dict.fromkeys(part.bad))[:SHOWN])
        if part.bad and is_first:
            log.get().warning("source %s: first record skipped: %s", source.name, part.bad[0])
            is_first = False
        yield part


def _made_from(recipe: Recipe, files: Sequence[Input], sha256: Mapping[str, str]) -> list[str]:
    """Return for each file a hash of all that its shard depends on.

    Under dedup a shard also depends on the files before it. Under sampling it depends on all files of its part.
    """
    values = dataclasses.asdict(recipe) | {"tokenizer": recipe.tokenizer.sha256, "eos_id": recipe.tokenizer.eos_id}
    if recipe.decontaminate:
        values["decontaminate"] |= {"against": [sha256[str(file.path)] for file in documents.evaluation_files(recipe.decontaminate)]}
    hashes: list[str] = []
    for file in files:
        facts = {**dataclasses.asdict(file.part), "is_held_out": file.is_held_out, "sha256": sha256[str(file.path)]}
        facts |= {"path": str(file.path), "hf_id": None}
        facts["drawn_from"] = [sha256[str(other.path)] for other in files if other.part == file.part] if file.part.sample else None
        facts["before"] = hashes[-1] if hashes and recipe.dedup != "none" else None
        hashes.append(manifest.sha256_json({"recipe": values, "file": facts}))
    return hashes


def _checked(source: SourceConfig, source_shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return a source's shards.

    Raises: InputError where there is nothing to train on, or nothing in the files held out.
    """
    has = {split for shard in source_shards for split in shard.pairs()}
    paths = [path for part in sources.parts(source) for path in part.path]
    left_out = sum((Counter(shard.left_out) for shard in source_shards), Counter())
    fix = f"left out: {', '.join(f'{name} {count}' for name, count in left_out.items())}" if left_out else ""
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
    if num_bad := sum(shard.bad_records for shard in source_shards):
        log.get().warning("source %s: %d bad records skipped", source.name, num_bad)
    return tuple(source_shards)
