"""A study's tasks, read: the job that each one's words call, the config that it loads, what it writes, and the sums of what it is given."""

from __future__ import annotations

import dataclasses
import glob
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prism.core import paths
from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.data import check_prepare
from megatron_prism.core.check.merge import check_merge
from megatron_prism.core.config import MergeConfig, PrepareConfig, StudyConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import load, placed, to_dict
from megatron_prism.core.manifest import sha256_json
from megatron_prism.jobs.gangs import GANGS
from megatron_prism.launch.pipeline import CONFIGS, GANG_JOBS, Call, Read
from megatron_prism.study import record, sums
from megatron_prism.study.graph import Task, needed, tasks

PYTHON = "python"  # the job of a script
RESUMING = (*GANG_JOBS, "prepare")  # jobs that go on in their own unfinished output
GROWING = ("evaluate", "analyze landscape", "analyze cka")  # jobs whose folder keeps what it has by model and question
RESULT_VARIABLE = "PRISM_STUDY_RESULT"
PIPELINE = "pipeline.json"  # of a submission to Slurm
OWN_FILES = (record.STUDY, record.SUMS, PIPELINE)  # in the folder of the stages' folders


@dataclass(frozen=True)
class Stage:
    """A task and what its words say. folder: where it is kept. config: what its job loads, if that has a config. given: the sums of its words."""

    task: Task
    job: str
    folder: Path
    call: Call | None = None
    config: Any = None
    output: Path | None = None
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def resumes(self) -> bool:
        """Whether the job goes on by itself in an output that it did not finish."""
        return self.job in RESUMING

    @property
    def grows(self) -> bool:
        """Whether the job, asked for other things of the same model, takes from its output what is the same."""
        return self.job in GROWING

    @property
    def has_result(self) -> bool:
        """Whether the job writes a result as JSON. A script may."""
        return self.call is not None and "json" in self.call.arguments

    @property
    def result(self) -> Path:
        return self.folder / record.RESULT

    @property
    def command(self) -> list[str]:
        """The command of its process."""
        if self.call is None:
            return [sys.executable, *self.task.words]
        json = ["--json", paths.escaped(str(self.result))] if self.has_result else []
        return [sys.executable, "-m", "megatron_prism.cli", *self.task.words, *json]


def read(study: StudyConfig, read_words: Read) -> list[Stage]:
    """Return the stages in order. Raises: InputError with the problems of all: words that are no job, configs that do not load, shared outputs."""
    stages: list[Stage] = []
    problems: list[Problem] = []
    for task in tasks(study.stages):
        try:
            stages.append(_read(task, study.run_dir / record.FOLDER / task.name, read_words))
        except InputError as error:
            problems += [replace(problem, where=f"stage {task.name}: {problem.where}") for problem in error.problems]
    problems += [*_check_outputs(stages, study.run_dir), *_check_sources({stage.name: stage for stage in stages})]
    raise_problems(problems)
    return stages


def _read(task: Task, folder: Path, read_words: Read) -> Stage:
    words = sha256_json(list(task.words))
    if task.stage.kind == PYTHON:
        if not (script := Path(task.words[0])).is_file():
            raise InputError(Problem("command", f"{script}, which is no file", "a Python script and its arguments"))
        return Stage(task, PYTHON, folder, output=task.stage.output, given={"command": words})
    call = read_words(task.words)
    if call is None or "--" in task.words:
        raise InputError(Problem("command", " ".join(task.words), "a job of prism and its arguments, as [train, my_run.yaml], without --"))
    config: Any = None
    if call.job in CONFIGS and call.arguments.get("config") is not None and not call.arguments.get("hf") and not call.arguments.get("ckpt"):
        path, overrides = call.config
        config = load(path, CONFIGS[call.job], overrides)
        with placed(path, CONFIGS[call.job], overrides):
            raise_problems(_problems(config, _world_size(call, config)))
    given = {"command": words} if config is None else {"command": words, "config": sha256_json(to_dict(config))}
    return Stage(task, call.job, folder, call, config, task.stage.output or _output(call, config), given)


def world_size(stage: Stage) -> int:
    """Return the number of a stage's processes: --nproc, or its config's world_size."""
    return 1 if stage.call is None else _world_size(stage.call, stage.config)


