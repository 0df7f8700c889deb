"""What a mixture is made from: the hashes of the tokenizer, of the evaluation sets and of all that is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_prism.core import manifest
from megatron_prism.core.config import PrepareConfig
from megatron_prism.data import special_tokens, tokenizer
from megatron_prism.prepare import documents, pieces, pool
from megatron_prism.prepare.pieces import Piece
from megatron_prism.prepare.source import Prepared, needed_tokens
from megatron_prism.prepare.sources import Input

PIECE = re.compile(r" \[(bytes|row groups) \d+ to \d+\]\Z")  # the end of a piece's name: Input.name
Orders = Mapping[str, tuple[Piece, ...]]  # of each source, its pieces as they are read


class Inputs:
    """The hashes of what is read. Where all of a source is read, they are known before the work; else as its pieces are read.

    A task hashes its own pieces only.
    """

    def __init__(
        self, config: PrepareConfig, orders: Orders, spec: tokenizer.TokenizerSpec, run: pool.Map[Any, Any], is_task: bool = False
    ):
        own = _tokenizer_files(spec)
        self._evaluation = documents.evaluation_files(config.decontaminate) if config.decontaminate else ()
        self._orders, self._run, self._spec = orders, run, spec
        self._always = [str(path) for path in own] + [file.name for file in self._evaluation]
        self.sha256: dict[str, str] = dict(zip(map(str, own), run(manifest.sha256_file, own), strict=True))
        whole = [name for name, need in needed_tokens(config).items() if need is None and not is_task]
        self.hash([*self._evaluation, *(piece.file for name in whole for piece in orders[name])])

    def hash(self, files: Iterable[Input]) -> None:
        """Add the hashes of what is not known yet."""
        pieces.add_sha256(self.sha256, files, self._run)

    def of(self, made: Mapping[str, Prepared]) -> dict[str, str]:
        """Return the hashes of what was read, by name: sampled files whole."""
        names = [*self._always, *(piece.file.name for done in made.values() for piece in done.pieces[: len(done.shards)])]
        names += [str(piece.file.path) for done in made.values() for piece in done.pieces if piece.file.part.sample]
        return {name: self.sha256[name] for name in dict.fromkeys(names)}

    def changed(self, existing: Mapping[str, Any]) -> list[str]:
        """Return the files that are not as a manifest says, whole or in a piece: what was read, by its hash, and what was not, by its size."""
        known = {piece.file.name: piece.file for order in self._orders.values() for piece in order}
        known |= {str(file.path): dataclasses.replace(file, span=None) for file in known.values()}
        read = existing["inputs"]
        self.hash(known[name] for name in read if name in known)
        changed = {name for name in read if self.sha256.get(name) != read[name]} | {name for name in self._always if name not in read}
        for entry in existing["sources"]:
            unread = entry.get("reading", {}).get("unread_files", {})
            paths = {str(piece.file.path) for piece in self._orders[entry["name"]]}
            of_read = {str(file.path) for name in read if (file := known.get(name))}
            changed |= paths - of_read - set(unread)
            changed |= {path for path, num_bytes in unread.items() if path not in paths or Path(path).stat().st_size != num_bytes}
        changed |= self._otherwise_named(existing["tokenizer"].get("end_ids"))
        return sorted({PIECE.sub("", name) for name in changed})

    def _otherwise_named(self, before: Mapping[str, list[int]] | None) -> set[str]:
        """Return the tokenizer's files that name other end tokens than before, where that makes another set of special tokens.

        before: None where an older manifest does not say.
        """
        now = {name: list(ids) for name, ids in self._spec.ends}
        if before is None or set(chain(*before.values())) == set(chain(*now.values())):
            return set()
        return {str(self._spec.folder / name) for name in {*before, *now} if before.get(name) != now.get(name)}


def _tokenizer_files(spec: tokenizer.TokenizerSpec) -> list[Path]:
    return [path for name in (tokenizer.FILE, *special_tokens.FILES) if (path := spec.folder / name).is_file()]
