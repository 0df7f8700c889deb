"""A table of a shard, as a .npy file that grows row by row while the shard is written, so that no process holds it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np


class Writer:
    """Write one .npy file, as a context manager. It is on disk after a clean exit."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype, self._num_rows = path, dtype, 0

    def __enter__(self) -> Writer:
        self._stream = self._path.open("wb")
        self._header()
        return self

    def add(self, rows: np.ndarray) -> None:
        """Append rows."""
        self._stream.write(rows.astype(self._dtype, copy=False).tobytes())
        self._num_rows += len(rows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stream:
            if kind is None:
                self._stream.seek(0)
                self._header()  # of the same length: numpy leaves room for a growing number of rows
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._num_rows,)}
        np.lib.format.write_array_header_1_0(self._stream, header)


def read(path: Path) -> np.ndarray:
    """Return a table, mapped into memory.

    Raises: ValueError for a file that is no table.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (read with allow_pickle=False)") from None
