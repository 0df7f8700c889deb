"""A run as a folder: config.yaml (resolved) and manifest.json, metrics.jsonl and tensorboard/, origin/ (the architecture and the
Hugging Face files it began with), checkpoints/step_NNNNNNNN and checkpoints/latest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.checkpoint import folder, integrity, same_data
from megatron_prism.core import disk, log
from megatron_prism.core.config import InitConfig, ModelConfig, RunConfig, TrainConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, PrismError, Problem
from megatron_prism.core.load import changed, load, to_dict, to_yaml
from megatron_prism.core.manifest import describe, read_json, sha256_files, sha256_json, write_json, write_text
from megatron_prism.data import tokenizer
from megatron_prism.families import dense, registry
from megatron_prism.hf.files import read_object

if TYPE_CHECKING:
    from megatron_prism.checkpoint.start import Start
    from megatron_prism.parallel.groups import Groups

CHAT_TEMPLATES = ("additional_chat_templates",)  # what belongs to a tokenizer among a folder's subfolders
CHECKPOINTS, ORIGIN, CONFIG, MANIFEST = "checkpoints", "origin", "config.yaml", "manifest.json"
LOCK = ".lock"
DESCRIBED = "the manifest of a run, with its starts"
UNDESCRIBED = "restore the file; or remove it: a run without it knows its mixtures by their paths alone; or choose another run_dir"
WRITTEN = (
    folder.META,
    CONFIG,
    MANIFEST,
    ORIGIN,
    CHECKPOINTS,
    "metrics.jsonl",
    "tensorboard",
    "samples",
    "rollouts",
    "records",
)  # the first by no run itself


def is_started(run_dir: Path) -> bool:
    """Say whether a run folder holds a checkpoint to continue from."""
    return bool(checkpoints(run_dir))


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return a run's checkpoints by step, the oldest first."""
    return {int(path.name.removeprefix("step_")): path for path in folder.steps(run_dir / CHECKPOINTS)}


def last_step(run_dir: Path) -> int:
    """Return the step of a run's newest checkpoint, whole or not; 0 where there is none."""
    return max(checkpoints(run_dir), default=0)


def origin(run_dir: Path) -> folder.Checkpoint:
    """Return what a run began with: its architecture and its Hugging Face files, no weights."""
    return folder.read(run_dir / ORIGIN)


