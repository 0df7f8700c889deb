"""A checkpoint as a folder: `prism.json` says what it is, `state/` holds the tensors, and for the way back to
Hugging Face `hf/` keeps its files and `shards.json` its safetensors headers.

A run's checkpoints lie in RUN/checkpoints/step_NNNNNNNN; RUN/checkpoints/latest names the newest. Wherever a
checkpoint is asked for, the folder of one, of a run, or of its checkpoints will do.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_prism.core import disk
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, EnvironmentFault, InputError, Problem
from megatron_prism.core.load import build, to_dict
from megatron_prism.core.manifest import read_json, write_json, write_text
from megatron_prism.families import registry
from megatron_prism.hf import recognise
from megatron_prism.hf.files import refusal

FORMAT = 1
META, ASSETS, STATE, LATEST, SHARDS = "prism.json", "hf", "state", "latest", "shards.json"
STEP = re.compile(r"step_(\d{8,})")
# weights of any make, their indexes, and what a broken download leaves of them
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|keras|msgpack|onnx|onnx_data|tflite|npz|npy|nemo|pkl|pickle|joblib|ot|distcp|pdparams|pdiparams"
    r"|mlmodel|llamafile|engine|pte)(\.(index\.json|part|incomplete|tmp|data|[0-9]+))?",
    re.IGNORECASE,
)
OWN_WEIGHTS = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors(\.index\.json)?")
NOT_OURS = re.compile("|".join([recognise.ADAPTER.pattern, *map(re.escape, recognise.QUANTISED_FILES)]))  # true of other weights alone
READ_AS_TEXT = {".json", ".jinja", ".model", ".tiktoken", ".txt"}  # configs, templates and tokenizers, which no web page is
MAX_ASSET_BYTES = 100_000_000  # three times the largest tokenizer.json that we know


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says of itself. `facts` is its whole prism.json."""

    root: Path
    model: ModelConfig
    step: int
    tokens: int
    facts: Mapping[str, Any]

    @property
    def state(self) -> Path:
        return self.root / STATE

    @property
    def assets(self) -> Path:
        return self.root / ASSETS


