"""Checks within the gang's section, for training and any other job: pure functions that return every problem.

core/check/bounds.py checks the bounds of single keys. A check here ignores a value that is out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.check import precision
from megatron_prism.core.check.model import check_split
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig, RecomputeConfig, TrainConfig
from megatron_prism.core.errors import Problem


def data_parallel_size(gang: GangConfig, world_size: int) -> int:
    """Return the data-parallel size: the world size divided by tp, pp and cp."""
    return world_size // (gang.parallel.tp * gang.parallel.pp * gang.parallel.cp)


def check_gang(gang: GangConfig, world_size: int) -> list[Problem]:
    """Return the problems between the keys of a gang's section on `world_size` ranks."""
    return [
        *(check_size(gang, world_size) or _check_grid(gang.parallel)),
        *_check_recompute(gang.recompute),
        *_check_graphs(gang),
        *precision.check_keys(gang),
    ]


def check_size(gang: GangConfig, world_size: int) -> list[Problem]:
    """Return why a gang of `world_size` ranks does not match the config's layout."""
    grid = gang.parallel
    if gang.world_size is not None and gang.world_size != world_size:
        fix = f"start {gang.world_size} (prism submit, torchrun, --nproc), or set world_size={world_size}"
        found, required = f"{gang.world_size}, and {world_size} processes", "as many processes as the run is laid out for"
        return [Problem("world_size", found, required, fix)]
    ranks = grid.tp * grid.pp * grid.cp
    if min(grid.tp, grid.pp, grid.cp) >= 1 and world_size % ranks:
        fix = f"start {ranks} processes (or a multiple), or change parallel.tp, pp, cp"
        found = f"tp {grid.tp} x pp {grid.pp} x cp {grid.cp} = {ranks}"
        return [Problem("parallel", found, f"a divisor of the world size {world_size}", fix)]
    return []


def _check_grid(grid: ParallelConfig) -> Iterator[Problem]:
    if grid.sequence_parallel and grid.tp == 1:
        yield Problem("parallel.sequence_parallel", "true with parallel.tp 1", "tp above 1", "remove it")
    if (grid.cp_comm_type == "a2a+p2p") != (grid.cp_a2a_size is not None):
        found = f"{grid.cp_a2a_size} with cp_comm_type {grid.cp_comm_type}"
        yield Problem("parallel.cp_a2a_size", found, "a number with a2a+p2p, else null")
    elif grid.cp_a2a_size is not None and grid.cp_a2a_size >= 1 and grid.cp % grid.cp_a2a_size:
        yield Problem("parallel.cp_a2a_size", str(grid.cp_a2a_size), f"a divisor of parallel.cp {grid.cp}")
    if grid.overlap_param_gather and not (grid.distributed_optimizer and grid.overlap_grad_reduce):
        yield Problem("parallel.overlap_param_gather", "true", "distributed_optimizer and overlap_grad_reduce true too")
    if grid.vpp is not None and grid.pp == 1:
        yield Problem("parallel.vpp", f"{grid.vpp} with parallel.pp {grid.pp}", "pp above 1", "remove it")


def _check_recompute(recompute: RecomputeConfig) -> Iterator[Problem]:
    if recompute.num_layers is not None and recompute.granularity != "full":
        found = f"{recompute.num_layers} with granularity {recompute.granularity}"
        yield Problem("recompute.num_layers", found, "granularity full, or null")
    if not recompute.modules or (recompute.modules != RecomputeConfig().modules and recompute.granularity != "selective"):
        found = f"{list(recompute.modules)} with granularity {recompute.granularity}"
        yield Problem("recompute.modules", found, "at least one, with granularity selective")


def _check_graphs(gang: GangConfig) -> Iterator[Problem]:
    """Check what Megatron-Core's graphs of single layers (transformer/cuda_graphs.py) can hold: passes of one shape, in one order, on the device."""
    if not gang.cuda_graphs:
        return
    where, offload = "cuda_graphs", gang.offload
    if not isinstance(gang, TrainConfig):
        yield Problem(where, "true", "false, but for prism train", "this job's forward passes have more than one shape")
    elif gang.data.document_mask:
        yield Problem(where, "true with data.document_mask", "one of them", "a graph's arguments are of one shape, and documents are not")
    if isinstance(gang, TrainConfig) and gang.trainable != ("*",):
        yield Problem(
            where, f"true with trainable {list(gang.trainable)}", "all parameters trained", "no test of ours shows frozen layers in graphs"
        )
    if gang.parallel.pp > 1:
        fix = "microbatches then take turns with graphs, and a validation of another number of them would leave the turns wrong"
        yield Problem(where, f"true with parallel.pp {gang.parallel.pp}", "parallel.pp 1", fix)
    if offload.optimizer_fraction or offload.activation_layers:
        yield Problem(where, "true with offload", "one of them", "Megatron-Core captures no copies to the host")
    if gang.recompute.granularity == "full":
        yield Problem(where, "true with recompute.granularity full", "none or selective", "Megatron-Core captures no recomputed layer")


def check_model_on_gang(model: ModelConfig, gang: GangConfig) -> list[Problem]:
    """Return why an architecture cannot be built under a gang's section."""
    grid = gang.parallel
    problems = check_split(model, grid.tp, grid.pp * (grid.vpp or 1), "parallel.tp", "parallel.pp")
    problems += _check_context(model, grid)
    if model.layer_pattern is not None and grid.vpp is not None:
        problems.append(Problem("parallel.vpp", str(grid.vpp), "null", "Megatron-Core 0.16 cannot interleave a hybrid's pipeline"))
    if model.layer_pattern is not None and gang.recompute.granularity == "full":
        fix = "Megatron-Core 0.16 does not recompute a hybrid's layers, and says nothing; use selective with recompute.modules=[mlp], or more parallel.pp"
        problems.append(Problem("recompute.granularity", "full", "none or selective for a hybrid", fix))
    return [*problems, *precision.check_sizes(model, gang)]


def _check_context(model: ModelConfig, grid: ParallelConfig) -> Iterator[Problem]:
    """Check the requirements of Transformer Engine's attention and Megatron-Core's Mamba mixer under context parallelism."""
    if min(grid.tp, grid.cp) < 1 or grid.cp == 1:
        return
    if model.window_size is not None and grid.cp_comm_type not in ("all_gather", "a2a"):
        yield Problem("parallel.cp_comm_type", grid.cp_comm_type, f"all_gather or a2a, for a model with a window ({model.window_size})")
    split = grid.tp * (grid.cp_a2a_size or grid.cp)  # the number of ranks over which a2a splits heads
    for name in ("num_attention_heads", "num_query_groups") if "a2a" in grid.cp_comm_type else ():
        if getattr(model, name) % split:
            where, fix = f"parallel.cp_comm_type ({name} {getattr(model, name)})", "take p2p or all_gather"
            yield Problem(where, grid.cp_comm_type, f"{name} a multiple of {split}", fix)
    if model.mamba is not None:
        each, groups = model.mamba.num_heads // grid.tp, model.mamba.num_groups // grid.tp
        if each % grid.cp or (groups and groups % grid.cp and grid.cp % groups):
            required = f"a divisor of the {each} Mamba heads of a tp rank, and of their {groups} groups a divisor or a multiple"
            yield Problem("parallel.cp", f"cp {grid.cp}", required, "Megatron-Core splits a Mamba layer's heads over cp")
