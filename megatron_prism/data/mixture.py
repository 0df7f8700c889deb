"""Plan a weighted mixture, and read back one that `prism prepare` wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import build
from megatron_prism.core.manifest import read_json, sha256_json
from megatron_prism.data import formats, packed
from megatron_prism.data.formats import File, Shard, Split
from megatron_prism.data.indexed import Reader
from megatron_prism.data.packed import PackedReader
from megatron_prism.data.walk import Stream, Walk

FILE = "manifest.json"
MANIFEST = "the manifest of a prepared mixture"
AGAIN = "run prism prepare again"


@dataclass(frozen=True)
class SourcePlan:
    """A source's part of a budget. share: tokens / budget. epochs: tokens / the source's available tokens (None: not known)."""

    name: str
    weight: float
    tokens: int
    share: float
    epochs: float | None


@dataclass(frozen=True)
class Tokens:
    """One split of a prepared source: the prefixes of its .bin/.idx pairs, in order, and their totals."""

    prefixes: tuple[Path, ...]
    num_tokens: int
    num_documents: int


@dataclass(frozen=True)
class Packing:
    """A source's training documents packed into sequences (packed.py). efficiency: the share of tokens that is not padding."""

    seq_length: int
    num_sequences: int
    efficiency: float


@dataclass(frozen=True)
class PreparedSource:
    """One prepared source. valid is None where nothing is held out; packing is None where documents are concatenated.

    unread_share: the share of the source's bytes that prepare did not read, since its budget needed no more. is_last_cut: of the last piece
    it read a part.
    sha256: of the sums of the files that training reads, wherever they lie.
    """

    name: str
    weight: float
    train: Tokens
    valid: Tokens | None
    packing: Packing | None = None
    packing_prefix: Path | None = None
    unread_share: float = 0.0
    is_last_cut: bool = False
    sha256: str = field(kw_only=True)

    @property
    def stream_tokens(self) -> int:
        """Return the tokens of one pass over the training documents, padding included."""
        return self.packing.num_sequences * self.packing.seq_length if self.packing else self.train.num_tokens

    def reader(self, pad_id: int | None) -> Reader | PackedReader:
        """Return the reader of the training tokens, or of the packed sequences."""
        reader = Reader(self.train.prefixes)
        if self.packing is None:
            return reader
        assert self.packing_prefix is not None
        return PackedReader(reader, self.packing_prefix, self.packing.seq_length, pad_id or 0)  # padding is masked, so any id will do


@dataclass(frozen=True)
class Prepared:
    """A prepared mixture, as its manifest.json describes it. sha256: of all that its files hold, wherever they lie, and of its tokenizer."""

    root: Path
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    sources: tuple[PreparedSource, ...]
    sha256: str = field(kw_only=True)

    def source(self, name: str) -> PreparedSource:
        """Return a source by its name."""
        return next(source for source in self.sources if source.name == name)


