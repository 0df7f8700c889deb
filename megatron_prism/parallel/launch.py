"""From one command to a gang of processes: torchrun started here, or the gang of a torchrun or srun joined."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from megatron_prism.core.errors import EnvironmentFault

GANG_FAILED = 4
# For torch's launcher, as far as its version knows them: SIGTERM is handed on here; once a rank has failed, the others have nothing left to do.
OURS: dict[str, Any] = {"signals_to_handle": "SIGINT,SIGHUP,SIGQUIT", "shutdown_timeout": 10}


def in_gang() -> bool:
    """Say whether this process was started as one of a gang: by torchrun, or by srun with several tasks.

    SLURM_STEP_NUM_TASKS is srun's own; SLURM_NTASKS also stands in the batch script, where no gang runs yet.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return True
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def world_size() -> int:
    """Return the size of the gang this process belongs to; 1 where it is alone."""
    if not in_gang():
        return 1
    return int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_STEP_NUM_TASKS"])


def adopt_slurm() -> None:
    """Give a bare srun task torchrun's variables; does nothing under torchrun or without Slurm."""
    if "WORLD_SIZE" in os.environ or not in_gang():
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"),
        MASTER_ADDR=os.environ.get("MASTER_ADDR", first_host(nodes)),
        MASTER_PORT=os.environ.get("MASTER_PORT", str(20000 + job % 20000)),
    )


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: `gpu[007-009,12],login` gives `gpu007`."""
    match = re.match(r"[^,\[](?:[^,\[]|\[[^\]]*\])*", nodelist)
    if match is None:
        raise EnvironmentFault(f"cannot read a host from the Slurm node list {nodelist!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match.group())


def start_gang(num_processes: int, command: Sequence[str]) -> int:
    """Run `python COMMAND` as a torchrun gang on this machine, listening on loopback only; return its exit code.

    The exit code is that of the first process that failed, so what the job said reaches the shell. SIGTERM and SIGUSR1 are handed on:
    the processes save and end of themselves, however long that takes (torch itself would kill them after 30 seconds).
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, _hand_on)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=f"prism{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        **{name: value for name, value in OURS.items() if name in {field.name for field in dataclasses.fields(LaunchConfig)}},
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else GANG_FAILED
    return 0


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the processes of the gang."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