def read(path: Path) -> Checkpoint:
    """Return the checkpoint that a path means: itself, or the latest of a run.

    Raises: CheckpointError where there is none, or its prism.json is not ours.
    """
    try:
        root = next((candidate for candidate in _candidates(path) if (candidate / META).is_file()), None)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # says nothing about the checkpoint, which must not be called damaged
            raise EnvironmentFault(f"{path}: {error.strerror or error}") from error
        raise CheckpointError(Problem(str(path), error.strerror or str(error), "a folder's name")) from None
    if root is None:
        raise CheckpointError(
            Problem(
                str(path),
                f"no {META}" if path.is_dir() else "no such folder",
                "a checkpoint of `prism convert import` or `prism train`",
                "a Hugging Face folder? Make a checkpoint of it: prism convert import" if (path / "config.json").is_file() else "",
            )
        )
    where = root / META
    try:
        facts = read_json(where)
        version, model = facts["format"], facts["model"]
        step, tokens = int(facts["step"]), int(facts["tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(str(where), f"{type(error).__name__}: {error}", "format, model, step and tokens")) from None
    if version != FORMAT:
        raise CheckpointError(Problem(f"{where}:format", repr(version), str(FORMAT), "it was written by another version of megatron_prism"))
    architecture = build(model, ModelConfig, lambda key: f"{where}:model.{'.'.join(map(str, key))}")
    registry.of_model(architecture, f"{where}:model.family")
    return Checkpoint(root, architecture, step, tokens, facts)


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    for folder in (path, path / "checkpoints"):
        if (checkpoint := newest(folder)) is not None:
            yield checkpoint


def newest(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint of a run. `latest` is a hint for the reader only: after a crash it may name the one before."""
    return next((path for path in reversed(steps(checkpoints)) if (path / META).is_file()), None)


def steps(checkpoints: Path) -> list[Path]:
    """Return a run's checkpoints, the oldest first. A folder is renamed into place when it is whole, so each of them was whole once."""
    folders = [path for path in checkpoints.glob("step_*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def describe(model: ModelConfig, step: int, tokens: int, **facts: Any) -> dict[str, Any]:
    """Return the contents of a prism.json."""
    return {"format": FORMAT, "model": to_dict(model), "step": step, "tokens": tokens, **facts}


@contextmanager
def create(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. It becomes `path` when the block ends, and is removed when the block raises.

    SIGTERM and SIGHUP, where nothing else handles them, end the block too: as large as a model, it would be left behind under a hidden name.
    Raises: InputError where `path` exists: nothing is ever overwritten. EnvironmentFault where it cannot be written.
    """
    refuse_existing(path)
    path = path.resolve()  # beside a link would be another disk than the one that it leads to
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _ending_in_order():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            publish(temporary, path)
        except OSError as error:  # readers raise InputError: what is left is writing
            raise EnvironmentFault(f"{error.filename or path}: {error.strerror or error}; nothing was written to {path}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Within the block let SIGTERM and SIGHUP raise SystemExit, with the exit code that a shell gives them. A handler that is set stays."""
    is_main = threading.current_thread() is threading.main_thread()
    ending = [each for each in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(each) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in ending:  # a second one would cut the removal short
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for each in ending:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ending:
            signal.signal(each, signal.SIG_DFL)


def refuse_existing(path: Path) -> None:
    """Raise InputError where an output folder exists and is not empty, or no folder can be there."""
    try:
        path.resolve().exists()
    except (OSError, RuntimeError) as error:  # a name too long; a link to itself, for which pathlib raises RuntimeError
        raise InputError(Problem(str(path), getattr(error, "strerror", None) or "a link to itself", "a folder's path")) from None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(Problem(str(path), "an existing output", "a new or empty folder", "choose another, or remove it"))
    if problem := disk.unfit_output(path):
        raise InputError(problem)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished folder into place, and sync its parent so that the rename survives a crash."""
    if path.exists():
        shutil.copymode(path, temporary)  # a folder made before, for its group or its owner alone, keeps its mode
        path.rmdir()  # an empty folder, as refuse_existing made sure
    temporary.rename(path)
    disk.sync([path.parent])


def copy_assets(source: Path, target: Path, subfolders: Collection[str] | None = None) -> list[Path]:
    """Copy the files of a Hugging Face folder, except its weights, and those of the named subfolders (None: of all). Return the copies."""
    target.mkdir(exist_ok=True)
    kept = [
        path
        for path in _sorted_out(source)[0]
        if path.is_file() and (path.parent == source or subfolders is None or path.relative_to(source).parts[0] in subfolders)
    ]
    for path in kept:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        disk.copy(path, copy)
    return kept


def left_behind(source: Path) -> list[str]:
    """Return the files and subfolders of a Hugging Face folder that a checkpoint does not keep, but the model's own weights."""
    return _sorted_out(source)[1]


def unfit_assets(root: Path, by_content: bool = True) -> list[Problem]:
    """Return a problem for each file to be kept that is not there: a link out of the folder or to nothing; by content, a Git-LFS pointer too."""
    looked_at = [(path, by_content and path.suffix in READ_AS_TEXT) for path in _sorted_out(root)[0]]
    problems = (refusal(path, "a file of the folder", root, is_text) for path, is_text in looked_at if is_text or path.is_symlink())
    return list(filter(None, problems))


def _sorted_out(source: Path) -> tuple[list[Path], list[str]]:
    """Return a Hugging Face folder's files that are kept, and in words what is left. A subfolder with weights is another model's: it is left whole."""
    kept, left = [], []
    for path in sorted(source.iterdir()):
        if path.name[0] == ".":
            continue
        if path.is_file() or _is_broken(path):
            if _is_asset(path):
                kept.append(path)
            elif not OWN_WEIGHTS.fullmatch(path.name):
                left.append(path.name)
        elif path.is_dir():
            below = [] if path.is_symlink() else _files_below(path)
            if path.is_symlink() or not all(map(_is_asset, below)):
                left.append(f"{path.name}/ ({'a link' if path.is_symlink() else 'it holds weights'})")
            else:
                kept += below
    return kept, left


def _files_below(root: Path) -> list[Path]:
    files = []
    for above, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "."]
        files += [Path(above) / name for name in names if name[0] != "."]
    return sorted(path for path in files if path.is_file() or _is_broken(path))


def _is_asset(path: Path) -> bool:
    if WEIGHTS.fullmatch(path.name) or NOT_OURS.fullmatch(path.name):
        return False
    return _is_broken(path) or path.stat().st_size <= MAX_ASSET_BYTES


def _is_broken(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def copy_hf(source: Path, target: Path) -> None:
    """Copy what a checkpoint keeps for its way back to Hugging Face: the files of hf/ and the safetensors headers."""
    disk.copy_tree(source / ASSETS, target / ASSETS)
    if (source / SHARDS).is_file():
        disk.copy(source / SHARDS, target / SHARDS)


def point_latest(folder: Path, name: str) -> None:
    """Write the name of a checkpoint to RUN/checkpoints/latest."""
    write_text(folder / LATEST, name + "\n")


def write_meta(root: Path, facts: Mapping[str, Any]) -> None:
    """Write prism.json."""
    write_json(root / META, facts)
