"""What was paid for once and is kept: samples and grades by their keys, in files that are written whole.

A line is {"key", "value", "sum"}, and its sum is that of key and value: a line that was changed or cut is named, and what it held is made again.
A file of lines is one write: whole or absent after a kill. Memory holds the keys and where their lines stand, not the texts.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_prism.core import disk, log
from megatron_prism.core.manifest import write_text


def sum_of(key: str, value: Any) -> str:
    """Return a line's sum."""
    return hashlib.blake2b(json.dumps([key, value], sort_keys=True).encode(), digest_size=16).hexdigest()


class _LastRead:
    """The file that was read last, which stays open: a question's responses stand side by side, and a shared disk opens slowly. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._stream: BinaryIO | None = None

    def read(self, path: Path, start: int, num_bytes: int) -> bytes:
        with self._lock:
            if self._stream is None or path != self._path:
                self.close()
                self._path, self._stream = path, path.open("rb")
            self._stream.seek(start)
            return self._stream.read(num_bytes)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __del__(self) -> None:
        self.close()


@dataclass(eq=False)
class Kept(Mapping[str, Any]):
    """Values by key in the files of a folder. One process writes it (folder.held). num_damaged: the lines that do not count."""

    root: Path
    num_damaged: int = field(default=0, init=False)
    _places: dict[str, tuple[Path, int, int]] = field(default_factory=dict, init=False, repr=False)
    _num_files: int = field(default=0, init=False)
    _last_read: _LastRead = field(default_factory=_LastRead, init=False, repr=False)

    def __post_init__(self) -> None:
        for path in sorted(path for path in self.root.glob("*.jsonl") if path.stem.isdecimal()):  # and no copy that somebody made
            self._num_files = max(self._num_files, int(path.stem) + 1)
            self._read(path)

    def __contains__(self, key: object) -> bool:
        return key in self._places  # Mapping's default would read the line

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._last_read.read(*self._places[key]))["value"]

    def write(self, values: Mapping[str, Any], /) -> None:
        """Keep values: all of them or, after a kill, none."""
        if not values:
            return
        path = self.root / f"{self._num_files:06d}.jsonl"
        lines = [json.dumps({"key": key, "value": value, "sum": sum_of(key, value)}) + "\n" for key, value in values.items()]
        with disk.writing(path):
            self.root.mkdir(exist_ok=True)
            write_text(path, "".join(lines))
        self._num_files += 1
        self._read(path)

    def _read(self, path: Path) -> None:
        start = 0
        with disk.writing(path), path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if (key := _key_of(line)) is not None:
                    self._places[key] = path, start, len(line)
                else:
                    self.num_damaged += 1
                    log.get().warning("%s:%d: changed or damaged since it was written: what it held is made again", path, number)
                start += len(line)


def _key_of(line: bytes) -> str | None:
    """Return a line's key. None: the line is not as it was written."""
    try:
        values = json.loads(line)
        key, value, said = values["key"], values["value"], values["sum"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return key if isinstance(key, str) and line.endswith(b"\n") and said == sum_of(key, value) else None
