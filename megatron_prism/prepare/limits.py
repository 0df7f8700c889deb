"""The largest lot that each group of a sampled part takes: drawn from all the part's files, once, and kept in the source's folder.

Several tasks may prepare a source at the same time: one draws, the others wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core import disk, manifest
from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.prepare import documents, pieces, sample
from megatron_prism.prepare.documents import Recipe
from megatron_prism.prepare.sources import Input
from megatron_prism.prepare.work import Work

FILE, LOCK = "sample.limits", ".sample.lock"


class Limits:
    """The limits of a source's sampled parts. They are drawn when they are first asked for."""

    def __init__(self, recipe: Recipe, files: Sequence[Input], work: Work):
        self._recipe, self._work, self._path = recipe, work, work.folder / recipe.source / FILE
        sampled: list[tuple[PartConfig, dict[Path, Input]]] = []
        for file in files:
            if file.part.sample:
                of_part = next((inputs for part, inputs in sampled if part == file.part), None)
                if of_part is None:
                    sampled.append((file.part, of_part := {}))
                of_part.setdefault(file.path, dataclasses.replace(file, span=None))
        self._parts = [(part, sorted(inputs.values(), key=lambda file: str(file.path))) for part, inputs in sampled]
        self._sha256: dict[str, str] = {}
        self._limits: list[Mapping[str, int]] = []

    def drawn_from(self, file: Input) -> list[str] | None:
        """Return the hashes of all files that a piece's sample is drawn from, None without a sample."""
        if file.part.sample is None:
            return None
        inputs = next(inputs for part, inputs in self._parts if part == file.part)
        if not self._sha256 and any(each.name not in self._work.sha256 for each in inputs):
            self.drawn([file])  # one of several tasks reads and hashes the files, for all of them
            self._sha256 = dict(self._kept()["sha256"])
            self._work.sha256.update(self._sha256)
        self._sha256 = self._sha256 or self._hashed()
        return [self._sha256[each.name] for each in inputs]

    def drawn(self, files: Sequence[Input]) -> list[Input]:
        """Return pieces with the limits of their samples.

        Raises: InputError naming each group with fewer texts than its sample needs.
        """
        if any(file.part.sample for file in files) and not self._limits:
            self._path.parent.mkdir(exist_ok=True, parents=True)
            with disk.held(self._path.with_name(LOCK), "prism prepare", wait=True):
                self._limits = self._kept().get("limits") or self._draw()
        return [dataclasses.replace(file, limits=self._of(file.part)) if file.part.sample else file for file in files]

    def _of(self, part: PartConfig) -> Mapping[str, int]:
        return next(limits for (other, _), limits in zip(self._parts, self._limits, strict=True) if other == part)

    def _hashed(self) -> dict[str, str]:
        inputs = [file for _, inputs in self._parts for file in inputs]
        self._work.hash(inputs)
        return {file.name: self._work.sha256[file.name] for file in inputs}

    def _draw(self) -> list[Mapping[str, int]]:
        """Read all files of each part, and write down the limits. It reads all of a sampled part, whatever is needed of it."""
        problems: list[Problem] = []
        drawn: list[Mapping[str, int]] = []
        for part, inputs in self._parts:
            assert part.sample is not None
            draw, num_bad, first_bad = sample.Draw(part.sample.counts), 0, ""
            with self._work.watched(f"{self._recipe.source} (lots)", list(map(pieces.whole, inputs))) as opened:
                for lots, bad, first in self._work.run(documents.lots, documents.batches(inputs, self._recipe, opened)):
                    num_bad, first_bad = num_bad + bad, first_bad or first
                    for group, lot in lots:
                        draw.add(group, lot)
            where = f"sources.{self._recipe.source}.sample.counts"
            why = f"{num_bad} bad records, the first: {first_bad}" if num_bad else ""
            problems += [
                Problem(f"{where}.{group}", f"{count} different texts", f"{part.sample.counts[group]}", why)
                for group, count in draw.short().items()
            ]
            drawn.append(draw.limits())
        raise_problems(problems)
        manifest.write_json(self._path, {"of": self._key(), "sha256": self._sha256 or self._hashed(), "limits": drawn})
        return drawn

    def _kept(self) -> Mapping[str, Any]:
        """Return what was written down for the same recipe and files, by their sizes and times; else nothing."""
        try:
            kept = manifest.read_json(self._path)
        except (OSError, ValueError):
            return {}
        return kept if kept.get("of") == self._key() else {}

    def _key(self) -> str:
        states = [(file.name, (state := file.path.stat()).st_size, state.st_mtime_ns) for _, inputs in self._parts for file in inputs]
        values = dataclasses.asdict(self._recipe) | {"tokenizer": self._recipe.tokenizer.sha256}
        return manifest.sha256_json([values, [dataclasses.asdict(part) for part, _ in self._parts], states])
