"""What went wrong while a checkpoint was loaded, whose bytes are those that were written: the checkpoint, another rank, or the machine."""

from __future__ import annotations

import errno
import traceback
import types
from collections.abc import Callable
from pathlib import Path

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
