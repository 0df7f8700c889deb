"""What a cluster's YAML (configs/clusters/) and a pipeline's YAML may say. Defaults are ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_prism.core.config.section import Pattern, Range, Section

TimeLimit = Annotated[
    str, Pattern(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED", 'a time as Slurm writes it: "24:00:00", "1-12:00:00", or minutes, in quotes')
]
Option = Annotated[str, Pattern(r"--[a-z][a-z-]*(=.*)?", "an option of sbatch in one word, as --constraint=h100")]
Name = Annotated[str, Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, . _ -")]  # of a file, and of a job in Slurm's lists


@dataclass(frozen=True, kw_only=True)
class ContainerConfig(Section):
    """A container that pyxis and enroot start on each node."""

    image: str
    """An image with prism in it."""

    mounts: tuple[str, ...] = ()
    """What the container sees of the file systems: host:container, or host:container:flags."""

    workdir: str | None = None
    """Where the container starts. Null: where the job was submitted, which a mount must show."""


@dataclass(frozen=True, kw_only=True)
class CpuConfig(Section):
    """What a job gets that needs no gang (prepare, convert): one process on one node."""

    partition: str | None = None
    """Null: the cluster's own."""

    cpus_per_task: Annotated[int, Range(ge=1)] = 16
    """The cores of the process."""

    mem: str | None = None
    """The memory, in Slurm's words."""

    time_limit: TimeLimit = "24:00:00"
    """The time limit, in Slurm's words."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """A Slurm cluster, and how jobs run on it."""

    gpus_per_node: Annotated[int, Range(ge=0)]
    """The GPUs of a node, a rank each. 0: a cluster of CPUs, where processes_per_node stands in its place."""

    processes_per_node: Annotated[int, Range(ge=0)] = 0
    """On a cluster of CPUs: the ranks of a node."""

    account: str | None = None
    """The Slurm account."""

    partition: str | None = None
    """The Slurm partition."""

    qos: str | None = None
    """The Slurm quality of service."""

    gres: str | None = "gpu"
    """As the cluster calls its GPUs: gpu, or gpu:h100. Null: GPUs are asked for by --gpus-per-node."""

    cpus_per_task: Annotated[int | None, Range(ge=1)] = None
    """The cores of a node's task, which starts the node's ranks."""

    mem: str | None = None
    """The memory of a node, in Slurm's words: "0" is all of it."""

    time_limit: TimeLimit = "24:00:00"
    """The time limit, in Slurm's words: "24:00:00", "1-00:00:00"."""

    signal_before_s: Annotated[int, Range(ge=1, le=65535, fix="Slurm takes no other")] = 300
    """A job is told so long before its time limit to save, and to go on in its next start."""

    max_restarts: Annotated[int, Range(ge=0)] = 3
    """A job is started again after so many faults (a rank killed, a node gone silent). Starts after a save, or that Slurm itself decides on,
    do not count."""

    exclusive: bool = True
    """A gang has its nodes to itself."""

    sbatch: tuple[Option, ...] = ()
    """Further options of sbatch, as --constraint=h100."""

    setup: tuple[tuple[str, ...], ...] = ()
    """Commands before prism starts, a list of words each: [module, load, cuda/12.8]."""

    venv: Path | None = None
    """A virtual environment that is activated on every node. Or use container."""

    container: ContainerConfig | None = None
    """A container that prism runs in. Or use venv."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables exported to every job. They win over those that a recipe's config implies; the recipe's own `environment` wins over them."""

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
    """What stands behind `prism`, a list of words: [train, my_run.yaml]."""

    after: tuple[str, ...] = ()
    """The jobs that must be done before, by name."""

    array: tuple[tuple[str, ...], ...] = ()
    """A Slurm job array: an element for each list of words, which are added to the command."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Section):
    """`prism submit`: jobs that wait for each other."""

    name: Name
    """The pipeline's name."""

    run_dir: Path
    """The scripts, logs and events of the jobs are kept here (run_dir/slurm)."""

    stages: tuple[JobConfig, ...]
    """The jobs."""
