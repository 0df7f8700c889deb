"""`prism prepare CONFIG`: weighted sources become Megatron .bin/.idx files, a planned blend and a manifest.

Reads text, writes `out`: <source>.train.bin/.idx, <source>.valid.bin/.idx where documents are held out, manifest.json.
All of it is written beside `out` and renamed at the end, so `out` is whole or not there.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core import log, manifest
from megatron_prism.core.check import check_prepare
from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.data import indexed, mixture, sources, tokenize

if TYPE_CHECKING:
    from rich.progress import Progress

SPLITS: tuple[sources.Split, ...] = ("train", "valid")
NOT_IN_RESULT = ("out", "num_workers")  # config keys that leave the prepared bytes as they are
FOR_THE_READER = ("hf_id", "available_tokens")  # keys of a source that do too


def run(config: PrepareConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Prepare a mixture and return its manifest, each source with its part of the blend; a dry run writes nothing.

    Raises: InputError for a wrong config, tokenizer or document; EnvironmentFault for a full disk or a dead worker.
    """
    raise_problems(check_prepare(config))
    if dry_run:
        return _shown(_dry_run(config))
    files = sources.find(config.sources)
    spec = tokenize.load(config.tokenizer, need_eos=config.append_eos)
    inputs = [*_tokenizer_files(spec), *dict.fromkeys(path for source in files for path in source.train + source.valid)]
    if config.out.exists() and (found := _already_prepared(config, inputs)):
        log.get().info("%s: already prepared from the same config and files", config.out)
        return _shown(_result(found))
    with _work_folder(config.out) as work:
        with _progress() as progress:
            facts = [_prepare(source, found, spec, config, work, progress) for source, found in zip(config.sources, files, strict=True)]
        blend = mixture.plan({source.name: source.weight for source in config.sources},
                             {fact["name"]: fact["train_tokens"] for fact in facts}, config.tokens)
        described = manifest.describe(
            "prepared", inputs,
            tokenizer={"path": str(spec.folder), "sha256": spec.sha256, "vocab_size": spec.vocab_size, "eos_id": spec.eos_id},
            sources=facts,
            blend={"tokens": sum(part.tokens for part in blend), "sources": [dataclasses.asdict(part) for part in blend]},
            config=to_dict(config),
            config_sha256=_config_sha256(config),
        )
        manifest.write_json(work / "manifest.json", described)
    return _shown(_result(described))


def _dry_run(config: PrepareConfig) -> dict[str, Any]:
    """Return the blend that the config alone decides; what a source has is known only once it is tokenized."""
    weights = {source.name: source.weight for source in config.sources}
    available = {source.name: source.available_tokens for source in config.sources if source.available_tokens is not None}
    if config.tokens is None:
        unknown = {"tokens": None, "epochs": None}
        blend = [{"name": name, "weight": weight, "share": weight / 100, **unknown} for name, weight in weights.items()]
    else:
        blend = [dataclasses.asdict(part) for part in mixture.plan(weights, available, config.tokens)]
    return {"kind": "plan", "blend": {"tokens": config.tokens, "sources": blend}, "sources": blend, "config": to_dict(config)}


def _prepare(source: SourceConfig, files: sources.SourceFiles, spec: tokenize.TokenizerSpec, config: PrepareConfig, work: Path,
             progress: Progress) -> dict[str, Any]:
    """Tokenize one source into `work` and return its part of the manifest."""
    num_skipped = 0

    def on_bad(problem: Problem) -> None:
        nonlocal num_skipped
        if config.on_bad_record == "error":
            raise InputError(problem)
        if not num_skipped:
            log.get().warning("source %s: first record skipped: %s", source.name, problem)
        num_skipped += 1

    total_bytes = sum(path.stat().st_size for path in files.train + files.valid)
    task = progress.add_task(source.name, total=total_bytes)

    def open_file(path: Path) -> io.BufferedReader:
        return io.BufferedReader(_Watched(path, lambda count: progress.advance(task, count)), sources.BLOCK_BYTES)

    documents = sources.read(source, files, on_bad, open_file)
    dtype = indexed.token_dtype(spec.vocab_size)
    writers: dict[str, indexed.Writer] = {}
    with ExitStack() as stack:
        encoded = stack.enter_context(closing(tokenize.encode(documents, spec, config.append_eos, config.num_workers)))
        for part in encoded:
            if part.split not in writers:
                writers[part.split] = stack.enter_context(indexed.Writer(work / f"{source.name}.{part.split}", dtype))
            writers[part.split].add(part.tokens, part.lengths)
    if num_skipped:
        log.get().warning("source %s: %d bad records skipped", source.name, num_skipped)
    return {"name": source.name, "weight": source.weight, **_facts(source, work), "skipped_records": num_skipped}


