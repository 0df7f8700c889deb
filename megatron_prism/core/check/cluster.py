"""Checks of a cluster and of a pipeline: pure functions that return every problem, before anything is submitted."""

from __future__ import annotations

import graphlib
import re
from collections.abc import Iterator

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config import ClusterConfig, GangConfig, PipelineConfig
from megatron_prism.core.errors import Problem

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Options that the script sets itself: a second value would silently override them.
OURS = {
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "cpus-per-task",
    "mem",
    "time",
    "signal",
    "requeue",
    "no-requeue",
    "open-mode",
    "output",
    "error",
    "array",
    "dependency",
    "job-name",
    "account",
    "partition",
    "qos",
    "gres",
    "gpus-per-node",
    "exclusive",
    "chdir",
}


def check_cluster(cluster: ClusterConfig) -> list[Problem]:
    """Return the problems of a cluster's keys."""
    return [*check_bounds(cluster), *_check_words(cluster), *_check_text(cluster), *_check_time(cluster)]


def _check_time(cluster: ClusterConfig) -> Iterator[Problem]:
    """Check that a job has time to work before it is told that its time is up: otherwise it would be requeued again and again."""
    for key, limit in (("time_limit", cluster.time_limit), ("cpu.time_limit", cluster.cpu.time_limit)):
        if (limit_s := seconds(limit)) is not None and limit_s <= cluster.signal_before_s:
            required = f"more than signal_before_s, {cluster.signal_before_s} s"
            yield Problem(key, f"{limit!r}, {limit_s} s", required, "raise it, or lower signal_before_s")


def seconds(limit: str) -> int | None:
    """Return a time limit in seconds. None: no limit, or not in Slurm's notation.

    Source: man sbatch, --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    total_s = 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return total_s or None  # 0 is no limit


def _check_words(cluster: ClusterConfig) -> Iterator[Problem]:
    if (cluster.gpus_per_node > 0) == (cluster.processes_per_node > 0):
        found = f"gpus_per_node {cluster.gpus_per_node}, processes_per_node {cluster.processes_per_node}"
        yield Problem("gpus_per_node", found, "one of them above 0", "processes_per_node is for a cluster without GPUs")
    for index, option in enumerate(cluster.sbatch):
        if (name := option.removeprefix("--").partition("=")[0]) in OURS:
            yield Problem(f"sbatch.{index}", repr(option), f"an option that the script does not set itself, as it does --{name}")
    for index, command in enumerate(cluster.setup):
        if not command:
            yield Problem(f"setup.{index}", "no words", "a command, as [module, load, cuda/12.8]")
    if cluster.venv is not None and cluster.container is not None:
        yield Problem("venv", "both venv and container", "one of them", "install prism in the image")
    for index, mount in enumerate(cluster.container.mounts if cluster.container else ()):
        if not 2 <= len(mount.split(":")) <= 3 or "," in mount:
            yield Problem(f"container.mounts.{index}", repr(mount), "host:container or host:container:flags, without a comma")
        if any(part.startswith("~") for part in mount.split(":")):
            yield Problem(f"container.mounts.{index}", repr(mount), "no ~ in the container's path", "write $HOME, or the path out")
    for name in cluster.environment:
        if not VARIABLE.fullmatch(name):
            yield Problem("environment", repr(name), "the name of an environment variable")


def _check_text(cluster: ClusterConfig) -> Iterator[Problem]:
    """Check that values on #SBATCH lines have no line break, and that no argument of a process holds a NUL."""
    lines = {
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "gres": cluster.gres,
        "mem": cluster.mem,
        "cpu.partition": cluster.cpu.partition,
        "cpu.mem": cluster.cpu.mem,
        **{f"sbatch.{index}": option for index, option in enumerate(cluster.sbatch)},
    }
    for key, value in lines.items():
        if value is not None and (value == "" or not value.isprintable()):
            yield Problem(key, repr(value), "one line of text")
    words = {
        "venv": str(cluster.venv or ""),
        **{f"setup.{index}": "".join(command) for index, command in enumerate(cluster.setup)},
        **{f"environment.{name}": value for name, value in cluster.environment.items()},
    }
    if cluster.container is not None:
        words |= {
            "container.image": cluster.container.image,
            "container.mounts": "".join(cluster.container.mounts),
            "container.workdir": cluster.container.workdir or "",
        }
    yield from (_no_argument(key) for key, value in words.items() if not is_argument(value))


def is_argument(text: str) -> bool:
    """Say whether a text can be an argument of a process: no NUL, and encodable as UTF-8."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _no_argument(key: str) -> Problem:
    return Problem(key, "a text with a NUL or half a character", "a text that can be handed to a process")


def check_pipeline(pipeline: PipelineConfig) -> list[Problem]:
    """Return the problems of a pipeline's jobs: their names, commands and dependencies."""
    names = [job.name for job in pipeline.stages]
    problems = [*check_bounds(pipeline)]
    if not names:
        problems.append(Problem("stages", "none", "at least one"))
    folder = str(pipeline.run_dir)
    if not folder.isprintable() or "\\" in folder:
        problems.append(Problem("run_dir", repr(folder), "a path on one line, without a backslash", "Slurm writes the logs there"))
    elements = {element_name(job.name, index): job.name for job in pipeline.stages for index in range(len(job.array))}
    for index, job in enumerate(pipeline.stages):
        place = f"stages.{index}"
        if job.name in names[:index]:
            problems.append(Problem(f"{place}.name", repr(job.name), "a name that no other stage has"))
        if job.name in elements:
            problems.append(Problem(f"{place}.name", f"{job.name!r}, as an element of {elements[job.name]} is named", "another name"))
        if not job.command:
            problems.append(Problem(f"{place}.command", "no words", "a job of prism and its arguments, as [train, my_run.yaml]"))
        if not all(map(is_argument, (*job.command, *(word for words in job.array for word in words)))):
            problems.append(_no_argument(f"{place}.command"))
        problems += [
            Problem(f"{place}.after", repr(name), f"one of the stages: {', '.join(names)}") for name in job.after if name not in names
        ]
    try:
        order(pipeline)
    except graphlib.CycleError as error:
        problems.append(
            Problem("stages", f"stages that wait for each other: {' <- '.join(error.args[1])}", "an order in which they can run")
        )
    return problems


def element_name(array: str, index: int | str) -> str:
    """Return the name of a job array's element, by which its events are kept. No job has it (check_pipeline)."""
    return f"{array}_{index}"


def order(pipeline: PipelineConfig) -> list[str]:
    """Return the jobs' names, each after those it waits for, otherwise in the given order. Raises: graphlib.CycleError."""
    return list(graphlib.TopologicalSorter({job.name: job.after for job in pipeline.stages}).static_order())


def check_world_size(gang: GangConfig, cluster: ClusterConfig) -> list[Problem]:
    """Return why a gang does not fit on whole nodes, or on a part of one."""
    size, each = gang.world_size, cluster.ranks_per_node
    if size is None:
        fix = "set it, here or in the config: world_size=8; prism plan says which sizes fit"
        return [Problem("world_size", "no value", "how many GPUs (ranks) the run is laid out for", fix)]
    if size < 1 or (size > each and size % each):
        return [Problem("world_size", str(size), f"a multiple of the {each} ranks of a node, or fewer than {each}")]
    return []
