"""`prism study --cluster`: the stages that are to run, as a chain of Slurm jobs through `prism submit`, and what its jobs say when they are done.

A gang's stage is its own command under srun. Any other stage is a job `prism study CONFIG --stage NAME`, which keeps its record as at home. The record
of a gang's stage is made from the events that its job's script wrote: by each later job of the study, and by `prism study --status`.
"""

from __future__ import annotations

import calendar
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core import paths
from megatron_prism.core.check.cluster import element_name
from megatron_prism.core.errors import raise_problems
from megatron_prism.jobs import study_stages, submit
from megatron_prism.jobs.study_stages import Stage
from megatron_prism.launch import slurm
from megatron_prism.launch.pipeline import FOLDER, GANG_JOBS, Read
from megatron_prism.study import overview, record, sums
from megatron_prism.study.record import Decision, Record

if TYPE_CHECKING:
    from megatron_prism.jobs.study import Study

TIME = "%Y-%m-%dT%H:%M:%SZ"  # of an event


def adopted(stage: Stage, kept: Record, stages: Mapping[str, Stage], run_dir: Path, files: sums.FileSums) -> Record:
    """Return the record of a stage that Slurm ran: done or failed where its job's script says so. Any other record unchanged."""
    if kept.state != "submitted":
        return kept
    lines = [line.split(" ", 2) for line in _events(stage, run_dir)]
    if not lines or len(lines[-1]) < 3:
        return kept
    last = lines[-1][2]
    facts: dict[str, Any] = {
        "started": lines[0][0],
        "ended": lines[-1][0],
        "seconds": _seconds(lines),
        "num_starts": sum(" start " in f" {line[-1]}" for line in lines),
    }
    if last != "done" and not last.startswith("stopped"):
        return kept
    kept = replace(kept, inputs={**study_stages.inputs(stage, stages, run_dir, files), **kept.inputs})
    if last.startswith("stopped"):
        return replace(kept, state="failed", failure=last, **facts)
    output_sum = study_stages.gave(stage, files)
    if output_sum is None:
        return replace(kept, state="failed", failure=f"done, and no {stage.output or stage.result}", **facts)
    return replace(kept, state="done", output_sum=output_sum, exit_code=0, **facts)


def keep_adopted(stages: Mapping[str, Stage], records: Mapping[str, Record]) -> None:
    """Write the records that `adopted` made, before anything is built on them: a later change of an input is then seen."""
    for name, made in records.items():
        before = record.read(stages[name].folder)
        if before is not None and before.state == "submitted" != made.state:
            record.write(stages[name].folder, made)


def _events(stage: Stage, run_dir: Path) -> list[str]:
    name, _, index = stage.name.partition("/")
    path = slurm.Job(name, name, run_dir / FOLDER, ()).events(int(index) if index else None)
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _seconds(lines: Sequence[Sequence[str]]) -> float:
    """Return the time from each start to the next event."""
    total = 0
    for line, after in itertools.pairwise(lines):
        if line[-1].startswith("start"):
            total += calendar.timegm(time.strptime(after[0], TIME)) - calendar.timegm(time.strptime(line[0], TIME))
    return float(total)


def run(study: Study, words: Sequence[str], cluster: Path, dry_run: bool, read: Read) -> dict[str, Any]:
    """Submit the stages that are to run, or with dry_run return their scripts. words: the study's config and overrides, for its own jobs.

    Raises: InputError with every problem; one of them is an output that would have to be put aside, and lies outside run_dir.
    """
    to_run = [name for name in study.stages if name in study.wanted and study.states[name] not in overview.ENDED]
    folder = study.config.run_dir / FOLDER
    raise_problems(study_stages.unknown_outputs(study.stages, to_run, study.records))
    if not to_run:
        return {"folder": str(folder), "stages": []}
    pipeline = {"name": study.config.name, "run_dir": str(study.config.run_dir), "stages": _jobs(study, to_run, words)}
    given = [f"cluster.environment.{name}={json.dumps(value)}" for name, value in study.config.environment.items()]
    with tempfile.TemporaryDirectory(prefix="prism_study_") as temporary:
        path = Path(temporary) / study_stages.PIPELINE
        path.write_text(json.dumps(pipeline), encoding="utf-8")
        planned = submit.run([str(path), *given], cluster, True, read)
        if dry_run:
            return planned
    _begin(study, to_run, folder)
    path = study.config.run_dir / record.FOLDER / study_stages.PIPELINE
    path.write_text(json.dumps(pipeline, indent=2), encoding="utf-8")
    return submit.run([str(path), *given], cluster, False, read)


