"""Parameters that do not train, and of which a checkpoint holds more than the model's dtype can: fp32 or fp16 tensors in a bf16 run.

The model computes with them in its own dtype. As they were loaded they are kept beside each parameter, on the host, and a save writes them
so: a run's checkpoints, and their export, have the bits of the checkpoint that the run began from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import folder, sharded, torch_dist
from megatron_prism.models.build import unwrap
from megatron_prism.parallel import groups

AS_LOADED = "as_loaded"  # an attribute of such a parameter


def keep(path: Path, chunks: Sequence[Any]) -> None:
    """Keep what a whole checkpoint holds of frozen parameters. Every rank of the gang calls this, once its parameters are frozen."""
    wanted: dict[str, dict[str, Any]] = {}
    if any(not parameter.requires_grad for chunk in chunks for parameter in chunk.parameters()):
        dtypes = torch_dist.TensorReader(folder.read(path).state).dtypes()
        for index, name, parameter, entry in _parameters(chunks, sharded.weights(chunks)):
            stored = dtypes.get(_key(entry), parameter.dtype)
            if not parameter.requires_grad and torch.promote_types(stored, parameter.dtype) != parameter.dtype:
                wanted.setdefault(index, {})[name] = _holding(entry, parameter.detach().to(stored))
    if not groups.agree([bool(wanted)])[0]:
        return
    loaded = sharded.load(wanted, path)
    for index, name, parameter, _ in _parameters(chunks, wanted):
        setattr(parameter, AS_LOADED, loaded[index][name].cpu())


def in_full(state: Mapping[str, Any], chunks: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded state of a save with frozen parameters as they were loaded."""
    whole = dict(state)
    for index, name, parameter, entry in _parameters(chunks, state):
        if (values := getattr(parameter, AS_LOADED, None)) is not None:
            whole[index] = {**whole[index], name: _holding(entry, values)}
    return whole


def _parameters(chunks: Sequence[Any], state: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield the parameters in a sharded state: the chunk's key, the name in the chunk, the parameter, the state's entry."""
    for number, chunk in enumerate(chunks):
        entries = state.get(f"chunk{number}", {})
        yield from (
            (f"chunk{number}", name, parameter, entries[name]) for name, parameter in unwrap(chunk).named_parameters() if name in entries
        )


def _key(entry: Any) -> str:
    """Return the name in a checkpoint of a sharded tensor, or of the tensors that a factory divides a parameter into."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    return str(next(iter(nested_values(entry.build()))).key if isinstance(entry, ShardedTensorFactory) else entry.key)


def _holding(entry: Any, values: torch.Tensor) -> Any:
    """Return a sharded tensor, or a factory of some, with other values of the same shape."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return replace(entry, data=values, dtype=values.dtype) if isinstance(entry, ShardedTensor) else replace(entry, data=values)
