"""`prism prepare CONFIG`: weighted sources become Megatron .bin/.idx files, a planned blend and a manifest.

It reads records and writes `out`: SOURCE/00000.train.bin/.idx and so on, one shard per piece that is read, and manifest.json. All files are
written in `out`.partial, which is renamed to `out` at the end, so `out` is whole or absent. An interrupted run resumes from its finished
shards. `run_task` makes a part of the shards, beside other tasks; `run` then takes them up.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_prism.core import log, manifest
from megatron_prism.core.check.data import check_prepare
from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem, printable, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.data import formats, indexed, mixture, segments, tokenizer
from megatron_prism.prepare import documents, download, pool, records, sources, workspace
from megatron_prism.prepare.inputs import Inputs, Orders
from megatron_prism.prepare.source import Prepared, make_shards, make_task, needed_tokens, pack_shards, read_order, reading
from megatron_prism.prepare.work import Work
from megatron_prism.report import blend, sample_page

if TYPE_CHECKING:
    from rich.progress import Progress

NOT_IN_RESULT = ("out", "num_workers", "tokenizer_backend", "reuse")  # config keys that do not change the prepared bytes
OF_READING = (
    "tokens",
    "margin",
    "read",
    "max_epochs",
    "packing",
)  # that do not change a shard, but how many there are and what is made of them
NUM_SAMPLES, SAMPLE_TOKENS, SHOWN_CHARS = 3, 1000, 300  # of a report: documents per source; tokens and characters per document
NUM_NAMED = 10  # of the files that changed, in the message
FOR_THE_READER = ("hf_id", "hf_files", "available_tokens", "domain")  # keys of a source that do not change them either


def run(config: PrepareConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Prepare a mixture and return its manifest, each source with its part of the blend. A dry run writes nothing.

    Raises: InputError for a wrong config, tokenizer or record. EnvironmentFault for a full disk or a dead worker.
    """
    raise_problems([*check_prepare(config), *_check_parts(config)])
    if dry_run:
        return _shown(_dry_run(config))
    orders, spec = _orders(config), _tokenizer(config)
    with pool.workers(config.num_workers) as run_in_order:
        inputs = Inputs(config, orders, spec, run_in_order)
        if config.out.exists() and (existing := _already_prepared(config, inputs)):
            log.get().info("%s: already prepared from the same config and files", config.out)
            return _shown(_result(existing))
        with workspace.folder(config.out) as folder, log.told(_progress()) as progress:
            work = Work(config, folder, run_in_order, progress, inputs.sha256, config.reuse)
            made = {source.name: make_shards(source, orders[source.name], spec, work) for source in config.sources}
            facts = [
                _facts(source, done := made[source.name], pack_shards(source, done.shards, work), config.special_tokens_in_text)
                for source in config.sources
            ]
            described = _describe(config, spec, facts, inputs.of(made))
            manifest.write_json(folder / "manifest.json", described)
            num_tables = {source.name: made[source.name].num_whole if sources.dedup(source) != "none" else 0 for source in config.sources}
            workspace.tidy(folder, {name: len(done.shards) for name, done in made.items()}, num_tables)
    return _shown(_result(described))


def run_task(config: PrepareConfig, task: int, num_tasks: int) -> dict[str, Any]:
    """Make the shards of one of several tasks, which may run at the same time on one file system. `run` then finishes the mixture.

    Raises: as `run`, and InputError for a task that is not one of num_tasks.
    """
    raise_problems([*check_prepare(config), *_check_parts(config)])
    if not 0 <= task < num_tasks:
        raise InputError(Problem("--task", f"{task}/{num_tasks}", f"I/N, with I from 0 to N - 1 = {num_tasks - 1}"))
    if config.out.exists() and _existing(config):
        log.get().info("%s: already prepared", config.out)
        return {"kind": "task", "task": task, "num_tasks": num_tasks, "shards": {}}
    orders, spec = _orders(config), _tokenizer(config)
    with pool.workers(config.num_workers) as run_in_order:
        inputs = Inputs(config, orders, spec, run_in_order, is_task=True)
        with workspace.of_task(config.out, task) as folder, log.told(_progress()) as progress:
            work = Work(config, folder, run_in_order, progress, inputs.sha256, config.reuse)
            made = {source.name: make_task(source, orders[source.name], spec, work, task, num_tasks) for source in config.sources}
    return {"kind": "task", "task": task, "num_tasks": num_tasks, "shards": made}


