"""What the preparation of all sources shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        missing = [file for file in files if file.name not in self.sha256]
        self.sha256.update(zip((file.name for file in missing), self.run(pieces.sha256, missing), strict=True))

    def watched(self, title: str, order: Sequence[Piece]) -> sources.OpenFile:
        """Return a function that opens pieces and shows a progress bar of the bytes read."""
        task = self.progress.add_task(title, total=sum(piece.num_bytes for piece in order))
        num_bytes = {piece.file.name: piece.num_bytes for piece in order}
        return Watched.opener(lambda count: self.progress.advance(task, count), num_bytes)
