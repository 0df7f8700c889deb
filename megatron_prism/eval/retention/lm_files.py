"""The documents of an lm-eval task from local files, as they were downloaded: which file holds which split, and its records."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core.errors import InputError, Problem

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


def splits(root: Path, dataset: str, name: str | None, wanted: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the files of each wanted split that a folder holds.

    The folder holds the dataset itself, or a folder of the dataset's name (`owner/name`); within it the files lie at the top, in data/, or in a
    folder of the configuration's name. A split's files begin with its name (`test.jsonl`, `test-00000-of-00002.parquet`); a file of the
    configuration's name holds whichever split is asked for.
    """
    tops = [root / dataset, root / dataset.replace("/", "--"), root / dataset.split("/")[-1], root]
    folders = [folder for top in tops for folder in ([top / name] if name else []) + [top, top / "data"]]
    return {split: files for split in wanted if (files := _of_split(folders, name, split))}


def _of_split(folders: Sequence[Path], name: str | None, split: str) -> tuple[Path, ...]:
    for folder in folders:
        named = [path for path in sorted(folder.glob("*")) if path.name.endswith(ENDINGS) and path.is_file()]
        stems = {path: path.name.split(".")[0] for path in named}
        own = tuple(path for path in named if stems[path] == split or stems[path].startswith(f"{split}-"))
        if files := own or tuple(path for path in named if name and stems[path] == name):
            return files
    return ()


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the records of files, in order. Raises: InputError where a file cannot be read as what its name says."""
    return [record for path in paths for record in _records(path)]


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        text = raw.decode("utf-8")
        if path.name.endswith(".csv"):
            return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        values = json.loads(text) if path.name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, EOFError, csv.Error) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise InputError(Problem(str(path), str(error), f"records as {path.name.split('.', 1)[-1]}")) from None
    if isinstance(values, Mapping) or not all(isinstance(value, dict) for value in values):
        raise InputError(Problem(str(path), "other values than records", "a list of objects"))
    return values