def _world_size(call: Call, config: Any) -> int:
    return call.arguments.get("nproc") or getattr(config, "world_size", None) or 1


def _problems(config: Any, size: int) -> list[Problem]:
    """Return what is wrong with a config, as far as it can be said before its inputs are there."""
    if type(config) in GANGS:
        return GANGS[type(config)].check(config, size)
    if isinstance(config, PrepareConfig):
        return check_prepare(config)
    return check_merge(config) if isinstance(config, MergeConfig) else list(check_bounds(config))


def _output(call: Call, config: Any) -> Path | None:
    """Return what a job writes: its --out, or what its config names."""
    out = call.arguments.get("out") or getattr(config, "run_dir", None) or getattr(config, "out", None)
    return out if isinstance(out, Path) else None


def _check_outputs(stages: Sequence[Stage], run_dir: Path) -> Iterator[Problem]:
    """Check that no output holds the study's own folder or an output that was there before, and that none lies where the study writes.

    An output may be put aside as a whole, as NAME.old.
    """
    records = (run_dir / record.FOLDER).resolve()
    asides = {stage.output.resolve().with_name(f"{stage.output.name}.old"): stage.name for stage in stages if stage.output is not None}
    earlier: dict[Path, str] = {records: "the study's records"}
    for stage in stages:
        where, required = f"stage {stage.name}: output", "a folder or file of its own"
        if stage.folder.name in OWN_FILES:
            yield Problem(f"stage {stage.name}: name", repr(stage.name), f"a name that is no file of the study: {', '.join(OWN_FILES)}")
        if stage.output is None:
            continue
        place = stage.output.resolve()
        for other, name in earlier.items():
            if other == place or place in other.parents:
                yield Problem(
                    where, f"{stage.output}, which holds that of {name}", required, "a stage's output may be put aside as a whole"
                )
        if records in place.parents:
            yield Problem(where, f"{stage.output}, which lies among the study's records", required)
        if _is_in(place, [*asides]):
            name = next(name for aside, name in asides.items() if _is_in(place, [aside]))
            yield Problem(where, f"{stage.output}, where what {name} gave before is put aside", required)
        earlier[place] = stage.name


def inputs(stage: Stage, stages: Mapping[str, Stage], run_dir: Path, files: sums.FileSums) -> dict[str, str]:
    """Return the sum of each input: the words, the config as loaded, the files and folders that both name, and what earlier stages gave.

    Earlier stages are those in `after`, and those whose output the words or the config name.
    """
    before = dict.fromkeys((*stage.task.after, *sources(stage, stages)))
    gifts = {f"output of {name}": gave(stages[name], files) or "nothing" for name in before}
    return {**stage.given, **sums.of_paths(_outside(stage, stages, run_dir), files), **gifts}


def decide(stage: Stage, kept: record.Record | None, stages: Mapping[str, Stage], run_dir: Path, files: sums.FileSums) -> record.Decision:
    """Say whether a stage runs, by the sums of its inputs as they are now. kept: its record."""
    if kept is None:  # what it is given need not be read yet
        return record.Decision(True, "not run yet")
    return record.decide(kept, inputs(stage, stages, run_dir, files), gave(stage, files), stage.resumes, stage.grows)


def sources(stage: Stage, stages: Mapping[str, Stage]) -> list[str]:
    """Return the stages whose output a stage's words or config name, or a place in it."""
    named = {os.path.abspath(text) for text in _texts(stage)}
    made = {other.name: os.path.abspath(other.output) for other in stages.values() if other.output is not None and other.name != stage.name}
    return [name for name, place in made.items() if any(path == place or path.startswith(f"{place}/") for path in named)]


def _check_sources(stages: Mapping[str, Stage]) -> Iterator[Problem]:
    """Check that each stage comes after those whose output it names."""
    graph = [stage.task for stage in stages.values()]
    for stage in stages.values():
        for name in sources(stage, stages):
            if name not in needed(graph, [stage.name]):
                yield Problem(f"stage {stage.name}: after", f"not {name}", f"{name}, for it names {stages[name].output}", "add it to after")


def gave(stage: Stage, files: sums.FileSums) -> str | None:
    """Return the sum of what a stage gave: its output, or else its result. None: it is not there."""
    if stage.has_result and not stage.result.is_file():
        return None
    if stage.output is None and not stage.has_result and not stage.result.is_file():
        return "nothing to give"
    return sums.of_output(stage.output or stage.result, files)


