"""A packing on disk (made by prepare/packing.py), and the packed sequences of a source's documents.

Two memory-mapped files: PREFIX.pieces.npy holds the pieces, bin after bin; PREFIX.bins.npy holds where each bin begins in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data.indexed import Reader

PIECE = np.dtype([("document", "<i8"), ("start", "<i8"), ("length", "<i4")])
FIRST_PIECE = np.dtype("<i8")


@dataclass(frozen=True, eq=False)
class Packed:
    """Pieces in bin order: document, first token within it, number of tokens. Bin b holds pieces bin_starts[b] to bin_starts[b + 1]."""

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
        """Return the tokens in all pieces. A token shared by two chunks counts twice."""
        return int(self.length.sum(dtype=np.int64))

    @property
    def efficiency(self) -> float:
        """Return the share of the bins' capacity that holds tokens."""
        return self.num_tokens / max(self.num_bins * self.seq_length, 1)


def prefix(folder: Path) -> Path:
    """Return the path prefix of the packing in a source's folder."""
    return folder / "train"


def pieces_path(prefix: Path) -> Path:
    """Return the pieces file of a prefix (a prefix may contain dots)."""
    return prefix.with_name(prefix.name + ".pieces.npy")


def bins_path(prefix: Path) -> Path:
    """Return the bins file of a prefix."""
    return prefix.with_name(prefix.name + ".bins.npy")


def save(packed: Packed, prefix: Path) -> None:
    """Write a packing's two files: whole, or not at all."""
    pieces = np.empty(packed.document.size, PIECE)
    for name in ("document", "start", "length"):
        pieces[name] = getattr(packed, name)
    paths = (pieces_path(prefix), bins_path(prefix))
    with disk.replacing(*paths) as parts:
        for part, values in zip(parts, (pieces, packed.bin_starts.astype(FIRST_PIECE)), strict=True):
            with part.open("wb") as stream:  # a name without .npy, which numpy would add
                np.save(stream, values, allow_pickle=False)
        disk.sync(parts)  # a full disk is met here, before anything is removed
        paths[1].unlink(missing_ok=True)  # bins of an earlier packing must not be read with the new pieces


class PackedReader:
    """The packed sequences of a source's documents, by number. Files are memory-mapped, so only what is read takes memory.

    Raises: InputError naming the file, at opening, or at reading a sequence whose pieces do not match the source.
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
        """Return a bin's tokens, their document numbers (from 0) and the loss mask: shapes (S,), int64, int32, float32.

        The rest of the bin is padding, which counts as one more document. Padding and a piece's last token have no loss.
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

    def document(self, number: int, position: int) -> int:
        """Return the document of the token at a position of a bin."""
        ends = accumulate(length for _, _, length in self.pieces(number))
        return next(piece[0] for piece, end in zip(self.pieces(number), ends, strict=True) if position < end)

    def find(self, document: int, token: int) -> tuple[int, int]:
        """Return (bin, position in it) of a document's token, in the first chunk that holds it."""
        pieces = self._pieces
        at = np.flatnonzero((pieces["document"] == document) & (pieces["start"] <= token) & (token < pieces["start"] + pieces["length"]))
        piece = int(at[np.argmin(pieces["start"][at])])
        number = int(np.searchsorted(self._bins, piece, side="right")) - 1
        before = int(pieces["length"][int(self._bins[number]) : piece].sum())
        return number, before + token - int(pieces["start"][piece])

    def _offset(self, number: int, document: int, start: int, length: int, room: int) -> int:
        """Return the source offset of a piece's first token. Check that the piece lies within its document and its bin."""
        if 0 <= document < self.reader.num_documents:
            offset = self.reader.start(document)
            size = self.reader.start(document + 1) - offset
            if 0 <= start < start + length <= size and length <= room:
                return offset + start
        found = f"{length} tokens of document {document} from {start} on"
        required = f"a part of one of the source's {self.reader.num_documents} documents, of at most {room} tokens"
        raise InputError(Problem(f"{self._path}: sequence {number}", found, required))


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map a file's array. Check that it has this dtype and fills the file."""
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", "the .pieces.npy and the .bins.npy of a packed source"))
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # on a damaged header numpy raises ValueError, SyntaxError, TokenError, ...
        raise InputError(Problem(str(path), str(error), "an array as numpy saves it")) from error
    if array.dtype != dtype or array.ndim != 1:
        raise InputError(Problem(str(path), f"{array.dtype} of shape {array.shape}", f"one row of {dtype}"))
    if path.stat().st_size != array.offset + array.nbytes:
        raise InputError(Problem(str(path), f"{path.stat().st_size} bytes", f"{array.offset + array.nbytes} for {array.size} entries"))
    return array
