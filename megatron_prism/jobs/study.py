"""`prism study`: run a graph of stages on this machine, keep what each gave, and judge the study's claims on it.

RUN_DIR/study keeps a record of each stage (study/record.py). A stage that has ended is not run again unless the sum of an input changed. A stage that
failed stops the stages that need it, and no others.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_prism.core import disk, log
from megatron_prism.core.check.study import check_study
from megatron_prism.core.config import StudyConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.manifest import read_json, write_json
from megatron_prism.jobs import study_slurm, study_stages
from megatron_prism.jobs.study_stages import Stage
from megatron_prism.launch.pipeline import Read
from megatron_prism.parallel import signals
from megatron_prism.study import child, claims, overview, record, sums
from megatron_prism.study.graph import needed
from megatron_prism.study.overview import BLOCKED, CHANGED, DONE, ENDED, FAILED, NO_GO, RUNNING, STOPPED, TO_RUN

POLL_S = 0.1
CLAIM = ("name", "says", "source", "judged_at", "note", "state", "figures")  # of a claim, as --beside reads it
TOLD_S = 60.0  # a line of what runs, where standard error is no terminal
STOPPED_CODE = 3
ASKED_CODES = (STOPPED_CODE, *(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)))


@dataclass(eq=False)
class Study:
    """A study at work: its stages in order, the record and state of each, and those that run."""

    config: StudyConfig
    stages: Mapping[str, Stage]
    files: sums.FileSums
    wanted: Collection[str]
    records: dict[str, record.Record] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    running: dict[str, child.Child] = field(default_factory=dict)
    signals: list[int] = field(default_factory=list)
    alone: str | None = None


def read(config: StudyConfig, read_words: Read, only: Sequence[str] = (), until: Sequence[str] = (), alone: str | None = None) -> Study:
    """Check a study's config, and read its stages and what is kept of them. alone: one stage, or one element of an array.

    Raises: InputError with every problem.
    """
    raise_problems(check_study(config))
    stages = {stage.name: stage for stage in study_stages.read(config, read_words)}
    graph = [stage.task for stage in stages.values()]
    known = {name for task in graph for name in (task.name, task.stage.name)}
    asked = (("--only", only, known), ("--until", until, known), ("--stage", [alone] if alone is not None else [], set(stages)))
    raise_problems(
        [
            Problem(option, repr(name), f"stages of this study: {', '.join(sorted(there))}")
            for option, names, there in asked
            for name in names
            if name not in there
        ]
    )
    only = only if alone is None else [alone]
    chosen = {task.name for task in graph if task.name in only or task.stage.name in only}
    wanted = chosen if only else needed(graph, until) if until else set(stages)
    study = Study(config, stages, sums.FileSums(config.run_dir / record.FOLDER / record.SUMS), wanted)
    look(study)
    return study


def look(study: Study) -> None:
    """Say of each stage whether it is done, or is to run and why, as far as that is known before the stages before it have run."""
    for name, stage in study.stages.items():
        if (kept := record.read(stage.folder)) is not None:
            study.records[name] = study_slurm.adopted(stage, kept, study.stages, study.config.run_dir, study.files)
        again = [before for before in stage.task.after if study.states[before] not in ENDED]
        decision = _decide(study, stage)
        if not decision.runs and not again:
            study.states[name], study.reasons[name] = study.records[name].state, ""
        else:
            ended = name in study.records and study.records[name].state in ENDED
            study.states[name] = CHANGED if ended else TO_RUN
            study.reasons[name] = decision.reason if decision.runs else f"after {', '.join(again)}"


def standing(study: Study) -> dict[str, Any]:
    """Return the study as it stands: what failed or was stopped is told as that, and what runs now as that."""
    is_at_work = disk.is_held(study.config.run_dir / record.FOLDER / record.LOCK)
    for name, kept in study.records.items():
        is_here = kept.state == RUNNING and (is_at_work or disk.is_held(study.stages[name].folder / record.LOCK))
        if kept.state in (FAILED, STOPPED, "submitted") or is_here:
            study.states[name] = kept.state
    return describe(study)


def beside(result: dict[str, Any], run_dirs: Sequence[Path]) -> dict[str, Any]:
    """Return a study as it stands with "over_studies": its claims and those of other studies of the same graph (seeds), put together.

    Raises: InputError where a folder holds no study of that name.
    """
    judged, problems = [result["claims"]], []
    places = [Path(result["run_dir"]).resolve()]
    for run_dir in run_dirs:
        if run_dir.resolve() in places:
            problems.append(Problem("--beside", str(run_dir), "a study that is not counted already"))
        places.append(run_dir.resolve())
        path = run_dir / record.FOLDER / record.STUDY
        try:
            with disk.reading(path):
                other = read_json(path)
            judged.append([{key: claim[key] for key in CLAIM} for claim in other["claims"]])
            if other["kind"] != overview.KIND or other["name"] != result["name"]:
                problems.append(Problem(str(path), f"the study {other['name']}", f"one of {result['name']}"))
        except OSError as error:
            problems.append(Problem("--beside", f"{run_dir}: {disk.unread(run_dir, error)}", "the run_dir of a study that has begun"))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(Problem(str(path), f"{type(error).__name__}: {error}", "a study that has begun"))
    raise_problems(problems)
    return {**result, "over_studies": claims.over_seeds(judged)}


def _decide(study: Study, stage: Stage) -> record.Decision:
    return study_stages.decide(stage, study.records.get(stage.name), study.stages, study.config.run_dir, study.files)


def run(study: Study, alone: str | None = None) -> dict[str, Any]:
    """Run the stages that are wanted, and return the study as it stands then: overview.py.

    alone: the one stage that is wanted, as a job of Slurm beside jobs of others, which may run in the same run_dir.
    Raises: InputError where an output is there that no record is of. EnvironmentFault where another `prism study` runs in this run_dir.
    """
    folder = study.config.run_dir / record.FOLDER
    place = folder if alone is None else study.stages[alone].folder
    with disk.writing(folder), ExitStack() as stack:
        place.mkdir(parents=True, exist_ok=True)
        stack.enter_context(disk.held(place / record.LOCK, "prism study"))
        look(study)  # again: another start may have done something since
        study_slurm.keep_adopted(study.stages, study.records)
        study.alone = alone
        raise_problems(study_stages.unknown_outputs(study.stages, study.wanted, study.records))
        _heed(study, stack)
        try:
            _loop(study)
        finally:
            for each in study.running.values():
                each.kill()
    return describe(study)


def _heed(study: Study, stack: ExitStack) -> None:
    """Note the signals that ask to stop, until the stack ends."""
    for name in signals.heeded():
        before = signal.signal(name, lambda number, frame: study.signals.append(number))
        stack.callback(signal.signal, name, before)


def _loop(study: Study) -> None:
    waiting = [name for name in study.stages if name in study.wanted]
    heard, told_at = 0, time.monotonic()
    write(study)
    while waiting or study.running:
        if len(study.signals) > heard:
            heard = len(study.signals)
            _stop(study, heard)
        if not heard:
            waiting = [name for name in waiting if not _settled(study, name)]
        elif not study.running:
            break
        for name, each in list(study.running.items()):
            if (ended := each.ended()) is not None:
                del study.running[name]
                _end(study, study.stages[name], ended)
        told_at = overview.progress(_progress(study, len(waiting)), told_at, TOLD_S)
        time.sleep(POLL_S)


def _progress(study: Study, num_waiting: int) -> str:
    now = time.monotonic()
    running = ", ".join(f"{name} {log.duration(now - each.began)}" for name, each in study.running.items())
    ended = sum(study.states[name] in ENDED for name in study.wanted)
    return f"{ended} of {len(study.wanted)} done, {num_waiting} waiting; {running}" if running else ""


def _stop(study: Study, num_signals: int) -> None:
    """Ask the running stages to save and end; upon a second signal kill them."""
    log.get().info("stopping: %s", ", ".join(study.running) if study.running else "no stage runs")
    for each in study.running.values():
        each.ask_to_stop() if num_signals == 1 else each.kill()


def _settled(study: Study, name: str) -> bool:
    """Start a stage, or see that it need not or cannot run. False: it still waits."""
    stage = study.stages[name]
    before = {study.states[other] for other in stage.task.after}
    if before & {FAILED, BLOCKED, STOPPED} or any(
        other not in study.wanted and study.states[other] not in ENDED for other in stage.task.after
    ):
        bad = [other for other in stage.task.after if study.states[other] not in ENDED]
        _note(study, name, BLOCKED, f"needs {', '.join(bad)}")
        return True
    if not before <= set(ENDED) or len(study.running) >= study.config.num_parallel:
        return False
    decision = _decide(study, stage)
    study.files.save()
    if not decision.runs:
        _note(study, name, study.records[name].state, "")
        return True
    _start(study, stage, decision)
    return True


def _start(study: Study, stage: Stage, decision: record.Decision) -> None:
    if (again := study.records.get(stage.name)) is not None:
        log.get().info("%s runs again: %s", stage.name, decision.reason)
    try:
        study_stages.clear(stage, decision, study.config.run_dir)
    except InputError as error:
        _note(study, stage.name, FAILED, str(error))  # its record stays: with the inputs as they were, it is done
        log.get().error("%s: %s", stage.name, error)
        return
    given = study_stages.inputs(stage, study.stages, study.config.run_dir, study.files)
    same = again if again is not None and again.inputs == given else record.Record(state="running", inputs=given)
    output = None if stage.output is None else str(stage.output)
    begun = replace(same, state="running", output=output, output_sum=None, started=overview.now(), ended=None, exit_code=None, failure=None)
    _keep(study, stage, replace(begun, num_starts=same.num_starts + 1))
    stage.result.unlink(missing_ok=True)
    environment = {**study.config.environment, study_stages.RESULT_VARIABLE: str(stage.result.absolute())}
    study.running[stage.name] = child.start(stage.command, stage.folder / record.LOG, environment)
    _note(study, stage.name, RUNNING, decision.reason)


def _end(study: Study, stage: Stage, ended: child.Ended) -> None:
    """Keep how a stage ended."""
    state = _state(study, stage, ended.exit_code)
    output_sum = study_stages.gave(stage, study.files) if state in ENDED else None
    last = child.last_line(stage.folder / record.LOG, ended.log_begins)
    failure = (last or f"exit code {ended.exit_code}, and it printed nothing") if state not in ENDED else None
    if state in ENDED and output_sum is None:
        state, failure = FAILED, f"exit code {ended.exit_code}, and no {stage.output or stage.result}"
    before = study.records[stage.name]
    kept = replace(
        before,
        state=state,  # type: ignore[arg-type]  # never to run, changed or blocked
        output_sum=output_sum,
        ended=overview.now(),
        seconds=before.seconds + ended.seconds,
        cpu_s=before.cpu_s + ended.cpu_s,
        exit_code=ended.exit_code,
        failure=failure,
    )
    _keep(study, stage, kept)
    study.files.save()
    _note(study, stage.name, state, study.reasons.get(stage.name, "") if state not in ENDED else "")
    log.get().info("%s: %s in %s%s", stage.name, state, log.duration(ended.seconds), f": {failure}" if failure else "")


def _state(study: Study, stage: Stage, code: int) -> str:
    if code == 0:
        return DONE
    if code == 1 and stage.task.stage.on_failure == "report":
        return NO_GO
    return STOPPED if code == STOPPED_CODE or (study.signals and code in ASKED_CODES) else FAILED


def _keep(study: Study, stage: Stage, kept: record.Record) -> None:
    study.records[stage.name] = kept
    record.write(stage.folder, kept)


def _note(study: Study, name: str, state: str, reason: str) -> None:
    study.states[name], study.reasons[name] = state, reason
    write(study)


def write(study: Study) -> None:
    """Write study.json. A stage that runs alone reads first how the others stand, which other jobs run."""
    for name, stage in study.stages.items() if study.alone else ():
        if name != study.alone and (kept := record.read(stage.folder)) is not None and study.states[name] != CHANGED:
            study.records[name], study.states[name] = kept, kept.state
    write_json(study.config.run_dir / record.FOLDER / record.STUDY, describe(study))


def describe(study: Study) -> dict[str, Any]:
    """Return the study as it stands: its stages, and its claims judged on the results of those that are done."""
    stages = {name: _describe(study, stage) for name, stage in study.stages.items()}
    results: dict[str, Any] = {}
    for name, stage in study.stages.items():
        result = record.result(stage.folder) if study.states[name] in ENDED else None
        if stage.task.stage.array:
            results.setdefault(stage.task.stage.name, []).append(result)
        else:
            results[name] = result
    return {
        "kind": overview.KIND,
        "name": study.config.name,
        "run_dir": str(study.config.run_dir),
        "updated": overview.now(),
        "stages": stages,
        "claims": claims.judge(study.config.claims, results),
    }


def _describe(study: Study, stage: Stage) -> dict[str, Any]:
    kept = study.records.get(stage.name, record.Record(state="running"))
    return {
        "title": stage.task.stage.title or stage.name,
        "model": stage.task.stage.model,
        "job": stage.job,
        "command": list(stage.task.words),
        "after": list(stage.task.after),
        "state": study.states[stage.name],
        "reason": study.reasons[stage.name],
        "output": None if stage.output is None else str(stage.output),
        "result": str(stage.result) if stage.result.is_file() else None,
        "log": str(stage.folder / record.LOG),
        "started": kept.started or None,
        "ended": kept.ended,
        "seconds": kept.seconds,
        "cpu_s": kept.cpu_s,
        "num_starts": kept.num_starts,
        "exit_code": kept.exit_code,
        "failure": kept.failure,
    }
