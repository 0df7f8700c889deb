"""From one command to a gang of processes: start torchrun, on one machine or on the nodes of an srun, or join an existing gang."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psutil  # not in the signal handler: a second signal may arrive during the import

from megatron_prism.core import log
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem, Stopped
from megatron_prism.core.patch import replaced
from megatron_prism.parallel import signals

GANG_FAILED = 4
# Torch's launcher would kill the ranks upon the signals that it handles. They are forwarded here, and it is left one that nobody sends.
HANDLED: dict[str, Any] = {"signals_to_handle": "SIGUSR2"}
NOTICES = {*signals.STOPPING} - {signal.SIGTERM}  # SIGTERM also ends a rank whose peer has failed
SHUTDOWN_S = 5  # the time that the other ranks get to end after one has failed
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun's agent in each rank that it starts


def in_gang() -> bool:
    """Say whether this process was started as part of a gang: by torchrun, or by srun with several tasks.

    SLURM_STEP_NUM_TASKS is set by srun alone. SLURM_NTASKS is also set in the batch script, where no gang runs yet.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return True
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")  # empty where a shell or a container cleared it
    return os.environ.get("SLURM_PROCID", "").isdecimal() and tasks.isdecimal() and int(tasks) > 1


def has_launcher() -> bool:
    """Say whether this process is a rank that a launcher started: one of several, or torchrun's only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or TORCHRUN in os.environ


def drop_leftovers() -> None:
    """Remove RANK and WORLD_SIZE, and their local ones, from the environment where they are no gang's: those of a pod or of an old export.

    A rank has both, and torchrun's mark or peers.
    """
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    is_rank = rank.isdecimal() and size.isdecimal() and int(rank) < int(size) and (int(size) > 1 or TORCHRUN in os.environ)
    if not is_rank:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def check_nproc(num_processes: int) -> None:
    """Check that --nproc does not contradict the gang that this process is in.

    Raises: InputError where a launcher other than torchrun made this process a rank, or torchrun started another number on this machine.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    rank, size, local_size = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if TORCHRUN in os.environ and local_size == str(num_processes):  # as the ranks that start_gang starts
        return
    started = (
        f"{local_size} ranks of torchrun on this machine" if TORCHRUN in os.environ else f"RANK={rank} WORLD_SIZE={size} in the environment"
    )
    fix = "to join that gang leave --nproc out; to start one here unset RANK and WORLD_SIZE"
    raise InputError(Problem("--nproc", f"{num_processes}, and {started}", "one launcher of the ranks", fix))


def world_size() -> int:
    """Return the size of this process's gang, 1 where it is alone."""
    if not in_gang():
        return 1
    return int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_STEP_NUM_TASKS"])


@dataclass(frozen=True)
class Span:
    """The machines of a gang to start: their number, the index of this one, and the address where they meet."""

    num_nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0


ALONE = Span()


def slurm_span() -> Span:
    """Return the span of an srun with one task per node, each of which starts its node's ranks. Elsewhere: this machine alone.

    Raises: EnvironmentFault where srun started several tasks on a node, since each would start all the node's ranks.
    """
    if "WORLD_SIZE" in os.environ or not in_gang():
        return ALONE
    nodes, tasks = int(os.environ.get("SLURM_STEP_NUM_NODES", "1")), os.environ["SLURM_STEP_NUM_TASKS"]
    if str(nodes) != tasks:
        found = f"srun started {tasks} tasks on {nodes} nodes, and --nproc asks each of them to start ranks"
        raise EnvironmentFault(f"{found}: either one task a node (--ntasks-per-node=1), or a task a rank and no --nproc")
    address, port = _meeting_point()
    return Span(nodes, int(os.environ["SLURM_PROCID"]), address, port)


