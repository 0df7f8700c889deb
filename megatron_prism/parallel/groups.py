"""The rank grid (TP, PP, CP, DP) and its process groups: the only reader of Megatron-Core's global state."""

from __future__ import annotations

import datetime
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import FrameSummary, extract_tb
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_prism.core.config import GangConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, PrismError, Problem
from megatron_prism.parallel import host, interface, megatron_versions

T = TypeVar("T")
U = TypeVar("U")
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Groups:
    """This rank's coordinates in the grid, and the process groups that a trainer needs. Order as in mcore: tp-cp-dp-pp."""

    rank: int
    world_size: int
    tp_rank: int
    tp: int
    pp_rank: int
    pp: int
    dp_rank: int
    dp: int
    cp_rank: int
    cp: int
    vpp: int | None
    tp_group: Any
    pp_group: Any
    cp_group: Any
    dp_cp_group: Any
    last_stage_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1


@contextmanager
def gang(config: GangConfig, timeout_s: float = TIMEOUT_S) -> Iterator[Groups]:
    """Join the process group, build the rank grid, seed the ranks. Undo all of it at the end.

    On GPUs, after an error of this rank alone, the process group is not destroyed. It ends with the process (cli/entry.py), and the peers see
    the loss at once.
    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without them, one process.
    """
    agreed = False
    try:
        join(timeout_s)
        with grid(config, timeout_s) as groups:
            yield groups
    except RuntimeError as error:
        if is_silence(error):
            raise EnvironmentFault(silence(error)) from error
        raise
    except PrismError as error:
        agreed = error.is_agreed
        raise
    else:
        agreed = True
    finally:
        if dist.is_initialized() and (agreed or not host.has_cuda()):  # destroying NCCL's would wait for peers that may be in a collective
            dist.destroy_process_group()


def is_silence(error: BaseException, stack: Sequence[FrameSummary] | None = None) -> bool:
    """Say whether an error means that another rank of a process group is gone or silent.

    NCCL's errors have their own types. Gloo's are plain RuntimeErrors, raised within torch's collectives; where Megatron-Core waits for a
    collective itself, host.py gives them NCCL's type. stack: where the error was raised, for an error sent by another rank.
    """
    if isinstance(error, dist.DistError) or type(error) is not RuntimeError:
        return isinstance(error, dist.DistError)
    frames = extract_tb(error.__traceback__) if stack is None else stack
    return bool(frames) and frames[-1].filename == distributed_c10d.__file__


def silence(error: BaseException) -> str:
    """Return the message for such an error."""
    return f"another rank is gone or silent: {' '.join(str(error).encode('ascii', 'ignore').decode().split())[:300]}"


def join(timeout_s: float = TIMEOUT_S) -> None:
    """Join the gang's process group: NCCL for CUDA tensors, gloo for host tensors. A rank that waits longer than timeout_s fails.

    Raises: EnvironmentFault where this rank has no CUDA device and was given some.
    """
    host.require_named_devices()
    host.install()
    megatron_versions.check_supported()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(alone)
    elif "MASTER_ADDR" not in os.environ:
        found = f"RANK={os.environ.get('RANK')} WORLD_SIZE={os.environ['WORLD_SIZE']} and no MASTER_ADDR"
        fix = "start the ranks by --nproc, torchrun or srun; or unset RANK and WORLD_SIZE"
        raise InputError(Problem("environment", found, "the variables of a launcher, or none of them", fix))
    if host.has_cuda():
        torch.cuda.set_device(host.device_index())
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # each group also opens gloo sockets: about 1,400 files on 128 ranks
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    interface.set_for_gloo()
    backend = "cpu:gloo,cuda:nccl" if host.has_cuda() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


