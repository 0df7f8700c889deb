"""What went wrong while a checkpoint was loaded, whose bytes are those that were written: the checkpoint, another rank, or the machine."""

from __future__ import annotations

import errno
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prism.checkpoint import sharded
from megatron_prism.core.errors import CheckpointError, EnvironmentFault

WORDS = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out; CUDA error: an illegal memory access"  # as anything may say
IN_TORCH = traceback.StackSummary.from_list([(distributed_c10d.__file__, 1, "barrier", "work.wait()")])


def by_rank(error: BaseException, stack: traceback.StackSummary = traceback.StackSummary()) -> CheckpointException:  # noqa: B008
    return CheckpointException("read", {1: (error, stack)})


@pytest.mark.parametrize("wrapped", [lambda error: error, by_rank], ids=["alone", "in torch's CheckpointException"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("decoder.layers.7.mlp"), CheckpointError),
        (ValueError("size mismatch"), CheckpointError),
        (RuntimeError(WORDS), CheckpointError),
        (by_rank(RuntimeError(WORDS), IN_TORCH), EnvironmentFault),  # gloo's, in another rank
        (dist.DistBackendError("NCCL timeout"), EnvironmentFault),
        (OSError(errno.EIO, "Input/output error"), EnvironmentFault),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), EnvironmentFault),
    ],
    ids=str,
)
def test_a_failed_load_is_told_by_its_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, kind: type, wrapped: Callable[[BaseException], BaseException]
) -> None:
    from megatron.core import dist_checkpointing

    def fail(*args: object) -> None:
        raise error if isinstance(error, CheckpointException) else wrapped(error)

    monkeypatch.setattr(sharded.folder, "read", lambda path: types.SimpleNamespace(state=path))
    monkeypatch.setattr(sharded, "_reading", lambda state: None)
    monkeypatch.setattr(dist_checkpointing, "load", fail)
    with pytest.raises(kind) as caught:
        sharded.load({}, tmp_path)
    assert type(caught.value) is kind, "a CheckpointError is no EnvironmentFault, nor the other way round"


class Tracker:
    """Holds generators as Transformer Engine's tracker does, for graphs, or their states as Megatron-Core's does."""

    def __init__(self, holds: Callable[[torch.Generator], Any]):
        self.states = {
            name: holds(torch.Generator().manual_seed(seed)) for seed, name in enumerate(("model-parallel-rng", "data-parallel-rng"))
        }

    def get_states(self) -> dict[str, Any]:
        return dict(self.states)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states = dict(states)


def drawn(tracker: Tracker) -> list[float]:
    """Return a number of each generator; what holds states alone draws from copies of them."""
    generators = [held if isinstance(held, torch.Generator) else torch.Generator() for held in tracker.states.values()]
    for generator, held in zip(generators, tracker.states.values(), strict=True):
        if not isinstance(held, torch.Generator):
            generator.set_state(held)
    return [float(torch.rand(1, generator=generator)) for generator in generators]


@pytest.mark.parametrize("saved", ["graphs", "plain"])
@pytest.mark.parametrize("loaded", ["graphs", "plain"])
def test_generators_are_saved_as_tensors_with_graphs_or_without(monkeypatch: pytest.MonkeyPatch, saved: str, loaded: str) -> None:
    """A run may turn cuda_graphs on or off. With graphs, which hold them, the generators stay the same objects."""
    from megatron.core import tensor_parallel

    kinds: dict[str, Callable[[torch.Generator], Any]] = {"graphs": lambda held: held, "plain": torch.Generator.get_state}
    first, second = Tracker(kinds[saved]), Tracker(kinds[loaded])
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: first)
    states = sharded._generators(types.SimpleNamespace(world_size=1, rank=0)).data  # type: ignore[arg-type]
    assert all(isinstance(state, torch.Tensor) for state in states["tracker"].values())
    wanted, before = drawn(first), list(second.states.values())
    drawn(second)
    assert drawn(second) != wanted or loaded == "plain"
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: second)
    sharded._restore_generators(states)
    assert drawn(second) == wanted
    assert loaded == "plain" or all(now is then for now, then in zip(second.states.values(), before, strict=True))
