"""The texts of data that is made or to be made: a prepared mixture, a prompt set, or files of records; in batches that a worker reads.

A prepared mixture's documents are decoded with its tokenizer, without special tokens. Only what training reads is read, nothing held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megatron_prism.core import paths
from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.manifest import read_json, sha256_file
from megatron_prism.data import mixture, prompts, tokenizer
from megatron_prism.data.indexed import Reader
from megatron_prism.data.mixture import Prepared
from megatron_prism.data.prompts import Prompt
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.prepare import documents, records, sources
from megatron_prism.prepare.lines import TooLong
from megatron_prism.prepare.sources import Input, Record

BATCH_TOKENS, BATCH_PROMPTS = 1 << 17, 1024  # a fraction of a second of work
MAX_RECORD_BYTES = 1 << 26


class Place(NamedTuple):
    """A document: its id, and where it lies."""

    document: str
    place: str


class Texts(Protocol):
    """A batch of a source's documents, not read yet."""

    @property
    def source(self) -> str:
        """Return the source's name."""

    def read(self, bad: list[str]) -> Iterator[tuple[Place, str]]:
        """Yield the documents, in order. Append records that give no text to `bad`."""


class Data(Protocol):
    """What was named on the command line: one or more sources, each with its documents. inputs: their sums, by path."""

    @property
    def sources(self) -> Sequence[str]:
        """Return the names of the sources."""

    def inputs(self) -> dict[str, str]:
        """Return the sha256 of what is read, by its path."""

    def batches(self) -> Iterator[Texts]:
        """Yield all documents, in batches."""


@dataclass(frozen=True)
class Tokens:
    """Documents of one pair of a prepared source. number: of the first of them in the source, as `prism locate --document` counts."""

    source: str
    spec: TokenizerSpec
    prefix: Path
    first: int
    last: int
    number: int

    def read(self, bad: list[str]) -> Iterator[tuple[Place, str]]:
        """Yield the documents, decoded."""
        reader = Reader([self.prefix])
        for document in range(self.first, self.last):
            start, end = reader.start(document), reader.start(document + 1)
            text = tokenizer.decode(reader.tokens(start, end - start), self.spec, skip_special=True)
            yield Place(str(self.number + document - self.first), f"{self.prefix}: document {document}"), text


@dataclass(frozen=True)
class Prompts:
    """Prompts of a set."""

    source: str
    path: Path
    prompts: tuple[Prompt, ...]

    def read(self, bad: list[str]) -> Iterator[tuple[Place, str]]:
        """Yield what each prompt asks."""
        for prompt in self.prompts:
            said = prompt.prompt if isinstance(prompt.prompt, str) else "\n".join(turn.get("content", "") for turn in prompt.prompt)
            yield Place(prompt.id, f"{self.path}: {prompt.id}"), said


@dataclass(frozen=True)
class Records:
    """Records of a file."""

    source: str
    file: Input
    records: Sequence[tuple[int, Record]]

    def read(self, bad: list[str]) -> Iterator[tuple[Place, str]]:
        """Yield the text of each record; of a text file, that of all paragraphs of the batch as one, since a question may have a blank line."""
        whole: list[str] = []
        for number, record in self.records:
            place = self.file.place(number)
            if isinstance(record, TooLong):
                bad.append(str(Problem(place, f"a record of {record.num_bytes} bytes", f"at most {MAX_RECORD_BYTES}")))
                continue
            try:
                text, _ = records.text_of(record, self.file.part, self.file.is_plain)
            except records.BadRecord as error:
                bad.append(str(Problem(self.file.place(number + error.line), error.found, error.required)))
                continue
            assert text is not None  # a part without conditions
            if self.file.is_plain:
                whole.append(text)
            else:
                yield Place(place, place), text
        if whole:
            place = self.file.place(self.records[0][0])
            yield Place(place, place), "\n\n".join(whole)


@dataclass(frozen=True)
class OfMixture:
    """A prepared mixture."""

    prepared: Prepared
    spec: TokenizerSpec
    sources: tuple[str, ...]

    def inputs(self) -> dict[str, str]:
        """Return the sum of all that its files hold."""
        return {str(self.prepared.root): self.prepared.sha256}

    def batches(self) -> Iterator[Tokens]:
        """Yield the documents of each source, pair after pair."""
        for name, source in zip(self.sources, self.prepared.sources, strict=True):
            number = 0
            for prefix in source.train.prefixes:
                ends = np.cumsum(Reader([prefix]).lengths())
                first = 0
                while first < ends.size:
                    before = int(ends[first - 1]) if first else 0
                    last = max(first + 1, int(np.searchsorted(ends, before + BATCH_TOKENS, "right")))
                    yield Tokens(name, self.spec, prefix, first, last, number + first)
                    first = last
                number += ends.size


