"""From the arguments of `prism submit` to a pipeline: either one job with its arguments, or a pipeline's YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prism.core import paths
from megatron_prism.core.check.cluster import check_pipeline
from megatron_prism.core.config import (
    CkaConfig,
    EvaluateConfig,
    FilterConfig,
    JobConfig,
    LandscapeConfig,
    MergeConfig,
    MixConfig,
    PipelineConfig,
    PrepareConfig,
    PromptsConfig,
    RLConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
)
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import closest, load, placed

GANG_JOBS = (
    "train",
    "rl",
    "rl filter",
    "evaluate",
    "analyze landscape",
    "analyze cka",
)  # jobs whose config gives the size of their gang; any other job is one process on the cluster's `cpu`
CONFIGS: dict[str, type] = {
    "train": TrainConfig,
    "rl": RLConfig,
    "prepare": PrepareConfig,
    "prompts": PromptsConfig,
    "rl filter": FilterConfig,
    "rl mix": MixConfig,
    "evaluate": EvaluateConfig,
    "merge": MergeConfig,
    "analyze landscape": LandscapeConfig,
    "analyze cka": CkaConfig,
}  # a job's config, which names its output folder
FOLDER, CLUSTER = "slurm", "cluster."


@dataclass(frozen=True)
class Call:
    """A job (`train`, `convert export`) and its arguments, parsed by the command line."""

    job: str
    arguments: Mapping[str, Any]

    @property
    def config(self) -> tuple[Path, list[str]]:
        """The job's YAML and its overrides, after the keys that options of `prism rl` stand for."""
        options = option_keys(self.arguments) if self.job == "rl" else []
        return Path(self.arguments["config"]), [*options, *(self.arguments["overrides"] or ())]


def option_keys(arguments: Mapping[str, Any]) -> list[str]:
    """Return the options of `prism rl` (--record, --only, --from) as the overrides that they stand for."""
    keys = {"record.interval": 1 if arguments["record"] else None, "mode": arguments["only"], "train_from": arguments["source"]}
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


Read = Callable[[Sequence[str]], Call | None]  # from words to the job that they call; None: the first word is not a job


def split(words: Sequence[str], read: Read) -> tuple[list[str], list[str]]:
    """Split the words into what to submit and the overrides of the cluster (before a job, or anywhere beside a pipeline)."""
    first = next((index for index, word in enumerate(words) if not word.startswith(CLUSTER)), len(words))
    end = len(words) if first == len(words) or read(words[first:]) is None else first
    rest = [word for index, word in enumerate(words) if index >= end or not word.startswith(CLUSTER)]
    if not rest:
        raise InputError(Problem("command", " ".join(words), "a pipeline's YAML, or -- and a job of prism"))
    return rest, [word.removeprefix(CLUSTER) for word in words[:end] if word.startswith(CLUSTER)]


def read_pipeline(words: Sequence[str], read: Read, num_tasks: int = 1) -> tuple[PipelineConfig, Path]:
    """Return the words as a pipeline, and the folder of its submission. num_tasks: of the job array that `prepare` alone becomes."""
    if call := read(words):
        return _of_command(words, call, num_tasks)
    path, overrides = _path(words[0]), words[1:]
    pipeline = load(path, PipelineConfig, overrides)
    with placed(path, PipelineConfig, overrides):
        raise_problems(check_pipeline(pipeline))
    return pipeline, pipeline.run_dir / FOLDER


def in_full(words: list[str], read: Read) -> list[str]:
    """Put the job's name before words that are only a job's config. A job or a pipeline stays unchanged.

    A file belongs to the job whose config it loads as. If it loads as none, it belongs to the job with the fewest problems.
    """
    if read(words) is not None:
        return words
    path = _path(words[0])
    if not path.is_file():
        raise InputError(Problem(words[0], "no such file, and no job of prism", "a pipeline's YAML, or -- and a job"))
    jobs: dict[type, str] = {PipelineConfig: "", **{cls: job for job, cls in CONFIGS.items()}, StudyConfig: "study"}
    job = jobs[closest(path, tuple(jobs), words[1:])]
    if job == "study":  # a graph with a record of its own
        fix = f"prism study {words[0]} --cluster YAML submits its stages"
        raise InputError(Problem(words[0], "a config of prism study", "a pipeline's YAML, or that of a job", fix))
    return [*job.split(), *words] if job else words


def _path(word: str) -> Path:
    """Return the YAML that a word names. Raises: InputError where it has a variable that is not set."""
    try:
        return Path(paths.expanded(word))
    except ValueError as error:
        raise InputError(Problem("command", str(error), "a path", paths.FIX)) from None


def _of_command(words: Sequence[str], call: Call, num_tasks: int) -> tuple[PipelineConfig, Path]:
    """Return a pipeline of one job. Its submission folder is with the job's output, or else a folder of the job's name.

    `prepare` in several tasks is two: a job array that makes the shards, and the job itself, which waits for them and finishes the mixture.
    """
    name = call.job.replace(" ", "-")
    title, run_dir, is_run = name, Path(call.arguments.get("out") or name), False
    if call.job in CONFIGS and call.arguments["config"] is not None:
        path, overrides = call.config
        config: Any = load(path, CONFIGS[call.job], overrides)
        title, run_dir = path.stem, output(config)
        is_run = isinstance(config, RunConfig)
    job = JobConfig(name=name, command=tuple(words))
    stages: tuple[JobConfig, ...] = (job,)
    if call.job == "prepare" and num_tasks > 1 and call.arguments["task"] is None:
        tasks = tuple(("--task", f"{task}/{num_tasks}") for task in range(num_tasks))
        shards = JobConfig(name=f"{name}-tasks", command=tuple(words), array=tasks)
        stages = (shards, replace(job, after=(shards.name,)))
    pipeline = PipelineConfig(name=title, run_dir=run_dir, stages=stages)
    raise_problems(check_pipeline(pipeline))
    return pipeline, run_dir / FOLDER if is_run else submission_folder(run_dir)


def output(config: Any) -> Path:
    """Return the folder that a job's config names: a run's, or another job's `out`."""
    folder: Path = config.run_dir if isinstance(config, RunConfig) else config.out
    return folder


def submission_folder(run_dir: Path) -> Path:
    """Return the folder of a run's submission: within the run, or beside an output whose folder must be new."""
    beside = run_dir.parent / f"{run_dir.name}.{FOLDER}"  # with_name would refuse "."
    return run_dir / FOLDER if (run_dir / FOLDER).is_dir() else beside


def call_of(words: Sequence[str], read: Read) -> Call:
    """Return the job that words call. Raises: InputError where there is no such job, or the words set --nproc themselves."""
    call = read(words)
    if call is None:
        raise InputError(Problem("command", " ".join(words), "a job of prism and its arguments, as [train, my_run.yaml]"))
    if call.job in GANG_JOBS and (call.arguments["nproc"] is not None or "--" in words):  # the script appends --nproc
        raise InputError(Problem("command", " ".join(words), "neither --nproc nor --", "the ranks of a node follow from world_size"))
    if call.job == "evaluate" and any(call.arguments[name] is not None for name in ("hf", "ckpt", "tasks", "out")):
        raise InputError(
            Problem("command", " ".join(words), "a YAML", "--hf, --ckpt, --tasks and --out are for a shell; a YAML says world_size")
        )
    if call.arguments.get("backend", "megatron") != "megatron":
        raise InputError(
            Problem("command", " ".join(words), "no --backend", "run it here: it writes a folder, whose job.sbatch is submitted")
        )
    return call
