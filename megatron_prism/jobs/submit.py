"""`prism submit`: write sbatch scripts for a job or a pipeline, and submit them to Slurm.

RUN_DIR/slurm/ keeps each job's script, its logs, its events (one line per start, save, fault and end, written by the script) and
submitted.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from shlex import join
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.check.cluster import check_cluster, check_world_size, element_name, order
from megatron_prism.core.config import ClusterConfig, JobConfig, RLConfig, RunConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import load, placed
from megatron_prism.core.manifest import describe, read_json, write_json, write_text
from megatron_prism.jobs import gangs
from megatron_prism.jobs import plan as job_plan
from megatron_prism.jobs.gangs import Gang
from megatron_prism.launch import slurm
from megatron_prism.launch.pipeline import CONFIGS, GANG_JOBS, Call, Read, call_of, in_full, output, read_pipeline, split
from megatron_prism.parallel import environment

SUBMITTED = "submitted.json"


@dataclass(frozen=True)
class Planned:
    """A job as in the pipeline's YAML, the same job for Slurm, and the configs of its gang (one per array element)."""

    entry: JobConfig
    job: slurm.Job
    configs: tuple[Gang, ...] = ()


def run(words: Sequence[str], cluster_path: Path, dry_run: bool, read: Read, num_tasks: int | None = None) -> dict[str, Any]:
    """Plan every job of a pipeline. Unless dry_run, submit those that are not done. Return the outcome of each.

    words: a job and its arguments, or a pipeline's path and its overrides. Overrides of the cluster (`cluster.a=b`) come before them.
    num_tasks: of the job array that makes a mixture; None for the cluster's own.
    Raises: InputError with every problem of the cluster, the pipeline and its configs, before anything is written. EnvironmentFault
    where there is no Slurm.
    """
    asked, overrides = split(words, read)
    cluster = load(cluster_path, ClusterConfig, overrides)
    with placed(cluster_path, ClusterConfig, overrides):
        raise_problems(check_cluster(cluster))
    if (words := in_full(asked, read)) != asked:
        log.get().info("%s is no pipeline; in full: prism submit --cluster %s -- %s", asked[0], cluster_path, join(words))
    pipeline, folder = read_pipeline(words, read, num_tasks or cluster.cpu.prepare_tasks)
    by_name = {entry.name: entry for entry in pipeline.stages}
    planned = plan([by_name[name] for name in order(pipeline)], pipeline.name, folder, cluster, read)
    _warn_of_short_notice(planned, cluster)
    _warn_of_absent(cluster)
    if dry_run:
        return {"texts": [slurm.render(each.job, cluster) for each in planned], "stages": [_summary(each) for each in planned]}
    _check_first(planned)
    told = {"asked": join(words), "cluster": str(cluster_path), "submitted_from": os.getcwd()}
    return {"folder": str(folder), "stages": _submit(planned, folder, cluster, told)}


def plan(entries: Sequence[JobConfig], title: str, folder: Path, cluster: ClusterConfig, read: Read) -> list[Planned]:
    """Return each job for Slurm. Raises: InputError with the problems of all jobs."""
    planned, problems = [], []
    for entry in entries:
        try:
            planned.append(_plan(entry, title if len(entries) == 1 else f"{title}-{entry.name}", folder, cluster, read))
        except InputError as error:
            problems += [
                replace(problem, where=f"stage {entry.name}: {problem.where}" if len(entries) > 1 else problem.where)
                for problem in error.problems
            ]
    raise_problems(problems)
    return planned


