"""Pass counts: how often a model answered each prompt right. A folder with passes.jsonl and manifest.json, made shard by shard.

A shard is a file in shards/ that is whole or absent, and holds the prompts of its number. passes.jsonl is all shards, in order, and appears when
all are there. The manifest says from the start what the counts are of, so that a filter that goes on cannot mix two models or two sets.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prism.core import disk, resumable
from megatron_prism.core.errors import InputError, Problem, first_of, raise_problems
from megatron_prism.core.load import build
from megatron_prism.core.manifest import read_json, sha256_file, write_json, write_text

FILE, MANIFEST, KIND, SHARDS, COMMAND = "passes.jsonl", resumable.MANIFEST, "passes", "shards", "prism rl filter"


@dataclass(frozen=True)
class PassCount:
    """How often a model answered a prompt right.

    num_samples: the responses sampled. num_faults: those of them that a fault of the grader or the machine left without a verdict; they are
    neither right nor wrong. num_truncated: those that did not end by an end token.
    """

    id: str
    num_right: int
    num_samples: int
    num_faults: int = 0
    num_truncated: int = 0
    mean_tokens: float = 0.0


def to_line(count: PassCount) -> str:
    """Return a pass count as a line of passes.jsonl."""
    return json.dumps(asdict(count)) + "\n"


def manifest_of(folder: Path) -> Mapping[str, Any]:
    """Return the manifest of a filter that has ended. Raises: InputError where it has not, or passes.jsonl is not as it was written."""
    where = str(folder / MANIFEST)
    try:
        with disk.reading(folder):
            described = read_json(folder / MANIFEST)
    except OSError as error:
        required = "the folder of a filter that has ended, or a file of pass counts"
        raise InputError(Problem(str(folder), disk.unread(folder, error), required, "run prism rl filter")) from None
    except ValueError as error:
        raise InputError(Problem(where, str(error), "the manifest of pass counts", "run prism rl filter")) from None
    if described.get("kind") != KIND:
        raise InputError(Problem(where, f"a manifest of kind {described.get('kind')!r}", "that of pass counts", "run prism rl filter"))
    if "sha256" not in described:
        raise InputError(Problem(where, "a filter that has not ended", "all prompts counted", "start prism rl filter again: it goes on"))
    try:
        with disk.reading(folder):
            sha256 = sha256_file(folder / FILE)
    except OSError as error:
        raise InputError(Problem(str(folder / FILE), error.strerror or str(error), "the pass counts that its manifest names")) from None
    if sha256 != described["sha256"]:
        fix = "put it back; or remove the folder, and filter again"
        raise InputError(Problem(str(folder / FILE), f"sha256 {sha256}", f"{described['sha256']}, as its manifest says", fix))
    return described


def read(path: Path) -> dict[str, PassCount]:
    """Return the pass counts of a file, by id. Raises: InputError for a line that is none, or an id that comes twice."""
    counts: dict[str, PassCount] = {}
    problems: list[Problem] = []
    try:
        with disk.reading(path):
            lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(Problem(str(path), str(error), "a file of pass counts")) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            count = build(json.loads(line), PassCount, lambda key, where=where: f"{where}:{'.'.join(map(str, key))}")  # type: ignore[misc]
        except InputError as error:
            problems += error.problems
            continue
        except ValueError as error:
            problems.append(Problem(where, str(error), "{id, num_right, num_samples} as JSON"))
            continue
        if not 0 <= count.num_right <= count.num_samples - count.num_faults <= count.num_samples:
            found = f"{count.num_right} right, {count.num_faults} faults of {count.num_samples}"
            problems.append(Problem(where, found, "right answers and faults that are 0 to num_samples together"))
        if count.id in counts:
            problems.append(Problem(where, f"id {count.id} again", "each prompt once"))
        counts[count.id] = count
    raise_problems(first_of(problems, str(path)))
    return counts


@dataclass(frozen=True)
class Folder:
    """The folder of a filter: the ids of the prompts in order, and how many of them a shard holds."""

    root: Path
    ids: Sequence[str]
    shard_prompts: int

    @property
    def num_shards(self) -> int:
        """The number of shards of the whole set."""
        return -(-len(self.ids) // self.shard_prompts)

    def places(self, shard: int) -> range:
        """Return the places in the set of a shard's prompts."""
        first = shard * self.shard_prompts
        return range(first, min(first + self.shard_prompts, len(self.ids)))

    def missing(self) -> list[int]:
        """Return the shards that are not there.

        Raises: InputError where one that is there is damaged or holds other prompts, or passes.jsonl is not as its manifest says.
        """
        if self._is_ended():
            manifest_of(self.root)
            return []
        missing = [shard for shard in range(self.num_shards) if not self._path(shard).is_file()]
        raise_problems([problem for shard in range(self.num_shards) if shard not in missing for problem in self._problems(shard)])
        return missing

    def _problems(self, shard: int) -> list[Problem]:
        path, fix = self._path(shard), "remove that file; its prompts are sampled again"
        try:
            ids = list(read(path))
        except InputError as error:
            return [replace(problem, fix=fix) for problem in error.problems]
        if ids == [self.ids[place] for place in self.places(shard)]:
            return []
        return [Problem(str(path), "other prompts than its shard's", "a shard of this set", fix)]

    def _is_ended(self) -> bool:
        """Say whether passes.jsonl is sealed. One that is not stands beside all shards, and is written again."""
        return (self.root / MANIFEST).is_file() and "sha256" in read_json(self.root / MANIFEST)

    def write(self, shard: int, counts: Sequence[PassCount]) -> None:
        """Write a shard."""
        path = self._path(shard)
        with disk.writing(path):
            path.parent.mkdir(exist_ok=True)
            write_text(path, "".join(map(to_line, counts)))

    def counts(self) -> Iterator[PassCount]:
        """Yield the pass counts that are there, in order."""
        whole = [self.root / FILE] if self._is_ended() else sorted((self.root / SHARDS).glob("*.jsonl"))
        for path in whole:
            yield from read(path).values()

    def finish(self) -> None:
        """Put the shards together as passes.jsonl, seal it in the manifest, and remove them. A kill within it is made good by the next call."""
        described = dict(read_json(self.root / MANIFEST))
        with disk.writing(self.root):
            if "sha256" not in described:
                write_text(self.root / FILE, "".join(map(to_line, self.counts())))
                write_json(self.root / MANIFEST, described | {"sha256": sha256_file(self.root / FILE)})
            shutil.rmtree(self.root / SHARDS, ignore_errors=True)
            disk.sync([self.root])

    def _path(self, shard: int) -> Path:
        return self.root / SHARDS / f"{shard:06d}.jsonl"


def held(root: Path, describe: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[Mapping[str, Any]]:
    """Hold a filter's folder for this process: resumable.held."""
    return resumable.held(root, KIND, COMMAND, describe)


def begun(root: Path) -> Mapping[str, Any] | None:
    """Return the manifest of a filter that has begun in a folder: resumable.begun."""
    return resumable.begun(root, KIND, COMMAND)
