"""A packing (packing.py) on disk, and the sequences it makes of a source's documents.

Two files of numbers, mapped, not read: PREFIX.pieces.npy holds each bin's pieces in turn, PREFIX.bins.npy where each bin's begin.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data.indexed import Reader

PIECE = np.dtype([("document", "<i8"), ("start", "<i8"), ("length", "<i4")])
FIRST_PIECE = np.dtype("<i8")


@dataclass(frozen=True, eq=False)
class Packed:
    """Pieces in bin order: document, first token within it, tokens; bin b holds pieces bin_starts[b] to bin_starts[b + 1]."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    bin_starts: np.ndarray
    seq_length: int

    @property
    def num_bins(self) -> int:
        """Return the number of bins."""
        return self.bin_starts.size - 1

    @property
    def num_tokens(self) -> int:
        """Return the tokens in pieces: what chunks share is counted in each."""
        return int(self.length.sum(dtype=np.int64))

    @property
    def efficiency(self) -> float:
        """Return the share of the bins' room that holds tokens."""
        return self.num_tokens / max(self.num_bins * self.seq_length, 1)


def prefix(folder: Path) -> Path:
    """Return where the packing of a source's folder is."""
    return folder / "train"


def pieces_path(prefix: Path) -> Path:
    """Return the pieces' file of a prefix (a prefix may contain dots)."""
    return prefix.with_name(prefix.name + ".pieces.npy")


def bins_path(prefix: Path) -> Path:
    """Return the file of a prefix that says where each bin's pieces begin."""
    return prefix.with_name(prefix.name + ".bins.npy")


def save(packed: Packed, prefix: Path) -> None:
    """Write a packing's two files: whole, or not at all."""
    pieces = np.empty(packed.document.size, PIECE)
    for name in ("document", "start", "length"):
        pieces[name] = getattr(packed, name)
    paths = (pieces_path(prefix), bins_path(prefix))
    parts = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        for part, values in zip(parts, (pieces, packed.bin_starts.astype(FIRST_PIECE)), strict=True):
            with part.open("wb") as stream:
                np.save(stream, values, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
        paths[1].unlink(missing_ok=True)  # of an earlier packing: its bins must not stand beside these pieces
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


class PackedReader:
    """The sequences that a packing makes of a source's documents, by number: memory holds what is read.

    Raises: InputError naming the file, when it is opened or when a sequence is read whose pieces are not the source's.
    """

    def __init__(self, reader: Reader, prefix: Path, seq_length: int, pad_id: int):
        self.reader, self.seq_length, self.pad_id = reader, seq_length, pad_id
        self._path = pieces_path(prefix)
        self._pieces, self._bins = _map(self._path, PIECE), _map(bins_path(prefix), FIRST_PIECE)
        if self._bins.size < 2 or self._bins[0] != 0 or self._bins[-1] != self._pieces.size or (np.diff(self._bins) < 1).any():
            required = f"numbers that rise from 0 to the {self._pieces.size} pieces of {self._path.name}"
            raise InputError(Problem(str(bins_path(prefix)), "bins that do not divide the pieces", required))

    def __len__(self) -> int:
        return self._bins.size - 1

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a bin's tokens, the document of each from 0 on, and where there is a loss; shapes (S,), int64, int32, float32.

        What is left of the bin is padding, a document of its own. Neither padding nor a piece's last token predicts anything.
        """
        pieces = self.pieces(number)
        tokens = np.full(self.seq_length, self.pad_id, np.int64)
        documents = np.full(self.seq_length, len(pieces), np.int32)
        loss_mask = np.zeros(self.seq_length, np.float32)
        at = 0
        for index, (document, start, length) in enumerate(pieces):
            offset = self._offset(number, document, start, length, self.seq_length - at)
            tokens[at : at + length] = self.reader.tokens(offset, length)
            documents[at : at + length] = index
            loss_mask[at : at + length - 1] = 1
            at += length
        return tokens, documents, loss_mask

    def pieces(self, number: int) -> list[tuple[int, int, int]]:
        """Return (document, first token within it, tokens) of each piece of a bin."""
        return self._pieces[slice(*self._bins[number : number + 2].tolist())].tolist()

    def find(self, document: int, token: int) -> tuple[int, int]:
        """Return (bin, position in it) of a document's token: of several chunks that hold it, the first."""
        pieces = self._pieces
        at = np.flatnonzero((pieces["document"] == document) & (pieces["start"] <= token) & (token < pieces["start"] + pieces["length"]))
        piece = int(at[np.argmin(pieces["start"][at])])
        number = int(np.searchsorted(self._bins, piece, side="right")) - 1
        before = int(pieces["length"][int(self._bins[number]) : piece].sum())
        return number, before + token - int(pieces["start"][piece])

    def _offset(self, number: int, document: int, start: int, length: int, room: int) -> int:
        """Return a piece's first token of the source, once the piece lies within its document and its bin."""
        if 0 <= document < self.reader.num_documents:
            offset = self.reader.start(document)
            size = self.reader.start(document + 1) - offset
            if 0 <= start < start + length <= size and length <= room:
                return offset + start
        found = f"{length} tokens of document {document} from {start} on"
        required = f"a part of one of the source's {self.reader.num_documents} documents, of at most {room} tokens"
        raise InputError(Problem(f"{self._path}: sequence {number}", found, required))


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Return a file's array, mapped, once it is one of this type and fills the file."""
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", "the .pieces.npy and the .bins.npy of a packed source"))
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of a damaged header numpy raises what its parser meets: ValueError, SyntaxError, TokenError
        raise InputError(Problem(str(path), str(error), "an array as numpy saves it")) from error
    if found.dtype != dtype or found.ndim != 1:
        raise InputError(Problem(str(path), f"{found.dtype} of shape {found.shape}", f"one row of {dtype}"))
    if path.stat().st_size != found.offset + found.nbytes:
        raise InputError(Problem(str(path), f"{path.stat().st_size} bytes", f"{found.offset + found.nbytes} for {found.size} entries"))
    return found
