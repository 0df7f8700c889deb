"""The manifest beside every output: what made it, from which inputs, with which versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_prism import __version__
from megatron_prism.core import disk

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "safetensors", "numpy")


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def xxh128_file(path: Path) -> str:
    """Return the XXH3-128 of a file as hex: what `xxh128sum FILE` says."""
    total, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            total.update(buffer[:count])
    return total.hexdigest()


def sha256_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of each file, by its path."""
    return {str(path): sha256_file(path) for path in paths}


def sha256_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a run's numbers; absent ones are left out."""
    by_package = {"megatron_prism": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_package[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_package


def git_commit() -> str | None:
    """Return the checkout's commit ('+dirty' where the package has changes: models, data and YAML files lie beside it), None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    root = package.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = ["git", "-C", str(root), "status", "--porcelain", "--", package.name]
        dirty = subprocess.run(status, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "") if commit.returncode == 0 else None


def describe(kind: str, inputs: Mapping[str, str], **facts: Any) -> dict[str, Any]:
    """Return a manifest: kind, time, versions, git commit, the sha256 of each input file, and `facts`."""
    return {
        "kind": kind,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "git_commit": git_commit(),
        "inputs": dict(inputs),
        **facts,
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part: temporary file, fsync, rename. NaN and inf become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return a JSON value with None in place of NaN and inf, which JSON does not have: most readers would refuse the whole file."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write text through a temporary file in the same folder, fsync and rename."""
    with disk.replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object."""
    return json.loads(path.read_text(encoding="utf-8"))
