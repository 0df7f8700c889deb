"""A Hugging Face folder's files: whether one can be read as a file of its folder, and JSON read strictly."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_prism.core import disk
from megatron_prism.core.errors import CheckpointError, Problem

ABSENT = "no such file"
HTML = "a web page, not the file"
STARTS = {  # what a download or a rename leaves in place of a file, by its first bytes (in lower case)
    b"version https://git-lfs": ("a Git-LFS pointer, not the file", "fetch the file itself: git lfs pull, or hf download"),
    b"<!doctype": (HTML, "fetch the file itself: hf download, with a login where the model asks for one"),
    b"<html": (HTML, "fetch the file itself: hf download, with a login where the model asks for one"),
    b"<?xml": (HTML, "fetch the file itself: hf download, with a login where the model asks for one"),
    b"../": ("a link saved as text, not the file", "copy the folder where links work, with cp -rL, which follows them"),
    b"gguf": ("a GGUF file of another name", "take the model's safetensors release"),
    b"pk\x03\x04": ("a zip archive, as torch.save writes it", "save the model anew as safetensors: pickles are not read"),
    b"\x1f\x8b": ("a file compressed with gzip", "decompress it"),
}


def refusal(path: Path, required: str, root: Path | None = None, by_content: bool = True) -> Problem | None:
    """Return why a path cannot be read as a file of a folder (its own, where none is given), None where it can.

    A pipe is not opened: that would block. `required` says what the file should hold. by_content: look at its first bytes too; a picture or
    an archive begins as some of STARTS.
    """
    try:
        path.resolve(strict=True)
        if not is_inside(path, root):
            return Problem(str(path), "a link out of the folder", required, "copy the file there: cp -L follows links")
        if not stat.S_ISREG(path.stat().st_mode):
            return Problem(str(path), "no regular file", required)
        if not os.access(path, os.R_OK):
            return Problem(str(path), "a file that may not be read", required)
        with disk.reading(path), path.open("rb") as stream:
            first = stream.read(64).lstrip().lower()
    except FileNotFoundError:
        if not path.is_symlink():
            return Problem(str(path), ABSENT, required)
        return Problem(
            str(path), f"a link to {os.readlink(path)}, which is not there", required, "copy the folder with cp -rL, which follows links"
        )
    except OSError as error:
        return Problem(str(path), str(error.strerror), required)
    except RuntimeError:
        return Problem(str(path), "a link to itself", required)
    starts = STARTS if by_content else {}
    return next((Problem(str(path), found, required, fix) for start, (found, fix) in starts.items() if first.startswith(start)), None)


def is_inside(path: Path, root: Path | None = None) -> bool:
    """Say whether a file is inside a folder (its own, where none is given) after resolving links.

    In the hub's cache a file of models--ORG--NAME/snapshots/HASH, at any depth, is a link into models--ORG--NAME/blobs.
    """
    root, target = (root or path.parent).resolve(), path.resolve()
    if target.is_relative_to(root):
        return True
    caches = [above.parent for above in root.parents if above.name == "snapshots"]
    return any(target.parent == (cache / "blobs").resolve() for cache in caches[:1])


def read_object(path: Path, required: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder. A repeated key is an error.

    Raises: CheckpointError naming the file. `required` says what it should hold.
    """
    if problem := refusal(path, required):
        raise CheckpointError(problem)
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"damaged JSON ({error})", required)) from None


def parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises: ValueError for anything else, and for a repeated key. RecursionError.
    """
    parsed = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(parsed, dict):
        raise ValueError("no object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} stands twice")
    return result
