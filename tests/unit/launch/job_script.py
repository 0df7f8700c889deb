"""A job's script run as Slurm would, with an srun and a scontrol that only note what they are given."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prism.core.config import ClusterConfig
from megatron_prism.launch import slurm

Start = Callable[..., subprocess.Popen[str]]  # of a job, a cluster and variables of the environment
CPU = ClusterConfig(gpus_per_node=0, processes_per_node=1)
STUBS = {
    "srun": 'printf "%s\\0" "$@" >srun.argv; env -0 >srun.env; [ -z "$STUB_WAIT" ] || { trap "exit 3" USR1; touch ready; while :; do sleep 0.02; [ ! -e go ] || exit 3; done; }; exit "${STUB_CODE:-0}"',
    "scontrol": 'if [ "$1" = show ]; then echo "JobState=COMPLETING Reason=${STUB_REASON:-None}"; else echo "$*" >>scontrol.argv; fi',
    "record": 'printf "%s\\0" "$@" >record.argv',
}


def stub(folder: Path, name: str, text: str) -> None:
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def starter(tmp_path: Path) -> Start:
    """Return a function that starts a script as Slurm would, in tmp_path, with stubs on its PATH."""
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        stub(tmp_path, name, text)

    def start(job: slurm.Job, cluster: ClusterConfig, **variables: str) -> subprocess.Popen[str]:
        (tmp_path / job.folder).mkdir(parents=True, exist_ok=True)
        script = tmp_path / "script.sbatch"
        script.write_text(slurm.render(job, cluster))
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
        slurms = {"SLURM_JOB_ID": "40017", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_ARRAY_TASK_ID": "0"}
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "STUB_WAIT": "", **slurms, **variables}
        return subprocess.Popen(
            ["bash", str(script)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def job(folder: Path = Path("run/slurm"), **changes: Any) -> slurm.Job:
    values: dict[str, Any] = {
        "name": "train",
        "title": "tiny-train",
        "folder": folder,
        "command": ("train", "mid.yaml"),
        "nodes": 2,
        "ranks_per_node": 8,
    }
    return slurm.Job(**(values | changes))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def given(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\0")[:-1]