def adopt_slurm() -> None:
    """Set torchrun's variables in a bare srun task. Does nothing under torchrun or without Slurm."""
    if "WORLD_SIZE" in os.environ or not in_gang():
        return
    address, port = _meeting_point()
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def _meeting_point() -> tuple[str, int]:
    """Return the (host, port) where a Slurm step's processes meet: the exported one, else the first host and a port derived from the job id."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    return os.environ.get("MASTER_ADDR") or first_host(nodes), int(os.environ.get("MASTER_PORT") or 20000 + job % 12000)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: `gpu[007-009,12],login` gives `gpu007`."""
    match = re.match(r"[^,\[](?:[^,\[]|\[[^\]]*\])*", nodelist)
    if match is None:
        raise EnvironmentFault(f"cannot read a host from the Slurm node list {nodelist!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match.group())


def start_gang(num_processes: int, command: Sequence[str], span: Span = ALONE) -> int:
    """Run `python COMMAND` as this machine's part of a torchrun gang, and return its exit code. On one machine it listens on loopback only.

    num_processes: on this machine. Each machine of a span calls this; the first one listens at the meeting point, on all its networks.
    The exit code is that of the process whose failure says most, so the job's own code reaches the shell. Signals that ask to stop are forwarded:
    the processes save and exit by themselves, however long that takes (torch itself would kill them after 30 seconds).
    Raises: EnvironmentFault where the machines do not meet within 10 minutes.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger(PContext.__module__).setLevel(logging.CRITICAL)  # it logs "failed" for each exit code; the ranks have said more
    hand_on = _HandOn()
    for name in signals.heeded():
        signal.signal(name, hand_on)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    notes = tempfile.TemporaryDirectory(prefix="prism_gang_")  # for the files that torch's launcher leaves behind
    config = LaunchConfig(
        logs_specs=DefaultLogsSpecs(log_dir=notes.name),
        min_nodes=span.num_nodes,
        max_nodes=span.num_nodes,
        nproc_per_node=num_processes,
        max_restarts=0,
        **_rendezvous(span),
        monitor_interval=0.2,
        **{name: value for name, value in HANDLED.items() if name in {field.name for field in dataclasses.fields(LaunchConfig)}},
    )
    try:
        with notes, replaced(PContext, "close", _close_soon(PContext.close)):
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return _exit_code(error.failures, hand_on.numbers)
    except DistError as error:
        raise EnvironmentFault(
            f"the machines of the gang do not meet at {span.address}:{span.port}: {' '.join(str(error).split())[:300]}"
        ) from error
    return 0


def _exit_code(failures: Mapping[int, Any], handed_on: Collection[int] = ()) -> int:
    """Return a gang's exit code: the first failed rank's. Code 4 counts last, since such a rank may only have lost its peer.

    handed_on: the signals that this process received and forwarded.
    """
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode == GANG_FAILED, item[1].timestamp))
    if -failure.exitcode in {*NOTICES, *handed_on}:  # a rank without its handler yet
        log.get().error("%s", not_begun(-failure.exitcode))
        return Stopped.exit_code
    if failure.exitcode < 0:
        log.get().error("rank %d (process %d) was killed by %s", rank, failure.pid, signal.Signals(-failure.exitcode).name)
    return failure.exitcode if failure.exitcode > 0 else GANG_FAILED


def _close_soon(close: Callable[..., None]) -> Callable[..., None]:
    """Wrap torch's shutdown of a gang after a rank has failed: SIGTERM to the others, then SIGKILL after 5 seconds to those that hang.

    torch's default is 30 seconds, and its launcher has no option for it.
    """

    def close_soon(context: Any, death_sig: Any = None, timeout: int = SHUTDOWN_S) -> None:
        close(context, death_sig, min(timeout, SHUTDOWN_S))

    return close_soon


def _rendezvous(span: Span) -> dict[str, Any]:
    """Return torchrun's rendezvous: c10d on one machine; on several, a store that the first machine holds until it ends.

    On several machines torchrun's elastic rendezvous would end a machine's ranks as soon as another's have ended, and would number machines
    by address.
    """
    endpoint = f"{span.address}:{span.port}"
    if span.num_nodes > 1:
        return {"run_id": "prism", "rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": {"rank": span.node}}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return {"run_id": f"prism{os.getpid()}", "rdzv_backend": "c10d", "rdzv_endpoint": endpoint, "local_addr": span.address}


def heed_signals_while_starting() -> None:
    """Before the first step, exit with code 3 upon a signal that asks to stop. SIGTERM still kills."""
    for name in set(signals.heeded()) & NOTICES:
        signal.signal(name, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process at once. An import that is interrupted by an error may swallow it, and go on without the module."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"prism: {not_begun(number)}\n".encode())
    os._exit(Stopped.exit_code)


def not_begun(number: int) -> Stopped:
    """Return the error of a process that a signal asked to stop before it made a step."""
    return Stopped(f"stopped by {signal.Signals(number).name} before the first step; the same command starts again")


@dataclass(frozen=True)
class _HandOn:
    """The handler that forwards a signal to the gang's processes. Where there are none yet, it exits before any starts.

    numbers: the signals that it forwarded.
    """

    numbers: set[int] = field(default_factory=set)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        if not children:
            raise not_begun(number)
        self.numbers.add(number)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
