"""Megatron's distributed checkpoints: what a gang saves, any other gang loads, whatever its TP, PP and DP.

A training checkpoint holds weights, optimizer and generators; an imported one weights alone. Neither is ever
overwritten: a save goes into a new folder and is renamed when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_prism.checkpoint import folder, integrity, optimizer_state, unpickle
from megatron_prism.core.errors import CheckpointError, EnvironmentFault, PrismError, Problem
from megatron_prism.models.build import unwrap
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups, gather, is_silence, replica_group

# Keys name each layer, so that every layout reads every other.
LAYOUT = {"non_homogeneous_layers": True}


class Beside(Protocol):
    """Tensors that a run continues from beside weights and optimizer."""

    def sharded(self) -> dict[str, Any]:
        """Return them as a sharded state, under names that nothing else in a checkpoint has."""

    def restore(self, loaded: Mapping[str, Any]) -> None:
        """Set them to what a checkpoint has of `sharded`."""


def weights(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded state of the model chunks, by chunk."""
    return {f"chunk{index}": unwrap(chunk).sharded_state_dict(metadata=dict(LAYOUT)) for index, chunk in enumerate(chunks)}


def check(root: Path) -> list[Problem]:
    """Return what is wrong with a checkpoint folder; every rank of the gang calls this, reads its part, and returns the problems of all.

    Raises: EnvironmentFault on every rank where one of them cannot read it now.
    """
    try:
        mine: list[Problem] | EnvironmentFault = integrity.check(root, dist.get_rank(), dist.get_world_size())
    except EnvironmentFault as fault:
        mine = fault
    found = gather(mine)
    for part in found:
        if isinstance(part, EnvironmentFault):
            raise part.agreed()
    return list(dict.fromkeys(problem for part in found for problem in part))


def require_whole(path: Path) -> None:
    """Every rank of the gang calls this before a checkpoint is read. Raises: CheckpointError where it is damaged."""
    if problems := check(folder.read(path).root):
        raise CheckpointError(problems).agreed()


def load_weights(path: Path, chunks: Sequence[Any]) -> None:
    """Load the weights of any whole checkpoint into the model chunks, in place.

    Quantisation state (`_extra_state`) is left out: weights that come from elsewhere bring none.
    Raises: CheckpointError where a tensor is missing or has another shape.
    """
    wanted = {
        name: {key: value for key, value in state.items() if not key.endswith("_extra_state")} for name, state in weights(chunks).items()
    }
    loaded = load(wanted, path)
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"chunk{index}"], strict=False)
        lost = [key for key in missing if not key.endswith("_extra_state")] + list(unexpected)
        if lost:
            raise CheckpointError(
                [Problem(f"{path}: {key}", "no such tensor in the checkpoint or the model", "the same tensors in both") for key in lost]
            )


def training_state(chunks: Sequence[Any], optimizer: Any, groups: Groups, is_loading: bool, beside: Beside | None = None) -> dict[str, Any]:
    """Return everything a run continues from: weights, optimizer, this rank's random generators, and what it has beside them."""
    state = weights(chunks)
    own = {"optimizer": optimizer_state.sharded(optimizer, chunks, state, is_loading), "generators": _generators(groups)}
    return {**state, **own, **({} if beside is None else {"beside": beside.sharded()})}


def load_training(path: Path, chunks: Sequence[Any], optimizer: Any, groups: Groups, beside: Beside | None = None) -> None:
    """Load a training checkpoint, checked before, into model, optimizer, generators and what is beside them, in place.

    Raises: CheckpointError where it does not fit.
    """
    wanted = training_state(chunks, optimizer, groups, is_loading=True, beside=beside)
    same_ranks = folder.read(path).facts.get("world_size") == groups.world_size
    if not same_ranks:  # generators belong to ranks: on another number of ranks they start from the seed
        del wanted["generators"]
    loaded = load(wanted, path)
    for index, chunk in enumerate(chunks):
        with unpickle.guarded(path):  # Transformer Engine unpickles its FP8 state here
            unwrap(chunk).load_state_dict(loaded[f"chunk{index}"])
    optimizer_state.restore(optimizer, loaded["optimizer"])
    if beside is not None:
        beside.restore(loaded["beside"])
    if same_ranks:
        _restore_generators(loaded["generators"])


