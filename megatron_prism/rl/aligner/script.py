"""The files of an export that a shell or a reader opens: the het-job for sbatch, the actor's start, the conversion there and back, README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from megatron_prism.core.config import ClusterConfig
from megatron_prism.core.config.aligner import AlignerConfig
from megatron_prism.launch.slurm import slurm_quote
from megatron_prism.rl.aligner.preflight import DEFECTS

TEMPLATES = {"job.sbatch": "job.sbatch.j2", "actor.sh": "actor.sh.j2", "convert.sh": "convert.sh.j2", "README.md": "README.md.j2"}
# Source: NeMo at the commit of NeMo-Aligner's Dockerfile, scripts/checkpoint_converters/
CONVERTERS = {
    "llama": ("convert_llama_hf_to_nemo.py", "convert_llama_nemo_to_hf.py"),
    "mistral": ("convert_mistral_7b_hf_to_nemo.py", "convert_mistral_7b_nemo_to_hf.py"),
}


def render(config: AlignerConfig, cluster: ClusterConfig, family: str, folder: Path) -> dict[str, str]:
    """Return the texts of the files, by name. folder: the export's, where the job runs and logs."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["quote"] = lambda value: quote(str(value))
    facts: dict[str, Any] = {
        "config": config,
        "cluster": cluster,
        "family": family,
        "folder": folder,
        "defects": DEFECTS,
        "actor": _actor_options(config, cluster, folder),
        "server": _server_options(cluster),
        "actor_srun": _container(config.image, config.mounts, config.repo),
        "server_srun": _container(cluster.container.image, cluster.container.mounts, str(folder)) if cluster.container else "",
        "setup": [" ".join(map(quote, words)) for words in cluster.setup],
        "activate": quote(f"{cluster.venv}/bin/activate") if cluster.venv else "",
        "environment": [(name, quote(value)) for name, value in cluster.environment.items()],
        "to_nemo": CONVERTERS[family][0],
        "to_hf": CONVERTERS[family][1],
    }
    return {name: environment.get_template(template).render(facts) for name, template in TEMPLATES.items()}


def _container(image: str, mounts: tuple[str, ...], workdir: str) -> str:
    """Return pyxis's options of srun."""
    words = [f"--container-image={quote(image)}", "--no-container-mount-home", f"--container-workdir={quote(workdir)}"]
    return " ".join([*words, *([f"--container-mounts={quote(','.join(mounts))}"] if mounts else [])])


def _actor_options(config: AlignerConfig, cluster: ClusterConfig, folder: Path) -> list[str]:
    gpus = cluster.gpus_per_node
    cpus = cluster.cpus_per_task // gpus if cluster.cpus_per_task else None
    return _options(
        {
            "job-name": "nemo-aligner",
            "account": cluster.account,
            "partition": cluster.partition,
            "qos": cluster.qos,
            "nodes": config.num_nodes,
            "ntasks-per-node": gpus,
            "gres": f"{cluster.gres}:{gpus}" if cluster.gres else None,
            "gpus-per-node": None if cluster.gres else gpus,
            "cpus-per-task": cpus or None,
            "mem": cluster.mem,
            "time": cluster.time_limit,
            "output": f"{str(folder).replace('%', '%%')}/job.%j.out",
            "open-mode": "append",
        },
        ["--exclusive"] if cluster.exclusive else [],
        cluster.sbatch,
    )


def _server_options(cluster: ClusterConfig) -> list[str]:
    values = {
        "account": cluster.account,
        "partition": cluster.cpu.partition or cluster.partition,
        "qos": cluster.qos,
        "nodes": 1,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpu.cpus_per_task,
        "mem": cluster.cpu.mem,
        "time": cluster.time_limit,  # of the actor: one job
    }
    return _options(values, [], ())


def _options(values: Mapping[str, object], flags: list[str], given: tuple[str, ...]) -> list[str]:
    own = [f"--{key}={slurm_quote(str(value))}" for key, value in values.items() if value is not None]
    return [*own, *flags, *("=".join([name, *map(slurm_quote, value)]) for name, *value in (option.split("=", 1) for option in given))]