def check_resume(config: RunConfig, mixtures: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Return the keys that a resumed run has changed and must not, and what is wrong with a training run's mixtures.

    A key may change where its definition has the mark MAY_CHANGE: the same sequences, in the same steps, with the same learning rates, follow
    from the keys without it, and from the mixtures being the same ones (same_data.py). mixtures: as `segments.describe` gives them.
    """
    if not is_started(config.run_dir):
        return []
    path = config.run_dir / CONFIG
    before = load(path, type(config))
    fix = "put it back; or start another run from this one: init.checkpoint, and another run_dir"
    required = f"as in {path} of the run that is resumed"
    problems = [Problem(key, str(now), f"{then}, {required}", fix) for key, then, now in changed(before, config)]
    if isinstance(config, TrainConfig) and isinstance(before, TrainConfig):
        problems += same_data.check(before.data, config.data, last_start(config.run_dir), mixtures, last_step(config.run_dir))
    return problems


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return what the manifest says of each of a run's starts, the last one last; nothing where there is no manifest.

    Raises: InputError where the manifest is not a run's, or names no start.
    """
    path = run_dir / MANIFEST
    if not path.is_file():
        return []
    try:
        kept = read_json(path)["starts"]
        found = "" if isinstance(kept, list) and kept and all(isinstance(one, dict) for one in kept) else "`starts` without a start"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    if found:
        raise InputError(Problem(str(path), found, DESCRIBED, UNDESCRIBED))
    return kept


def last_start(run_dir: Path) -> Mapping[str, Any]:
    """Return what the manifest says of a run's last start, nothing where there is no manifest."""
    return next(reversed(starts(run_dir)), {})


def check_place(config: RunConfig) -> list[Problem]:
    """A run folder is new, or a run's; else nothing in it may have a name that a run writes: a checkpoint, a mixture, a config of the user's."""
    path, required = config.run_dir, "a new folder, or a run's"
    try:
        stands = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    except OSError as error:
        return [Problem("run_dir", f"{path}: {error.strerror}", required)]
    if not stands.is_dir():
        return [Problem("run_dir", f"{stands}, a file", required)]
    manifest = path / MANIFEST
    try:
        kind = read_json(manifest).get("kind") if manifest.is_file() else None
    except (ValueError, AttributeError) as error:
        return [Problem(str(manifest), f"no JSON object ({error})", DESCRIBED, UNDESCRIBED)]
    is_run = not (path / folder.META).is_file() and (kind == "run" or (kind is None and (path / LOCK).is_file()))
    others = [] if is_run else [name for name in WRITTEN if (path / name).exists()]
    return [Problem("run_dir", f"{path}, which holds {', '.join(others)} of another kind", required)] if others else []


@contextmanager
def begin(config: RunConfig, start: Start, inputs: Sequence[Path], figures: Mapping[str, Any], groups: Groups) -> Iterator[None]:
    """Lay the run folder out, and hold it for this gang until the run ends: rank 0 does both, and every rank calls this.

    inputs: the files that the run reads beside a checkpoint, whose hashes the manifest keeps.
    Raises: EnvironmentFault on every rank where another gang trains there, or the folder cannot be written.
    """
    from megatron_prism.parallel.groups import from_first

    with ExitStack() as stack:
        failure: PrismError | None = None
        if groups.rank == 0:
            try:
                stack.enter_context(_held(config, start, inputs, figures))
            except PrismError as error:
                failure = error
        if failure := from_first(failure):
            raise failure.agreed()
        yield


@contextmanager
def _held(config: RunConfig, start: Start, inputs: Sequence[Path], figures: Mapping[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(disk.held(config.run_dir / LOCK, f"prism {'train' if isinstance(config, TrainConfig) else 'rl'}"))
            if (step := last_step(config.run_dir)) != start.step:  # another gang was at work between the look and the lock
                fault = f"{config.run_dir} stood at step {start.step} when this run looked, and stands at step {step} now"
                raise EnvironmentFault(f"{fault}; start it again")
            tidy(config.run_dir)
            _lay_out(config, start, inputs, figures)
        except OSError as error:
            raise EnvironmentFault(f"{error.filename or config.run_dir}: {error.strerror or error}") from error
        yield


def _lay_out(config: RunConfig, start: Start, inputs: Sequence[Path], figures: Mapping[str, Any]) -> None:
    """Write the resolved config, the manifest, and what the run's checkpoints carry along; note a resume in the manifest."""
    if not start.is_resumed:
        shutil.rmtree(config.run_dir / ORIGIN, ignore_errors=True)  # of a start that saved nothing, perhaps with another model
        with folder.create(config.run_dir / ORIGIN) as temporary:
            _write_origin(start, config.init, temporary)
            integrity.seal(temporary)
        if start.weights is not None:
            inputs = [*inputs, folder.read(start.weights).root / folder.META]
    elif config.init != (began := load(config.run_dir / CONFIG, type(config)).init):
        log.get().warning("init.checkpoint %s is not read: the run resumes, and began from %s", config.init.checkpoint, began.checkpoint)
        config = replace(config, init=began)
    write_text(config.run_dir / CONFIG, to_yaml(config))
    path, before = config.run_dir / MANIFEST, starts(config.run_dir)
    this = describe("run", sha256_files(inputs), config_sha256=sha256_json(to_dict(config)), from_step=start.step, plan=dict(figures))
    write_json(path, {"kind": "run", "starts": [*before, this]})


def _write_origin(start: Start, init: InitConfig, target: Path) -> None:
    if start.weights is not None:
        checkpoint = folder.read(start.weights)
        folder.copy_hf(checkpoint.root, target)
        if init.extends:
            _write_extended(target / folder.ASSETS, checkpoint.model, start.model)
    else:
        folder.copy_assets(start.assets, target / folder.ASSETS, subfolders=CHAT_TEMPLATES)
        ids = tokenizer.load(start.assets, need_eos=False)
        facts = {"bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id, "dtype": start.dtype}
        write_json(target / folder.ASSETS / "config.json", registry.of_model(start.model).write_config(start.model) | facts)
    folder.write_meta(target, folder.describe(start.model, 0, start.tokens, dtype=start.dtype))


def _write_extended(assets: Path, before: ModelConfig, model: ModelConfig) -> None:
    """Say in a model's Hugging Face files what it is extended to. generation_config.json has nothing of it, and stays."""
    write_json(assets / "config.json", dense.extended(read_json(assets / "config.json"), before, model))
    if (path := assets / "tokenizer_config.json").is_file():
        write_json(path, {**read_object(path, "a tokenizer's config"), "model_max_length": model.max_position_embeddings})


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of a run holds beside its tensors: what it is, what it was made from, and the Hugging Face files."""

    config: RunConfig
    start: Start
    world_size: int
    at_step: Callable[[int], Mapping[str, Any]]
    """What follows from the step alone, as `facts` are."""

    def write(self, path: Path, step: int, facts: Mapping[str, Any]) -> None:
        """Add it to the checkpoint of a step: rank 0 alone.

        facts: `tokens`, those that the run has trained on, and others to be kept; `files`, texts by name that are too long for a fact.
        """
        config, kept = self.config, {**self.at_step(step), **facts}
        for name, text in kept.pop("files", {}).items():
            write_text(path / name, text)
        described = folder.describe(
            self.start.model,
            step,
            self.start.tokens + kept.pop("tokens"),
            dtype=self.start.dtype,
            world_size=self.world_size,
            parallel=to_dict(config.parallel),
            generators=f"of {self.world_size} ranks, in {folder.STATE}",
            manifest=last_start(config.run_dir),
            **kept,
        )
        folder.copy_hf(config.run_dir / ORIGIN, path)
        folder.write_meta(path, described)


def note(run_dir: Path, **facts: Any) -> None:
    """Add facts to a run's manifest."""
    path = run_dir / MANIFEST
    with disk.writing(path):
        write_json(path, {**read_json(path), **facts})


def step_folder(run_dir: Path, step: int) -> Path:
    """Return where a step's checkpoint lies."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def prune(run_dir: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Move all checkpoints away but the newest `keep_last`, and those of multiples of `keep_every` steps (0: none); return where to.

    Renamed first, so that a removal that is cut short leaves no checkpoint that is no longer whole. One that cannot be moved stays, with a
    word in the log: a run does not end for it, and the next save tries again.
    """
    leaving = []
    for step, path in list(checkpoints(run_dir).items())[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            try:
                leaving.append(path.rename(path.with_name(f".{path.name}.old")))
            except OSError as error:
                log.get().warning("%s is no longer kept, and cannot be moved away: %s", path, error.strerror or error)
    return leaving


def remove(path: Path) -> None:
    """Remove a checkpoint that was moved away, or what a save has left. What cannot be removed stays until the next start, with a word in the log."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        log.get().warning("%s is not removed: %s", error.filename or path, error.strerror or error)


def set_aside(path: Path) -> Path:
    """Move a damaged checkpoint out of the way of the run, which will write that step again; return where it is now."""
    number = 1
    while (aside := path.with_name(f"damaged_{path.name}_{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def tidy(run_dir: Path) -> None:
    """Remove what a save or a removal that was cut short has left. Other hidden files are the user's, or the file system's."""
    for path in (run_dir / CHECKPOINTS).glob(".*"):
        if path.suffix in (".old", ".tmp"):
            remove(path)