@contextmanager
def grid(config: GangConfig, timeout_s: float = TIMEOUT_S) -> Iterator[Groups]:
    """Build the rank grid over the joined processes, and seed Megatron's generators. A gang may build several grids in turn."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel = config.parallel
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        hierarchical_context_parallel_sizes=parallel.cp_sizes,
        create_gloo_process_groups=dist.get_backend() != "fake",  # fake: torch's process group in which one process plays any rank
        distributed_timeout_minutes=timeout_s / 60,
    )
    try:
        groups = _read_grid(parallel.vpp)
        stage_seed = config.seed + 100 * groups.pp_rank  # otherwise all stages would begin with the same weights
        torch.manual_seed(stage_seed)
        # a graph holds generators, which only Transformer Engine's tracker has
        model_parallel_cuda_manual_seed(stage_seed, te_rng_tracker=config.cuda_graphs, force_reset_rng=True)
        yield groups
        del groups
        if not host.has_cuda():  # Megatron-Core leaks the threads and sockets of gloo groups; NCCL's groups end with the gang
            for group in filter(None, parallel_state._global_process_group_list or ()):
                dist.destroy_process_group(group)
    finally:
        parallel_state.destroy_model_parallel()
        if config.deterministic:
            torch.use_deterministic_algorithms(False)


def _read_grid(vpp: int | None) -> Groups:
    from megatron.core import parallel_state as state

    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp=state.get_tensor_model_parallel_world_size(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        pp=state.get_pipeline_model_parallel_world_size(),
        dp_rank=state.get_data_parallel_rank(),
        dp=state.get_data_parallel_world_size(),
        cp_rank=state.get_context_parallel_rank(),
        cp=state.get_context_parallel_world_size(),
        vpp=vpp,
        tp_group=state.get_tensor_model_parallel_group(),
        pp_group=state.get_pipeline_model_parallel_group(),
        cp_group=state.get_context_parallel_group(),
        dp_cp_group=state.get_data_parallel_group(with_context_parallel=True),
        last_stage_rank=state.get_pipeline_model_parallel_last_rank(),
    )


def chunk_ends(groups: Groups) -> list[tuple[int | None, bool, bool]]:
    """Return (vp_stage, has the embedding, has the output layer) of each model chunk this rank holds."""
    if groups.vpp is None:
        return [(None, groups.is_first_stage, groups.is_last_stage)]
    last = groups.vpp - 1
    return [(stage, groups.is_first_stage and stage == 0, groups.is_last_stage and stage == last) for stage in range(groups.vpp)]


def hand_to_first(tensor: torch.Tensor | None, shape: tuple[int, ...], groups: Groups) -> torch.Tensor | None:
    """Send the last pipeline stage's host tensor to rank 0. Return it there, None elsewhere. Every rank calls this."""
    if groups.pp == 1:
        return tensor if groups.rank == 0 else None
    held = tensor if tensor is not None else torch.empty(shape)
    if groups.tp_rank == 0 and groups.dp_rank == 0:
        dist.broadcast(held, groups.last_stage_rank, group=groups.pp_group)
    return held if groups.rank == 0 else None


def replica_group() -> Any:
    """Return the group of ranks with the same weights as this one (data and context parallelism)."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def tensor_parallel_group() -> Any:
    """Return this rank's tensor-parallel group, for a module that Megatron-Core constructs without passing it."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def agree(values: Sequence[float]) -> list[float]:
    """Return the maximum of each value over all ranks of the gang. This runs on the host and waits for no device."""
    if dist.get_world_size() == 1:
        return list(values)
    maxima = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return maxima.tolist()


def total(value: int) -> int:
    """Return the sum of a value over all ranks of the gang."""
    sum_tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(sum_tensor)
    return int(sum_tensor)


def gather(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's small value, by rank, for a group (None: the gang)."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def to_first(value: Any) -> list[Any]:
    """Return every rank's value, by rank, on rank 0; nothing on the others."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None)
    return values


def shared(make: Callable[[T], U], values: Sequence[T]) -> list[U]:
    """Return what a function makes of each value, on every rank. Each rank makes its part, of small things."""
    rank, size = dist.get_rank(), dist.get_world_size()
    made = gather([make(value) for value in values[rank::size]])
    return [made[index % size][index // size] for index in range(len(values))]


def from_first(value: T) -> T:
    """Return rank 0's small value on every rank."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def on_first(make: Callable[[], T]) -> T | None:
    """Return what a function makes on rank 0, None elsewhere. Raises: on every rank, the PrismError that it raised on rank 0."""
    made, failure = None, None
    if dist.get_rank() == 0:
        try:
            made = make()
        except PrismError as error:
            failure = error
    if failure := from_first(failure):
        raise failure.agreed()
    return made


def barrier() -> None:
    """Wait for every rank of the gang."""
    dist.barrier()