@dataclass(frozen=True)
class OfPrompts:
    """A prompt set. A source is a domain."""

    path: Path
    sources: tuple[str, ...]
    by_source: tuple[tuple[Prompt, ...], ...]

    def inputs(self) -> dict[str, str]:
        """Return the sum of its prompts."""
        return {str(self.path / prompts.FILE): sha256_file(self.path / prompts.FILE)}

    def batches(self) -> Iterator[Prompts]:
        """Yield the prompts of each domain."""
        for name, of_source in zip(self.sources, self.by_source, strict=True):
            for first in range(0, len(of_source), BATCH_PROMPTS):
                yield Prompts(name, self.path / prompts.FILE, of_source[first : first + BATCH_PROMPTS])


@dataclass(frozen=True)
class OfFiles:
    """Files of records, as one source."""

    sources: tuple[str, ...]
    files: tuple[Input, ...]

    def inputs(self) -> dict[str, str]:
        """Return the sum of each file."""
        return {str(file.path): sha256_file(file.path) for file in self.files}

    def batches(self) -> Iterator[Records]:
        """Yield the records of each file."""
        for file in self.files:
            for waiting, _ in documents.record_batches(file, max_bytes=MAX_RECORD_BYTES):
                yield Records(self.sources[0], file, waiting)


def open_data(named: str, template: str, tokenizer_folder: Path | None, prefix: str = "") -> Data:
    """Return what a word of the command line names: NAME=PATH, or PATH; of a mixture's folder, a prompt set's, or files (a glob).

    template: how a file's record becomes its text. prefix: goes before the names of a mixture's and a prompt set's sources.
    Raises: InputError where it is none of these, or damaged.
    """
    name, path = named_path(named)
    manifest = Path(path) / mixture.FILE
    kind = _kind(manifest) if manifest.is_file() else None
    if kind == "prepared":
        prepared = mixture.read_prepared(Path(path))
        own = tuple(f"{name or prefix}{'/' if name or prefix else ''}{source.name}" for source in prepared.sources)
        return OfMixture(prepared, _tokenizer(prepared, manifest, tokenizer_folder), own)
    if kind == prompts.KIND:
        by_domain: dict[str, list[Prompt]] = {}
        for prompt in prompts.read(Path(path)):
            by_domain.setdefault(prompt.domain, []).append(prompt)
        own = tuple(f"{name or prefix}{'/' if name or prefix else ''}{domain}" for domain in by_domain)
        return OfPrompts(Path(path), own, tuple(map(tuple, by_domain.values())))
    if kind is not None:
        raise InputError(Problem(str(manifest), f"kind {kind!r}", "a prepared mixture, or a prompt set"))
    problems: list[Problem] = []
    files = sources.files(PartConfig(path=(path,), text=template, split="paragraph"), named, problems, text_key="--text")
    raise_problems(problems)
    return OfFiles((name or Path(path).name,), files)


def named_path(text: str) -> tuple[str, str]:
    """Return (name, path) of NAME=PATH; of PATH alone the name is empty. A path that is there may hold a `=`. `~` and $VARIABLES are replaced.

    Raises: InputError for a variable that is not set.
    """
    name, separator, path = text.partition("=")
    is_named = separator and "/" not in name and not Path(text).exists()
    try:
        return (name, paths.expanded(path)) if is_named else ("", paths.expanded(text))
    except ValueError as error:
        raise InputError(Problem(text, str(error), "a path", paths.FIX)) from None


def _kind(manifest: Path) -> str:
    try:
        return str(read_json(manifest).get("kind"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(Problem(str(manifest), str(error), "a manifest of prism prepare or prism prompts")) from None


def _tokenizer(prepared: Prepared, manifest: Path, folder: Path | None) -> TokenizerSpec:
    """Return the tokenizer that a mixture was prepared with. Raises: InputError where it is not there, or is another one."""
    place = folder or Path(read_json(manifest)["tokenizer"].get("path", ""))
    fix = "name its folder: --tokenizer DIR"
    try:
        spec = tokenizer.load(place)
    except InputError as error:
        raise InputError([replace(problem, fix=problem.fix or fix) for problem in error.problems]) from None
    if spec.sha256 != prepared.tokenizer_sha256:
        where = "--tokenizer" if folder else str(manifest)
        raise InputError(Problem(where, f"another tokenizer in {place}", f"sha256 {prepared.tokenizer_sha256}, which prepared it", fix))
    return spec