def _orders(config: PrepareConfig) -> Orders:
    files = sources.find(config.sources)
    if config.reuse:
        mixture.read_prepared(config.reuse)  # a damaged mixture, or none, is refused before any work
    return {source.name: read_order(config, source, inputs) for source, inputs in zip(config.sources, files, strict=True)}


def _tokenizer(config: PrepareConfig) -> tokenizer.TokenizerSpec:
    spec = tokenizer.load(config.tokenizer, need_eos=config.append_eos, backend=config.tokenizer_backend)
    tokenizer.log_ends(spec)
    if config.decontaminate:
        documents.warn_of_short(config.decontaminate)  # and report problems of the evaluation files before any work
    return spec


def report(config: PrepareConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the blend, and show and write sample documents, if any, into out/report. A dry run writes into `out`.plan.

    Raises: BackendMissing without matplotlib. EnvironmentFault where the folder cannot be written.
    """
    is_plan = result["kind"] == "plan"
    folder = config.out.with_name(f"{config.out.name}.plan") if is_plan else config.out / "report"
    domains = {source.name: source.domain for source in config.sources}
    drawn = [
        blend.BlendPart(part["name"], domains[part["name"]], part["share"], part["tokens"], part["epochs"])
        for part in result["blend"]["sources"]
    ]
    samples = {} if is_plan else _samples(config)
    try:
        paths = blend.draw(drawn, config.out.name, folder)
        if samples:
            paths.append(sample_page.write(samples, folder))
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or folder}: {error.strerror or error}") from error
    _show_samples(samples)
    return {"report": [str(path) for path in paths]}


def _samples(config: PrepareConfig) -> dict[str, list[str]]:
    """Return a few documents of each source, evenly spaced, decoded from their tokens as the model will read them."""
    spec, by_source = tokenizer.load(config.tokenizer, need_eos=False), {}
    for source in mixture.read_prepared(config.out).sources:
        reader = indexed.Reader(source.train.prefixes)
        chosen = {reader.num_documents * number // NUM_SAMPLES for number in range(NUM_SAMPLES)}
        starts = [(reader.start(document), reader.start(document + 1)) for document in sorted(chosen)]
        by_source[source.name] = [tokenizer.decode(reader.tokens(start, min(end - start, SAMPLE_TOKENS)), spec) for start, end in starts]
    return by_source


def _show_samples(samples: Mapping[str, Sequence[str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    for name, texts in samples.items():
        for text in texts:
            shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ..."
            console.rule(Text(name), align="left")
            console.print(Text(printable(shown, keep="\n")))


def _check_parts(config: PrepareConfig) -> list[Problem]:
    of_sources = [
        (part, f"sources.{index}" + (f".parts.{number}" if source.parts else ""))
        for index, source in enumerate(config.sources)
        for number, part in enumerate(sources.parts(source))
    ]
    against = config.decontaminate.against if config.decontaminate else ()
    of_evaluation = [(part, f"decontaminate.against.{index}") for index, part in enumerate(against)]
    return [problem for part, where in (*of_sources, *of_evaluation) for problem in records.check_part(part, where)]


def _dry_run(config: PrepareConfig) -> dict[str, Any]:
    """Return the blend that the config alone decides. The true size of a source is known only after tokenizing."""
    weights = {source.name: source.weight for source in config.sources}
    available = {source.name: source.available_tokens for source in config.sources if source.available_tokens is not None}
    if config.tokens is None:
        unknown = {"tokens": None, "epochs": None}
        planned = [{"name": name, "weight": weight, "share": weight / 100, **unknown} for name, weight in weights.items()]
    else:
        plan = mixture.plan(weights, available, config.tokens)
        raise_problems(segments.check_epochs(plan, config.max_epochs, "max_epochs"))
        planned = [dataclasses.asdict(part) for part in plan]
    lines = [dataclasses.asdict(line) for line in download.downloads(config, needed_tokens(config))]
    blend = {"tokens": config.tokens, "sources": planned}
    return {"kind": "plan", "blend": blend, "sources": planned, "downloads": lines, "config": to_dict(config)}


def _describe(
    config: PrepareConfig, spec: tokenizer.TokenizerSpec, facts: Sequence[dict[str, Any]], sha256: Mapping[str, str]
) -> dict[str, Any]:
    """Return the manifest.

    Raises: InputError where the budget reads a source for more epochs than allowed.
    """
    available = {
        fact["name"]: held["num_sequences"] * held["seq_length"] if (held := fact["packing"]) else fact["train_tokens"] for fact in facts
    }
    planned = mixture.plan({source.name: source.weight for source in config.sources}, available, config.tokens)
    raise_problems(segments.check_epochs(planned, config.max_epochs, "max_epochs"))
    return manifest.describe(
        "prepared",
        sha256,
        tokenizer={
            "path": str(spec.folder),
            "sha256": spec.sha256,
            "vocab_size": spec.vocab_size,
            "eos_id": spec.eos_id,
            "end_ids": {name: list(ids) for name, ids in spec.ends},  # by the file that names them
        },
        sources=facts,
        blend={"tokens": sum(part.tokens for part in planned), "sources": [dataclasses.asdict(part) for part in planned]},
        config=to_dict(config),
        decontaminate=documents.searched(config.decontaminate) if config.decontaminate else None,
        config_sha256=_config_sha256(config),
    )


def _facts(source: SourceConfig, done: Prepared, packing: Mapping[str, Any], in_text: str) -> dict[str, Any]:
    """Return a source's entry in the manifest."""
    source_shards = done.shards
    totals = {
        f"{split}_{unit}": sum(getattr(pair, f"num_{unit}") for shard in source_shards if (pair := shard.pairs().get(split)))
        for split in formats.SPLITS
        for unit in ("tokens", "documents")
    }
    left_out: Counter[str] = sum((Counter(shard.left_out) for shard in source_shards), Counter())
    spelled = {unit: sum(shard.special_tokens_in_text.get(unit, 0) for shard in source_shards) for unit in ("texts", "tokens")}
    if spelled["texts"]:
        message = "source %s: %d texts spell %d special tokens (special_tokens_in_text: %s)"
        log.get().warning(message, source.name, spelled["texts"], spelled["tokens"], in_text)
    return {
        "name": source.name,
        "weight": source.weight,
        **totals,
        "left_out": dict(left_out),
        "bad_records": sum(shard.bad_records for shard in source_shards),
        "reading": reading(done),
        "special_tokens_in_text": spelled,
        "shards": [to_dict(shard) for shard in source_shards],
        **packing,
    }


def _existing(config: PrepareConfig) -> Mapping[str, Any] | None:
    """Return the manifest of an `out` that was prepared from the same config, None for an empty folder.

    Raises: InputError where `out` holds anything else.
    """
    if config.out.is_dir() and not any(config.out.iterdir()):
        return None
    where, fix = f"out ({config.out})", "choose another out, or remove this one"
    if not (config.out / "manifest.json").is_file():
        raise InputError(Problem(where, "files that prepare did not write", "no folder, or an empty one", fix))
    mixture.read_prepared(config.out)  # a damaged mixture is refused, by file
    existing = manifest.read_json(config.out / "manifest.json")
    if existing.get("config_sha256") != _config_sha256(config):
        if _shards_sha256(existing["config"]) == _shards_sha256(to_dict(config)):
            fix = f"choose another out, with reuse={config.out}: only what it lacks is then made"
        raise InputError(Problem(where, "a mixture prepared from another config", "the same config", fix))
    if not documents.has_these_words(existing):
        raise InputError(Problem(where, "a mixture decontaminated by an earlier rule of words", "today's words", fix))
    return existing


def _already_prepared(config: PrepareConfig, inputs: Inputs) -> Mapping[str, Any] | None:
    """Return the manifest of an `out` that already holds exactly what this run would write, None for an empty folder.

    Raises: InputError where `out` holds anything else.
    """
    existing = _existing(config)
    if existing and (changed := inputs.changed(existing)):
        files = ", ".join(changed[:NUM_NAMED]) + (f" and {len(changed) - NUM_NAMED} more" if len(changed) > NUM_NAMED else "")
        found, fix = f"a mixture prepared before {files} changed", "choose another out, or remove this one"
        raise InputError(Problem(f"out ({config.out})", found, "the same input files", fix))
    return existing


def _config_sha256(config: PrepareConfig) -> str:
    values = {key: value for key, value in to_dict(config).items() if key not in NOT_IN_RESULT}
    if config.tokens is None or config.read == "all":  # as before there were these keys, so that a mixture prepared then is known
        values = {key: value for key, value in values.items() if key not in ("read", "margin")}
    if config.max_record_bytes == PrepareConfig.max_record_bytes:
        del values["max_record_bytes"]
    return _without_words(values)


def _shards_sha256(values: Mapping[str, Any]) -> str:
    """Return a hash of a config's keys that decide what a shard holds: not how many there are, nor the weights."""
    kept = {key: value for key, value in values.items() if key not in (*NOT_IN_RESULT, *OF_READING)}
    return _without_words(kept | {"sources": [{**source, "weight": None} for source in values["sources"]]})


def _without_words(values: Mapping[str, Any]) -> str:
    """Return the hash of a config, without its keys for the reader."""

    def without(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key not in FOR_THE_READER}

    listed = [without(source) | {"parts": [without(part) for part in source["parts"]]} for source in values["sources"]]
    return manifest.sha256_json({**values, "sources": listed})


def _result(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with each source's part of the blend merged into its entry."""
    planned = described["blend"]["sources"]
    return {**described, "sources": [{**source, **part} for source, part in zip(described["sources"], planned, strict=True)]}


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """Show the blend on standard error and return the result."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    tokens = result["blend"]["tokens"]
    said = f"{result['config']['out']}: {tokens:,} training tokens" if tokens else str(result["config"]["out"])
    table = Table(title=Text(said))  # a path or a name may hold brackets, which rich would read as its markup
    is_packed = any(row.get("packing") for row in result["sources"])
    headers = ("source", "documents", "tokens", "weight %", "share %", "budget", "epochs", *(["packed %"] if is_packed else []))
    for header in headers:
        table.add_column(header, justify="left" if header == "source" else "right")
    for row in result["sources"]:
        counts = [_number(row.get("train_documents")), _number(row.get("train_tokens"))]
        epochs = "-" if row["epochs"] is None else f"{row['epochs']:.4f}"
        efficiency = [f"{100 * row['packing']['efficiency']:.2f}"] if is_packed else []
        table.add_row(
            Text(row["name"]), *counts, f"{row['weight']:g}", f"{row['share'] * 100:.4f}", _number(row["tokens"]), epochs, *efficiency
        )
    Console(stderr=True, width=None if sys.stderr.isatty() else 120).print(table)  # a log file is not limited to 80 columns
    for row in result["sources"]:
        reasons = {**row.get("left_out", {}), "bad": row.get("bad_records", 0)}
        if left := ", ".join(f"{reason} {count:,}" for reason, count in reasons.items() if count):
            log.get().info("source %s: records left out: %s", row["name"], left)
    return result


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
