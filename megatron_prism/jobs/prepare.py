"""`prism prepare CONFIG`: weighted sources become Megatron .bin/.idx files, a planned blend and a manifest.

Reads records, writes `out`: SOURCE/00000.train.bin/.idx and so on, a shard for each file read, and manifest.json. All of it is written in
`out`.partial, which becomes `out` at the end: `out` is whole or not there. A run that ended early goes on from the shards it finished.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core import log, manifest
from megatron_prism.core.check_data import check_prepare
from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.data import (
    dedup,
    documents,
    indexed,
    mixture,
    packed,
    packing,
    partial,
    pool,
    sample,
    segments,
    shards,
    sources,
    texts,
    tokenize,
)
from megatron_prism.data.documents import Made, Recipe
from megatron_prism.data.shards import Shard
from megatron_prism.data.sources import Input, Watched

if TYPE_CHECKING:
    from rich.progress import Progress

NOT_IN_RESULT = ("out", "num_workers")  # config keys that leave the prepared bytes as they are
FOR_THE_READER = ("hf_id", "available_tokens", "domain")  # keys of a source that do too
SHOWN = 20  # bad records named at once


@dataclasses.dataclass(frozen=True)
class _Work:
    """What preparing any source needs: where to write, the processes, the progress, the hashes of all files read."""

    config: PrepareConfig
    folder: Path
    run: pool.Map
    progress: Progress
    sha256: Mapping[str, str]


def run(config: PrepareConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Prepare a mixture and return its manifest, each source with its part of the blend; a dry run writes nothing.

    Raises: InputError for a wrong config, tokenizer or record; EnvironmentFault for a full disk or a dead worker.
    """
    raise_problems([*check_prepare(config), *_check_parts(config)])
    if dry_run:
        return _shown(_dry_run(config))
    files = sources.find(config.sources)
    spec = tokenize.load(config.tokenizer, need_eos=config.append_eos)
    evaluation = documents.evaluation_files(config.decontaminate) if config.decontaminate else ()
    if config.decontaminate:
        documents.evaluation_overlap(config.decontaminate)  # what is wrong with these files is told now
    with pool.workers(config.num_workers) as run_in_order:
        paths = [*_tokenizer_files(spec), *dict.fromkeys(file.path for part in (*files, evaluation) for file in part)]
        sha256 = dict(zip(map(str, paths), run_in_order(manifest.sha256_file, paths), strict=True))
        if config.out.exists() and (found := _already_prepared(config, sha256)):
            log.get().info("%s: already prepared from the same config and files", config.out)
            return _shown(_result(found))
        with partial.folder(config.out) as folder, _progress() as progress:
            work = _Work(config, folder, run_in_order, progress, sha256)
            made = [_prepare(source, found, spec, work) for source, found in zip(config.sources, files, strict=True)]
            facts = [_facts(source, found, _pack(source, found, config, folder)) for source, found in zip(config.sources, made, strict=True)]
            described = _describe(config, spec, facts, sha256)
            manifest.write_json(folder / "manifest.json", described)
            partial.tidy(folder, {source.name: len(found) for source, found in zip(config.sources, made, strict=True)})
    return _shown(_result(described))


def _check_parts(config: PrepareConfig) -> list[Problem]:
    of_sources = [(part, f"sources.{index}" + (f".parts.{number}" if source.parts else ""))
                  for index, source in enumerate(config.sources) for number, part in enumerate(sources.parts(source))]
    against = config.decontaminate.against if config.decontaminate else ()
    of_evaluation = [(part, f"decontaminate.against.{index}") for index, part in enumerate(against)]
    return [problem for part, where in (*of_sources, *of_evaluation) for problem in texts.check_part(part, where)]


def _dry_run(config: PrepareConfig) -> dict[str, Any]:
    """Return the blend that the config alone decides; what a source has is known only once it is tokenized."""
    weights = {source.name: source.weight for source in config.sources}
    available = {source.name: source.available_tokens for source in config.sources if source.available_tokens is not None}
    if config.tokens is None:
        unknown = {"tokens": None, "epochs": None}
        blend = [{"name": name, "weight": weight, "share": weight / 100, **unknown} for name, weight in weights.items()]
    else:
        plan = mixture.plan(weights, available, config.tokens)
        raise_problems(segments.check_epochs(plan, config.max_epochs, "max_epochs"))
        blend = [dataclasses.asdict(part) for part in plan]
    return {"kind": "plan", "blend": {"tokens": config.tokens, "sources": blend}, "sources": blend, "config": to_dict(config)}


