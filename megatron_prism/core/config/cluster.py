"""The keys of a cluster's YAML (configs/clusters/) and of a pipeline's YAML. Defaults are ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_prism.core.config.section import IS_PATH, Pattern, Range, Section

TimeLimit = Annotated[str, Pattern(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED", 'a time as Slurm writes it: "24:00:00", "1-12:00:00", or minutes')]
Option = Annotated[str, Pattern(r"--[a-z][a-z-]*(=.*)?", "an option of sbatch in one word, as --constraint=h100")]
Name = Annotated[str, Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, . _ -")]  # of a file, and of a job in Slurm's lists


@dataclass(frozen=True, kw_only=True)
class ContainerConfig(Section):
    """A container that pyxis and enroot start on each node."""

    image: Annotated[str, IS_PATH]
    """An image with prism in it."""

    mounts: Annotated[tuple[str, ...], IS_PATH] = ()
    """The file systems that are mounted in the container: host:container, or host:container:flags."""

    workdir: Annotated[str | None, IS_PATH] = None
    """The container's working directory. Null: where the job was submitted, which must be mounted."""


@dataclass(frozen=True, kw_only=True)
class CpuConfig(Section):
    """The resources of a job without a gang (prepare, convert): one process on one node."""

    partition: str | None = None
    """Null: the cluster's own."""

    cpus_per_task: Annotated[int, Range(ge=1)] = 16
    """The cores of the process."""

    mem: str | None = None
    """The memory, in Slurm's notation."""

    time_limit: TimeLimit = "24:00:00"
    """The time limit, in Slurm's words."""

    prepare_tasks: Annotated[int, Range(ge=1)] = 1
    """`prism submit -- prepare` becomes a job array of so many tasks, one a node at a time, and a job that finishes the mixture. 1: one job."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """A Slurm cluster, and how jobs run on it."""

    gpus_per_node: Annotated[int, Range(ge=0)]
    """The GPUs of a node, one rank each. 0: a cluster of CPUs, which uses processes_per_node instead."""

    processes_per_node: Annotated[int, Range(ge=0)] = 0
    """On a cluster of CPUs: the ranks of a node."""

    account: str | None = None
    """The Slurm account."""

    partition: str | None = None
    """The Slurm partition."""

    qos: str | None = None
    """The Slurm quality of service."""

    gres: str | None = "gpu"
    """The cluster's name for its GPUs: gpu, or gpu:h100. Null: GPUs are requested by --gpus-per-node."""

    cpus_per_task: Annotated[int | None, Range(ge=1)] = None
    """The cores of a node's task, which starts the node's ranks."""

    mem: str | None = None
    """The memory of a node, in Slurm's notation: "0" is all of it."""

    time_limit: TimeLimit = "24:00:00"
    """The time limit, in Slurm's notation: "24:00:00", "1-00:00:00"."""

    signal_before_s: Annotated[int, Range(ge=1, le=65535, fix="Slurm takes no other")] = 300
    """Slurm signals a job this long before its time limit. The job then saves, and resumes in its next start."""

    max_restarts: Annotated[int, Range(ge=0)] = 3
    """A job is restarted at most this often after a fault (a killed rank, a silent node). Restarts after a save, or by Slurm's own decision,
    do not count."""

    exclusive: bool = True
    """A gang has its nodes to itself."""

    sbatch: tuple[Option, ...] = ()
    """Further options of sbatch, such as --constraint=h100."""

    setup: tuple[tuple[str, ...], ...] = ()
    """Commands to run before prism, each a list of words: [module, load, cuda/12.8]."""

    venv: Path | None = None
    """A virtual environment that is activated on every node. Or use container."""

    container: ContainerConfig | None = None
    """A container that prism runs in. Or use venv."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables exported to every job. They override those that a recipe's config implies. The recipe's own `environment` overrides them."""

    cpu: CpuConfig = field(default_factory=CpuConfig)

    @property
    def ranks_per_node(self) -> int:
        """The processes of a gang on a whole node."""
        return self.gpus_per_node or self.processes_per_node


@dataclass(frozen=True, kw_only=True)
class JobConfig(Section):
    """One job of a pipeline."""

    name: Name
    """The job's name, used once in a pipeline."""

    command: tuple[str, ...]
    """The words after `prism`, as a list: [train, my_run.yaml]."""

    after: tuple[str, ...] = ()
    """The jobs that must be done first, by name."""

    array: tuple[tuple[str, ...], ...] = ()
    """A Slurm job array: one element for each list of words, which are added to the command."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Section):
    """`prism submit`: jobs that wait for each other."""

    name: Name
    """The pipeline's name."""

    run_dir: Path
    """The scripts, logs and events of the jobs are kept here (run_dir/slurm)."""

    stages: tuple[JobConfig, ...]
    """The jobs."""