def clear(stage: Stage, decision: record.Decision, run_dir: Path) -> None:
    """Remove an unfinished output, or put one of other inputs aside as NAME.old. Raises: InputError as `uncleared` says."""
    raise_problems(uncleared(stage, decision, run_dir))
    output = stage.output
    if output is None or not _is_in_the_way(output, decision):
        return
    aside = output.with_name(f"{output.name}.old")
    if decision.output == "aside":
        _remove(aside)
        output.rename(aside)
    else:
        _remove(output)


def uncleared(stage: Stage, decision: record.Decision, run_dir: Path) -> list[Problem]:
    """Return the problem of an output that would have to go and lies outside run_dir, whose outputs alone are the study's to touch."""
    output = stage.output
    if output is None or not _is_in_the_way(output, decision) or _is_in(output.parent.resolve(), [run_dir.resolve()]):
        return []
    found = f"{output}, unfinished or of other inputs ({decision.reason})"
    return [Problem("output", found, f"an output within {run_dir}", "move it away by hand; the stage then runs")]


def _is_in_the_way(output: Path, decision: record.Decision) -> bool:
    return decision.output != "keep" and os.path.lexists(output)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _outside(stage: Stage, stages: Mapping[str, Stage], run_dir: Path) -> list[Path]:
    """Return the files and folders that a stage's words and config name, that are there, and that no stage makes: a script, a model, a policy.

    Not the config's YAML, whose values count, no folder that holds the study, and of what is in run_dir the stages' results alone: a script
    without `output` may write there.
    """
    listed = [Path(text) for text in _words(stage) if _exists(text)] + [path for path in _named(stage.config) if path.exists()]
    if stage.config is not None and stage.call is not None:
        listed = [path for path in listed if path != stage.call.config[0]]
    root = run_dir.resolve()
    above, results = {root, *root.parents}, root / record.FOLDER
    places = {path: path.resolve() for path in dict.fromkeys(listed)}
    outside = {
        path: place
        for path, place in places.items()
        if place not in above and (root not in place.parents or (results in place.parents and place.name == record.RESULT))
    }
    made = [other.output.resolve() for other in stages.values() if other.output is not None] if outside else []
    return [path for path, place in outside.items() if not _is_in(place, made)]


def unknown_outputs(stages: Mapping[str, Stage], wanted: Collection[str], records: Collection[str]) -> list[Problem]:
    """Return the outputs of wanted stages that are there, though no record says that this study began their stage."""
    return [
        Problem(f"stage {name}: output", f"{stage.output}, which this study did not make", "nothing there", "move it away")
        for name, stage in stages.items()
        if name in wanted and name not in records and stage.output is not None and sums.is_there(stage.output)
    ]


def _is_in(place: Path, folders: Sequence[Path]) -> bool:
    return any(folder == place or folder in place.parents for folder in folders)


def _named(config: Any) -> Iterator[Path]:
    """Yield the paths that a config names, and the files that its globs match."""
    yield from _values(config, Path)
    for text in [] if config is None else paths.named(to_dict(config), type(config)):
        yield from [Path(text)] if not glob.has_magic(text) or os.path.lexists(text) else map(Path, sorted(glob.glob(text, recursive=True)))


def _words(stage: Stage) -> Iterator[str]:
    """Yield what of the words may be a path: NAME, key=NAME, NAME=weight."""
    for word in stage.task.words:
        yield from filter(None, (word, word.partition("=")[2], word.rpartition("=")[0]))


def _texts(stage: Stage) -> Iterator[str]:
    yield from _words(stage)
    yield from map(str, _values(stage.config, (Path, str)))


def _exists(word: str) -> bool:
    try:
        return ("/" in word or Path(word).suffix != "") and Path(word).exists()
    except (OSError, ValueError):  # a word that is too long, or holds a NUL
        return False


def _values(value: Any, kinds: Any) -> Iterator[Any]:
    """Yield every value of these types in a config."""
    if isinstance(value, kinds):
        yield value
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _values(getattr(value, item.name), kinds)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _values(part, kinds)
    elif isinstance(value, tuple):
        for part in value:
            yield from _values(part, kinds)