class _Watched(io.FileIO):
    """A file that reports the bytes read, its size in all: a columnar reader skips some bytes and comes back to others."""

    def __init__(self, path: Path, advance: Callable[[int], None]):
        super().__init__(path)
        self._advance, self._left = advance, path.stat().st_size

    def readinto(self, buffer: Any) -> int:
        return self._count(super().readinto(buffer) or 0)

    def readall(self) -> bytes:
        data = super().readall()
        self._count(len(data))
        return data

    def close(self) -> None:
        if not self.closed:
            self._count(self._left)
        super().close()

    def _count(self, count: int) -> int:
        step = min(count, self._left)
        self._left -= step
        self._advance(step)
        return count


def _facts(source: SourceConfig, work: Path) -> dict[str, Any]:
    """Return what the written pairs of a source hold, verified.

    Raises: InputError where there is nothing to train on, or nothing in the files held out.
    """
    facts: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    for split in SPLITS:
        prefix = work / f"{source.name}.{split}"
        written = indexed.bin_path(prefix).exists()
        shard = indexed.verify(prefix) if written else indexed.Shard(0, 0, indexed.token_dtype(0))
        if not shard.num_tokens and (split == "train" or source.valid_path):
            key, paths = ("path", source.path) if split == "train" else ("valid_path", source.valid_path)
            raise InputError(Problem(f"sources.{source.name}.{key}", f"no {split} document in {', '.join(paths)}", "at least one document"))
        if not shard.num_tokens and source.valid_percent:
            log.get().warning("source %s: valid_percent %g holds out none of its documents", source.name, source.valid_percent)
        for path in (indexed.bin_path(prefix), indexed.idx_path(prefix)) if written else ():
            recorded[path.name] = {"size_bytes": path.stat().st_size, "sha256": manifest.sha256_file(path)}
        facts[f"{split}_prefix"] = prefix.name if written else None
        facts |= {f"{split}_tokens": shard.num_tokens, f"{split}_documents": shard.num_documents}
    return {**facts, "files": recorded}


def _already_prepared(config: PrepareConfig, inputs: Sequence[Path]) -> Mapping[str, Any] | None:
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
    now = {str(path): manifest.sha256_file(path) for path in inputs}
    if changed := sorted(path for path in now | found["inputs"] if now.get(path) != found["inputs"].get(path)):
        raise InputError(Problem(where, f"a mixture prepared before {', '.join(changed)} changed", "the same input files", fix))
    return found


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` on a clean exit and goes away on any other.

    Raises: EnvironmentFault where the disk is full or cannot be written.
    """
    out = out.absolute()
    prefix = f"{out.name}.tmp-{socket.gethostname()}-"
    work = out.with_name(f"{prefix}{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{glob.escape(prefix)}*"):  # of a run that was killed on this machine
            pid = left.name.removeprefix(prefix)
            if pid.isdigit() and (left == work or not Path("/proc", pid).exists()):
                shutil.rmtree(left)
        work.mkdir()
        yield work
        work.rename(out)
    except OSError as error:  # readers raise InputError: what is left is writing
        raise EnvironmentFault(f"{error.filename or work}: {error.strerror or error}; nothing was written to {out}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _config_sha256(config: PrepareConfig) -> str:
    values = {key: value for key, value in to_dict(config).items() if key not in NOT_IN_RESULT}
    values["sources"] = [{key: value for key, value in source.items() if key not in FOR_THE_READER} for source in values["sources"]]
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
    for header in ("source", "documents", "tokens", "weight %", "share %", "budget", "epochs"):
        table.add_column(header, justify="left" if header == "source" else "right")
    for row in result["sources"]:
        found = [_number(row.get("train_documents")), _number(row.get("train_tokens"))]
        epochs = "-" if row["epochs"] is None else f"{row['epochs']:.4f}"
        table.add_row(row["name"], *found, f"{row['weight']:g}", f"{row['share'] * 100:.4f}", _number(row["tokens"]), epochs)
    console = Console(stderr=True)
    console.print(table, width=None if console.is_terminal else 120)  # a log file need not be 80 columns wide
    return result


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