def _generators(groups: Groups) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracked = {name: _state(state) for name, state in get_cuda_rng_tracker().get_states().items()}
    states = {"host": torch.get_rng_state(), "tracker": tracked}
    if host.has_cuda():
        states["device"] = torch.cuda.get_rng_state()
    return ShardedObject("generators", states, (groups.world_size,), (groups.rank,), replica_id=0)


def _restore_generators(states: Mapping[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["host"])
    if host.has_cuda():
        torch.cuda.set_rng_state(states["device"])
    tracker = get_cuda_rng_tracker()
    graphed = {name: held for name, held in tracker.get_states().items() if isinstance(held, torch.Generator)}
    for name, generator in graphed.items():
        generator.set_state(states["tracker"][name])  # in place: graphs hold the generator
    if not graphed:
        tracker.set_states(states["tracker"])


def _state(held: Any) -> Any:
    """Return a generator's state as a tensor. Under cuda_graphs Megatron's tracker holds the generators themselves."""
    return held.get_state() if isinstance(held, torch.Generator) else held


def load(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a sharded state with the values that a checkpoint has of it; every rank of the gang calls this.

    Raises: CheckpointError where it does not fit. EnvironmentFault where it cannot be read now.
    """
    from megatron.core import dist_checkpointing

    checkpoint = folder.read(path)
    _merge_in_place(wanted)
    try:
        with unpickle.guarded(checkpoint.state):
            return dist_checkpointing.load(wanted, str(checkpoint.state), _reading(str(checkpoint.state)))
    except BaseException as error:  # torch's CheckpointException is no Exception
        causes = [(error, None), *getattr(error, "failures", {}).values()]  # torch's CheckpointException: (error, its stack) by rank
        if isinstance(error, (KeyboardInterrupt, SystemExit, PrismError)):
            raise
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]  # torch lists every key it knows
        if fault := next((cause for cause, stack in causes if _is_of_machine(cause, stack)), None):  # the bytes are those that were written
            raise EnvironmentFault(f"{checkpoint.state}: not read: {' '.join(f'{type(fault).__name__}: {fault}'.split())[:500]}") from error
        raise CheckpointError(Problem(str(checkpoint.state), cause, "a whole checkpoint of this architecture")) from error


def _merge_in_place(wanted: Mapping[str, Any]) -> None:
    """Let a tensor that is saved in pieces (gate and up, a Mamba mixer's rows) be itself once its pieces are read into it.

    Megatron-Core puts the pieces together in new tensors, all of them before the first is copied: half of a LLaMA's weights a second time.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for factory in nested_values(dict(wanted)):
        if isinstance(factory, ShardedTensorFactory):
            factory.merge_fn = partial(_merged, factory.data, factory.merge_fn)


def _merged(whole: Any, merge: Callable[[Any], Any], pieces: Any) -> Any:
    """Return the whole tensor where the pieces are its values in their order, else what Megatron-Core makes of them."""
    is_plain = isinstance(whole, torch.Tensor) and type(whole) in (torch.Tensor, torch.nn.Parameter) and whole.is_contiguous()
    if not is_plain or not isinstance(pieces, list):
        return merge(pieces)
    place = whole.data_ptr()
    for piece in pieces:
        if piece.data_ptr() != place or not piece.is_contiguous() or piece.dtype != whole.dtype:
            return merge(pieces)
        place += piece.numel() * piece.element_size()
    return whole if place == whole.data_ptr() + whole.numel() * whole.element_size() else merge(pieces)


def _is_of_machine(error: BaseException, stack: Any) -> bool:
    return isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)) or is_silence(error, stack)


def _reading(state: str) -> Any:
    """Return how to read: of the ranks that want the same weights each reads a part, and hands it to the others."""
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    strategy, replicas = get_default_load_sharded_strategy(state), replica_group()
    return FullyParallelLoadStrategyWrapper(strategy, replicas) if dist.get_world_size(replicas) > 1 else strategy