def _jobs(study: Study, to_run: Sequence[str], words: Sequence[str]) -> list[dict[str, Any]]:
    """Return the stages as jobs of a pipeline. An array of which only a part is to run is a job for each of these elements."""
    parts: dict[str, list[tuple[str, list[Stage]]]] = {}  # by stage, its jobs: each with its name and what it runs
    for name, group in itertools.groupby((study.stages[each] for each in to_run), lambda stage: stage.task.stage.name):
        elements = list(group)
        is_part = len(elements) < len(elements[0].task.stage.array)
        parts[name] = [(element_name(*each.name.split("/")), [each]) for each in elements] if is_part else [(name, elements)]
    jobs = []
    for config, name, stages in ((stages[0].task.stage, name, stages) for each in parts.values() for name, stages in each):
        is_gang = stages[0].job in GANG_JOBS
        begin = list(config.command) if is_gang else ["study", *words]
        ends = [_end_of_words(stage) if is_gang else ["--stage", stage.name] for stage in stages]
        after = [job for before in config.after for job, _ in parts.get(before, [])]
        if name == config.name and config.array:
            jobs.append({"name": name, "after": after, "command": begin, "array": ends})
        else:
            jobs.append({"name": name, "after": after, "command": [*begin, *ends[0]]})
    return jobs


def _end_of_words(stage: Stage) -> list[str]:
    own = list(stage.task.words[len(stage.task.stage.command) :])
    return [*own, "--json", paths.escaped(str(stage.result))]


def _begin(study: Study, to_run: Sequence[str], folder: Path) -> None:
    """Note that the gangs' stages are submitted, and put aside what they gave of other inputs. Nothing is changed where a job is still at work."""
    submitted = folder / submit.SUBMITTED
    if submitted.is_file():
        submit.refuse_twice({entry["name"]: entry for entry in json.loads(submitted.read_text(encoding="utf-8"))["stages"]}, folder)
    (study.config.run_dir / record.FOLDER).mkdir(parents=True, exist_ok=True)
    keep_adopted(study.stages, study.records)
    stale: set[str] = set()
    gangs: dict[str, Decision] = {}
    for name, stage in study.stages.items():
        decision = study_stages.decide(stage, study.records.get(name), study.stages, study.config.run_dir, study.files)
        if decision.output == "aside" or stale & set(stage.task.after):
            stale.add(name)
        if name in to_run and stage.job in GANG_JOBS:
            gangs[name] = Decision(True, decision.reason, "aside" if name in stale else "keep")
    problems = {name: study_stages.uncleared(study.stages[name], decision, study.config.run_dir) for name, decision in gangs.items()}
    raise_problems(
        [replace(each, where=f"stage {name}: {each.where}") for name, of in problems.items() for each in of]
    )  # before anything moves
    for name, decision in gangs.items():
        study_stages.clear(study.stages[name], decision, study.config.run_dir)
    for name in to_run:
        _submitted(study, study.stages[name], folder)


def _submitted(study: Study, stage: Stage, folder: Path) -> None:
    """Forget the events of an earlier submission, by which `prism submit` would take the stage for done, and record a gang's stage."""
    name, _, index = stage.name.partition("/")
    slurm.Job(name, name, folder, ()).events(int(index) if index else None).unlink(missing_ok=True)
    if stage.job in GANG_JOBS:
        inputs = study_stages.inputs(stage, study.stages, study.config.run_dir, study.files)
        known = {key: value for key, value in inputs.items() if not key.startswith("output of ")}
        record.write(stage.folder, Record(state="submitted", inputs=known, output=None if stage.output is None else str(stage.output)))
        stage.result.unlink(missing_ok=True)