def plan(weights: Mapping[str, float], available_tokens: Mapping[str, int], budget_tokens: int | None) -> tuple[SourcePlan, ...]:
    """Split a budget over sources by weight. The tokens sum to the budget exactly (largest remainder, ties to the first).

    budget_tokens None means the largest budget for which no source exceeds one epoch. Weights need not sum to 100.
    A source missing from available_tokens has unknown epochs. Without a budget none may be missing.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # 27.5 as written, not as a float holds it
    total = sum(exact.values())
    raise_problems([Problem(name, "0 tokens", "a source with tokens") for name in weights if available_tokens.get(name, 1) < 1])
    if budget_tokens is None:
        budget_tokens = min(int(available_tokens[name] * total / weight) for name, weight in exact.items())
    ideal = {name: budget_tokens * weight / total for name, weight in exact.items()}
    tokens = {name: int(value) for name, value in ideal.items()}
    for name in sorted(ideal, key=lambda name: tokens[name] - ideal[name])[: budget_tokens - sum(tokens.values())]:
        tokens[name] += 1
    epochs = {name: tokens[name] / available_tokens[name] for name in weights if name in available_tokens}
    return tuple(SourcePlan(name, weight, tokens[name], tokens[name] / budget_tokens, epochs.get(name)) for name, weight in weights.items())


def walk(prepared: Prepared, weights: Mapping[str, float], seq_length: int, seed: int) -> Walk:
    """Return the walk of a run through the sources of a prepared mixture that have a weight."""
    tokens = {source.name: source.stream_tokens for source in prepared.sources}
    streams = tuple(Stream(name, weight, tokens[name]) for name, weight in weights.items())
    return Walk(streams, seq_length, seed)


@dataclass(frozen=True)
class _Tokenizer:
    sha256: str
    vocab_size: int
    eos_id: int | None


@dataclass(frozen=True)
class _Reading:
    num_bytes: int
    unread_bytes: int
    is_last_cut: bool = False

    @property
    def unread_share(self) -> float:
        return self.unread_bytes / max(self.num_bytes + self.unread_bytes, 1)


@dataclass(frozen=True)
class _Source:
    name: str
    weight: float
    shards: tuple[Shard, ...]
    packing: Packing | None = None
    packing_files: dict[str, File] = field(default_factory=dict)
    reading: _Reading = _Reading(0, 0)


@dataclass(frozen=True)
class _Manifest:
    """The keys of manifest.json that reading a prepared mixture needs. All others are provenance."""

    kind: Literal["prepared"]
    tokenizer: _Tokenizer
    sources: tuple[_Source, ...]


def read_prepared(path: Path) -> Prepared:
    """Read a prepared mixture, and check that every file of its manifest exists with the recorded size.

    Raises: InputError naming each manifest key that is wrong and each file that is missing or of another size.
    """
    file = path / FILE
    try:
        with disk.reading(file):
            values = read_json(file)
    except OSError as error:
        raise InputError(Problem(str(file), error.strerror or str(error), MANIFEST, "run prism prepare")) from None
    except ValueError as error:
        raise InputError(Problem(str(file), f"no JSON ({error})", MANIFEST, AGAIN)) from None
    manifest = build(values, _Manifest, lambda key: ":".join([str(file), *([".".join(map(str, key))] if key else [])]))
    raise_problems([] if manifest.sources else [Problem(f"{file}:sources", "an empty list", "at least one source", AGAIN)])
    raise_problems([problem for source in manifest.sources for problem in (*_check_figures(file, source), *_check_files(path, source))])
    tokenizer, prepared_sources = manifest.tokenizer, tuple(_prepared(path, source) for source in manifest.sources)
    content = [asdict(tokenizer), *([source.name, _sums(source, "train"), _sums(source, "valid")] for source in manifest.sources)]
    sha256 = sha256_json(content)
    return Prepared(path, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id, prepared_sources, sha256=sha256)


def _sums(source: _Source, split: Split) -> list[Any]:
    """Return the sums of a split's files in reading order."""
    pairs = [[pair.bin.sha256, pair.idx.sha256] for shard in source.shards if (pair := shard.pairs().get(split))]
    is_packed = split == "train" and source.packing is not None
    return [*pairs, {name: file.sha256 for name, file in source.packing_files.items()}] if is_packed else pairs


def _check_figures(file: Path, source: _Source) -> Iterator[Problem]:
    """Yield what a run could not walk through: a weight that is no share, a source without training tokens."""
    where = f"{file}:sources: {source.name}"
    if not 0 < source.weight < math.inf:
        yield Problem(where, f"weight {source.weight:g}", "a number above 0", AGAIN)
    if not sum(shard.pairs()["train"].num_tokens for shard in source.shards if "train" in shard.pairs()):
        yield Problem(where, f"no training tokens in {len(source.shards)} shards", "some", AGAIN)
    if source.packing is not None and min(source.packing.seq_length, source.packing.num_sequences) < 1:
        found = f"packed into {source.packing.num_sequences} sequences of {source.packing.seq_length}"
        yield Problem(where, found, "at least one sequence, of tokens", AGAIN)


def _check_files(root: Path, source: _Source) -> list[Problem]:
    if Path(source.name).name != source.name or source.name in ("", ".", ".."):  # refuse a name that leads out of the folder
        return [Problem(f"{root}/manifest.json:sources", f"a source named {source.name!r}", "the name of a folder in it")]
    folder = root / source.name
    files = {folder / name: file for name, file in source.packing_files.items()}
    for shard in source.shards:
        for split, pair in shard.pairs().items():
            files |= zip(formats.files(folder, shard.number, split), (pair.bin, pair.idx), strict=True)
    problems = []
    for file, recorded in files.items():
        if not file.is_file():
            problems.append(Problem(str(file), "no such file", f"{recorded.size_bytes} bytes", AGAIN))
        elif file.stat().st_size != recorded.size_bytes:
            problems.append(Problem(str(file), f"{file.stat().st_size} bytes", f"{recorded.size_bytes}, as written", AGAIN))
    return problems


def _prepared(root: Path, source: _Source) -> PreparedSource:
    def tokens(split: Split) -> Tokens:
        pairs = {
            formats.prefix(root / source.name, shard.number, split): pair for shard in source.shards if (pair := shard.pairs().get(split))
        }
        return Tokens(tuple(pairs), sum(pair.num_tokens for pair in pairs.values()), sum(pair.num_documents for pair in pairs.values()))

    valid = tokens("valid")
    prefix = packed.prefix(root / source.name) if source.packing else None
    held_out, reading = valid if valid.prefixes else None, source.reading
    return PreparedSource(
        source.name,
        source.weight,
        tokens("train"),
        held_out,
        source.packing,
        prefix,
        reading.unread_share,
        reading.is_last_cut,
        sha256=sha256_json(_sums(source, "train")),
    )
