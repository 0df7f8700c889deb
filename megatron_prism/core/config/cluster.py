"""What a cluster's YAML (configs/clusters/) and a pipeline's YAML may say. Defaults are ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_prism.core.config.section import Section


@dataclass(frozen=True, kw_only=True)
class ContainerConfig(Section):
    """A container that pyxis and enroot start on each node: an image with prism in it, and what it sees of the file systems.

    mounts: host:container, or host:container:flags. workdir: where it starts; None: where the job was submitted, which a mount must show.
    """

    image: str
    mounts: tuple[str, ...] = ()
    workdir: str | None = None


@dataclass(frozen=True, kw_only=True)
class CpuConfig(Section):
    """What a stage gets that needs no gang (prepare, convert): one process on one node. partition, None: the cluster's own."""

    partition: str | None = None
    cpus_per_task: int = 16
    mem: str | None = None
    time_limit: str = "24:00:00"


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """A Slurm cluster, and how jobs run on it.

    gpus_per_node: 0 on a cluster of CPUs, where processes_per_node stands in its place. gres: as the cluster calls its GPUs: gpu, or
    gpu:h100; None: asked for by --gpus-per-node. mem, time_limit: in Slurm's words ("0" is all of a node; "1-00:00:00").
    signal_before_s: how long before its time limit a job is told to save and go on in its next start. max_restarts: how many faults (a
    rank killed, a node gone silent) a job is started again after; starts after a save, or that Slurm itself decides on, do not count.
    sbatch: further options, as --constraint=h100. setup: commands before prism starts, a list of words each: [module, load, cuda/12.8].
    venv: activated on every node; or container. environment: exported to every job, over what a recipe's config implies and
    under what its own `environment` says.
    """

    gpus_per_node: int
    processes_per_node: int = 0
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    gres: str | None = "gpu"
    cpus_per_task: int | None = None
    mem: str | None = None
    time_limit: str = "24:00:00"
    signal_before_s: int = 300
    max_restarts: int = 3
    exclusive: bool = True
    sbatch: tuple[str, ...] = ()
    setup: tuple[tuple[str, ...], ...] = ()
    venv: Path | None = None
    container: ContainerConfig | None = None
    environment: dict[str, str] = field(default_factory=dict)
    cpu: CpuConfig = field(default_factory=CpuConfig)

    @property
    def ranks_per_node(self) -> int:
        """The processes of a gang on a whole node."""
        return self.gpus_per_node or self.processes_per_node


@dataclass(frozen=True, kw_only=True)
class StageConfig(Section):
    """One job of a pipeline. command: what stands behind `prism`. after: the stages that must be done before.

    array: a Slurm job array, an element for each list of words, which are added to the command.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    array: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Section):
    """`prism submit`: jobs that wait for each other. run_dir: where their scripts, logs and events are kept (run_dir/slurm)."""

    name: str
    run_dir: Path
    stages: tuple[StageConfig, ...]