def _plan(entry: JobConfig, title: str, folder: Path, cluster: ClusterConfig, read: Read) -> Planned:
    job = slurm.Job(entry.name, title, folder, entry.command, environment=cluster.environment, array=dict(enumerate(entry.array)))
    calls = [call_of([*entry.command, *words], read) for words in entry.array or ((),)]
    if calls[0].job not in GANG_JOBS:
        return Planned(entry, job)
    configs = [_gang_config(call, cluster) for call in calls]
    first = configs[0]
    problems = []
    for key, kinds in (
        ("world_size", {config.world_size for config in configs}),
        ("environment", {str(environment.variables(config)) for config in configs}),
    ):
        if len(kinds) > 1:
            problems.append(Problem("array", f"elements that differ in {key}", "the same for all", "make a stage for each"))
    if len({output(config) for config in configs}) < len(configs):
        problems.append(Problem("array", "elements that share a run_dir", "a run_dir for each"))
    raise_problems(problems)
    assert first.world_size is not None  # check_world_size
    each = min(first.world_size, cluster.ranks_per_node)
    variables = {**environment.variables(first), **cluster.environment, **first.environment}
    checkpoints = tuple(map(gangs.progress, configs))
    job = replace(job, nodes=first.world_size // each, ranks_per_node=each, environment=variables, checkpoints=checkpoints)
    return Planned(entry, job, tuple(configs))


def _gang_config(call: Call, cluster: ClusterConfig) -> Gang:
    path, overrides = call.config
    kind = CONFIGS[call.job]
    config: Gang = load(path, kind, overrides)
    with placed(path, kind, overrides):
        raise_problems(check_world_size(config, cluster) or gangs.GANGS[kind].check(config, config.world_size or 1))
    return config


def _check_first(planned: Sequence[Planned]) -> None:
    """Check in full, with data and checkpoint, the jobs that would start at once. A job that waits for others cannot be checked yet."""
    for config in [config for each in planned if not each.entry.after for config in each.configs]:
        assert config.world_size is not None  # check_world_size
        gangs.resolve(config, config.world_size)


def _warn_of_absent(cluster: ClusterConfig) -> None:
    """Warn of a virtual environment or an image that is not there: each start would find out on its node, after its time in the queue.

    No refusal: a path may be of the nodes alone.
    """
    named = {} if cluster.venv is None else {"venv": cluster.venv / "bin" / "activate"}
    if cluster.container and cluster.container.image.startswith("/"):  # any other may be a registry's
        named["container.image"] = Path(cluster.container.image)
    for key, path in named.items():
        if not path.exists():
            log.get().warning("%s: %s is not on this machine: a job fails at its start where its nodes do not have it either", key, path)


def _warn_of_short_notice(planned: Sequence[Planned], cluster: ClusterConfig) -> None:
    """Warn where the plan's longest step of RL and its save take longer than Slurm's notice: the job would be killed in that step."""
    asked = [  # without `model` a plan needs the checkpoint
        (each.entry.name, config)
        for each in planned
        for config in each.configs
        if isinstance(config, RLConfig) and config.model is not None
    ]
    if not asked:
        return
    # a child process, since a plan hides the GPUs from its process and builds models
    problems, plans = list[Problem](), list[tuple[str, dict[str, Any]]]()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for name, plan_of in [(name, pool.submit(job_plan.run, config, job_plan.Asked())) for name, config in asked]:
            try:
                plans.append((name, plan_of.result()))
            except InputError as error:
                problems += [replace(problem, where=f"stage {name}: {problem.where}") for problem in error.problems]
    raise_problems(problems)
    for name, figures in plans:
        needed_s = figures["step_s_longest"] + figures["checkpoint_save_s"]
        if needed_s > cluster.signal_before_s:
            log.get().warning(
                "stage %s: a step whose responses are full, and its save, take %.0f s by the plan, and Slurm gives notice %d s before "
                "the time limit: a job that is killed within a step goes on from its last checkpoint; cluster.signal_before_s=%d is enough",
                name,
                needed_s,
                cluster.signal_before_s,
                60 * ceil(needed_s / 60 + 1),
            )


def _summary(each: Planned, **facts: Any) -> dict[str, Any]:
    resources = {"nodes": each.job.nodes, "ranks": each.job.nodes * each.job.ranks_per_node or 1}
    return {
        "name": each.entry.name,
        "command": list(each.entry.command),
        "after": list(each.entry.after),
        **resources,
        "array": [list(words) for words in each.entry.array],
        "run_dirs": [str(config.run_dir) for config in each.configs if isinstance(config, RunConfig)],
        **facts,
    }


def _submit(planned: Sequence[Planned], folder: Path, cluster: ClusterConfig, told: Mapping[str, str]) -> list[dict[str, Any]]:
    """Write the scripts and submit them. Skip a job that an earlier submission of the same command finished, unless it follows one not done."""
    before = {entry["name"]: entry for entry in read_json(folder / SUBMITTED)["stages"]} if (folder / SUBMITTED).is_file() else {}
    refuse_twice(before, folder)
    _tell_options()
    folder.mkdir(parents=True, exist_ok=True)
    submitted: list[dict[str, Any]] = []
    ids: dict[str, str] = {}
    for each in planned:
        facts, earlier = _summary(each), before.get(each.entry.name, {})
        done = [False] * len(events(folder, facts)) if set(each.entry.after) & set(ids) else _done(folder, facts, earlier)
        if all(done):
            submitted.append({**facts, "job": earlier["job"], "done_before": True})
            continue
        job = replace(each.job, array={index: words for index, words in each.job.array.items() if not done[index]})
        for index in job.array or [None]:
            job.events(index).unlink(missing_ok=True)
        write_text(job.script, slurm.render(job, cluster))
        ids[job.name] = slurm.submit(job.script, [ids[name] for name in each.entry.after if name in ids])
        submitted.append({**facts, "job": ids[job.name], "done_before": False})
        rest = [entry for name, entry in before.items() if name not in {entry["name"] for entry in submitted}]
        write_json(folder / SUBMITTED, describe("submission", {}, **told, stages=[*submitted, *rest]))
    return submitted


def _done(folder: Path, facts: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[bool]:
    """Say of a job, or of each element of its array, whether an earlier submission of the same command finished it."""
    if earlier.get("command") != facts["command"] or bool(earlier["array"]) != bool(facts["array"]):
        return [False] * len(events(folder, facts))
    same = [index < len(earlier["array"]) and earlier["array"][index] == words for index, words in enumerate(facts["array"])] or [True]
    return [
        is_same and lines[-1:] != [] and lines[-1].endswith(" done") for is_same, lines in zip(same, events(folder, facts), strict=True)
    ]


def refuse_twice(before: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Refuse to submit a job again that still waits or runs: two gangs would share a run folder."""
    states = slurm.states([entry["job"] for entry in before.values()])
    active = [entry for entry in before.values() if slurm.is_active(states.get(entry["job"], ""))]
    required, fix = "no job of this run in the queue", "wait for it (prism status), or scancel it first"
    raise_problems([Problem(str(folder / SUBMITTED), f"job {entry['job']} ({entry['name']})", required, fix) for entry in active])


def _tell_options() -> None:
    """Log the options of sbatch in the submitter's shell. The job follows its script alone."""
    if options := sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in slurm.KEPT):
        log.get().info("not handed on, the cluster's YAML says what a job gets: %s", " ".join(options))


def events(folder: Path, entry: Mapping[str, Any]) -> list[list[str]]:
    """Return the events that a job's script wrote, for each array element: lines of "time job event"."""
    names = [element_name(entry["name"], index) for index in range(len(entry["array"]))] or [entry["name"]]
    paths = [folder / f"{name}.events" for name in names]
    return [path.read_text(encoding="utf-8").splitlines() if path.is_file() else [] for path in paths]
