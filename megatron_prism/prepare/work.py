"""What the preparation of all sources shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core import manifest
from megatron_prism.core.config import PrepareConfig
from megatron_prism.prepare import pieces, pool, sources
from megatron_prism.prepare.pieces import Piece
from megatron_prism.prepare.sources import Input, Watched

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclasses.dataclass(frozen=True)
class Work:
    """What every source's preparation shares: where to write, the processes, the progress bar, the hashes of all that is read.

    sha256: by a piece's name; filled as pieces are hashed. reuse: the folder of a mixture prepared before.
    """

    config: PrepareConfig
    folder: Path
    run: pool.Map[Any, Any]
    progress: Progress
    sha256: dict[str, str]
    reuse: Path | None = None

    def hash(self, files: Iterable[Input]) -> None:
        """Add the hashes of pieces that are not known yet."""
        pieces.add_sha256(self.sha256, files, self.run)

    @contextmanager
    def watched(self, title: str, order: Sequence[Piece]) -> Iterator[sources.OpenFile]:
        """Yield a function that opens pieces, and show a progress bar of the bytes read. It is full at the end, though less may be read."""
        num_bytes = {piece.file.name: piece.num_bytes for piece in order}
        task = self.progress.add_task(title, total=sum(num_bytes.values()))
        yield Watched.opener(lambda count: self.progress.advance(task, count), num_bytes)
        self.progress.update(task, completed=sum(num_bytes.values()))

    def old_shards(self, source: str) -> list[Mapping[str, Any]]:
        """Return the manifests of a source's whole shards in the mixture that is reused."""
        if self.reuse is None:
            return []
        entries = manifest.read_json(self.reuse / "manifest.json")["sources"]
        listed = [(entry["shards"], entry.get("reading", {})) for entry in entries if entry["name"] == source]
        return [shard for shards, reading in listed for shard in (shards[:-1] if reading.get("is_last_cut") else shards)]