def _prepare(source: SourceConfig, files: Sequence[Input], spec: tokenize.TokenizerSpec, work: _Work) -> tuple[Shard, ...]:
    """Write one source's shards, those that stand already excepted.

    Raises: InputError where a record is bad and none may be, or there is nothing to train on.
    """
    config, folder = work.config, work.folder / source.name
    recipe = Recipe(source.name, spec, config.append_eos, source.min_tokens, sources.dedup(source), source.valid_percent, config.seed,
                    config.decontaminate if source.decontaminate else None)
    made_from = _made_from(recipe, files, work.sha256)
    found = [shards.read(folder, number, made_from[number]) for number in range(len(files))]
    if all(found):
        return _checked(source, [shard for shard in found if shard])
    to_read = [file for file, shard in zip(_drawn(recipe, files, work), found, strict=True) if shard is None]
    made = work.run(documents.make, documents.batches(to_read, recipe, _watched(source.name, to_read, work)))
    good = _without_bad(made, source, config)
    seen = None if recipe.dedup == "none" else dedup.Seen(recipe.dedup)
    for number, shard in enumerate(found):
        if shard is None:
            found[number] = shards.write(folder, number, made_from[number], documents.of_one_file(good), seen, indexed.token_dtype(spec.vocab_size))
        elif seen:
            seen.add(shards.keys(folder, number))
    return _checked(source, [shard for shard in found if shard])


def _drawn(recipe: Recipe, files: Sequence[Input], work: _Work) -> list[Input]:
    """Return the files with the lots that `sample` draws: a pass over the files of each part that is sampled.

    Raises: InputError naming each group that has fewer texts than are wanted.
    """
    drawn = list(files)
    problems = []
    for part in [file.part for index, file in enumerate(files) if file.part.sample and file.part not in [other.part for other in files[:index]]]:
        assert part.sample is not None
        mine = [index for index, file in enumerate(files) if file.part == part]
        to_read = [files[index] for index in mine]
        draw = sample.Draw(part.sample.counts)
        for lots in work.run(documents.lots, documents.batches(to_read, recipe, _watched(f"{recipe.source} (lots)", to_read, work))):
            for group, lot in lots:
                draw.add(group, lot)
        problems += [Problem(f"sources.{recipe.source}.sample.counts.{group}", f"{count} different texts", f"{part.sample.counts[group]}")
                     for group, count in draw.short().items()]
        for index in mine:
            drawn[index] = dataclasses.replace(files[index], limits=draw.limits())
    raise_problems(problems)
    return drawn


def _watched(title: str, files: Sequence[Input], work: _Work) -> sources.OpenFile:
    """Return what opens files so that a bar shows how much of them is read."""
    task = work.progress.add_task(title, total=sum(file.path.stat().st_size for file in files))
    return Watched.opener(lambda count: work.progress.advance(task, count))


def _without_bad(made: Iterable[Made], source: SourceConfig, config: PrepareConfig) -> Iterator[Made]:
    """Yield what was made as long as no bad record is found, or all of it where they are skipped."""
    is_first = True
    for part in made:
        if part.bad and config.on_bad_record == "error":
            raise InputError(part.bad[:SHOWN])
        if part.bad and is_first:
            log.get().warning("source %s: first record skipped: %s", source.name, part.bad[0])
            is_first = False
        yield part


def _made_from(recipe: Recipe, files: Sequence[Input], sha256: Mapping[str, str]) -> list[str]:
    """Return for each file a hash of all that its shard depends on.

    Where equal documents are dropped, that is the files before it too; where texts are drawn by lot, all files of the part.
    """
    values = dataclasses.asdict(recipe) | {"tokenizer": recipe.tokenizer.sha256, "eos_id": recipe.tokenizer.eos_id}
    if recipe.decontaminate:
        values["decontaminate"] |= {"against": [sha256[str(file.path)] for file in documents.evaluation_files(recipe.decontaminate)]}
    found: list[str] = []
    for file in files:
        facts = {**dataclasses.asdict(file.part), "is_held_out": file.is_held_out, "sha256": sha256[str(file.path)]}
        facts |= {"path": str(file.path), "hf_id": None}
        facts["drawn_from"] = [sha256[str(other.path)] for other in files if other.part == file.part] if file.part.sample else None
        facts["before"] = found[-1] if found and recipe.dedup != "none" else None
        found.append(manifest.sha256_json({"recipe": values, "file": facts}))
    return found


def _checked(source: SourceConfig, found: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return a source's shards.

    Raises: InputError where there is nothing to train on, or nothing in the files held out.
    """
    has = {split for shard in found for split in shard.pairs()}
    paths = [path for part in sources.parts(source) for path in part.path]
    left_out = sum((Counter(shard.left_out) for shard in found), Counter())
    fix = f"left out: {', '.join(f'{name} {count}' for name, count in left_out.items())}" if left_out else ""
    if "train" not in has:
        raise InputError(Problem(f"sources.{source.name}.path", f"no train document in {', '.join(paths)}", "at least one document", fix))
    if source.valid_path and "valid" not in has:
        raise InputError(Problem(f"sources.{source.name}.valid_path", f"no valid document in {', '.join(source.valid_path)}", "at least one document", fix))
    if source.valid_percent and "valid" not in has:
        log.get().warning("source %s: valid_percent %g holds out none of its documents", source.name, source.valid_percent)
    if num_bad := sum(shard.bad_records for shard in found):
        log.get().warning("source %s: %d bad records skipped", source.name, num_bad)
    return tuple(found)


def _pack(source: SourceConfig, found: Sequence[Shard], config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Pack a source's training documents, where that is asked for, and return the manifest's part of it."""
    if config.packing is None:
        return {"packing": None, "packing_files": {}}
    prefixes = [shards.prefix(folder / source.name, shard.number, "train") for shard in found if shard.train]
    made = packing.pack(indexed.Reader(prefixes).lengths(), config.packing.seq_length, config.packing.overlap)
    prefix = packed.prefix(folder / source.name)
    packed.save(made, prefix)
    files = {path.name: shards.written(path) for path in (packed.pieces_path(prefix), packed.bins_path(prefix))}
    held = mixture.Packing(made.seq_length, made.num_bins, made.efficiency)
    return {"packing": dataclasses.asdict(held), "packing_files": {name: dataclasses.asdict(file) for name, file in files.items()}}


def _describe(config: PrepareConfig, spec: tokenize.TokenizerSpec, facts: Sequence[dict[str, Any]], sha256: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest.

    Raises: InputError where the budget reads a source more often than it may.
    """
    available = {fact["name"]: held["num_sequences"] * held["seq_length"] if (held := fact["packing"]) else fact["train_tokens"] for fact in facts}
    blend = mixture.plan({source.name: source.weight for source in config.sources}, available, config.tokens)
    raise_problems(segments.check_epochs(blend, config.max_epochs, "max_epochs"))
    return manifest.describe(
        "prepared", sha256,
        tokenizer={"path": str(spec.folder), "sha256": spec.sha256, "vocab_size": spec.vocab_size, "eos_id": spec.eos_id},
        sources=facts,
        blend={"tokens": sum(part.tokens for part in blend), "sources": [dataclasses.asdict(part) for part in blend]},
        config=to_dict(config),
        config_sha256=_config_sha256(config),
    )  # fmt: skip


def _facts(source: SourceConfig, found: Sequence[Shard], packing: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source's part of the manifest."""
    totals = {f"{split}_{unit}": sum(getattr(pair, f"num_{unit}") for shard in found if (pair := shard.pairs().get(split)))
              for split in shards.SPLITS for unit in ("tokens", "documents")}
    left_out: Counter[str] = sum((Counter(shard.left_out) for shard in found), Counter())
    return {"name": source.name, "weight": source.weight, **totals, "left_out": dict(left_out),
            "bad_records": sum(shard.bad_records for shard in found), "shards": [to_dict(shard) for shard in found], **packing}  # fmt: skip


def _already_prepared(config: PrepareConfig, sha256: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the manifest of an `out` that holds just what this run would write, None for an empty folder.

    Raises: InputError where `out` holds anything else.
    """
    if config.out.is_dir() and not any(config.out.iterdir()):
        return None
    where, fix = f"out ({config.out})", "choose another out, or remove this one"
    if not (config.out / "manifest.json").is_file():
        raise InputError(Problem(where, "files that prepare did not write", "no folder, or an empty one", fix))
    mixture.read_prepared(config.out)  # a damaged mixture is refused, by file
    found = manifest.read_json(config.out / "manifest.json")
    if found.get("config_sha256") != _config_sha256(config):
        raise InputError(Problem(where, "a mixture prepared from another config", "the same config", fix))
    if changed := sorted(path for path in {**sha256, **found["inputs"]} if sha256.get(path) != found["inputs"].get(path)):
        raise InputError(Problem(where, f"a mixture prepared before {', '.join(changed)} changed", "the same input files", fix))
    return found


def _config_sha256(config: PrepareConfig) -> str:
    values = {key: value for key, value in to_dict(config).items() if key not in NOT_IN_RESULT}
    for source in values["sources"]:
        for part in (source, *source["parts"]):
            for key in FOR_THE_READER:
                part.pop(key, None)
    return manifest.sha256_json(values)


def _tokenizer_files(spec: tokenize.TokenizerSpec) -> list[Path]:
    return [path for name in ("tokenizer.json", *tokenize.SPECIAL_FILES) if (path := spec.folder / name).is_file()]


def _result(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest whose sources carry their part of the blend too."""
    blend = described["blend"]["sources"]
    return {**described, "sources": [{**source, **part} for source, part in zip(described["sources"], blend, strict=True)]}


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """Show the blend on standard error and return the result."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['config']['out']}: {result['blend']['tokens'] or 'as many'} training tokens")
    is_packed = any(row.get("packing") for row in result["sources"])
    headers = ("source", "documents", "tokens", "weight %", "share %", "budget", "epochs", *(["packed %"] if is_packed else []))
    for header in headers:
        table.add_column(header, justify="left" if header == "source" else "right")
    for row in result["sources"]:
        found = [_number(row.get("train_documents")), _number(row.get("train_tokens"))]
        epochs = "-" if row["epochs"] is None else f"{row['epochs']:.4f}"
        efficiency = [f"{100 * row['packing']['efficiency']:.2f}"] if is_packed else []
        table.add_row(row["name"], *found, f"{row['weight']:g}", f"{row['share'] * 100:.4f}", _number(row["tokens"]), epochs, *efficiency)
    console = Console(stderr=True)
    console.print(table, width=None if console.is_terminal else 120)  # a log file need not be 80 columns wide
    return result


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
