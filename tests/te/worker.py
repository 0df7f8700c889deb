"""Builds models in one process, with one side's layers: worker.py FOLDER te|local reads FOLDER/cases.json, writes FOLDER/SIDE.json.

A case: {"name", "model": an architecture, "control": a fault to build into the local side, or None}. A result: what the built model is,
and what came of loading each checkpoint in FOLDER/NAME/. A side that has none there saves its own; so run local, te, and local again.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import standin
import torch
import torch.distributed as dist

from megatron_prism.checkpoint import folder, integrity, sharded
from megatron_prism.core.check.model import check_split
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig
from megatron_prism.core.load import build as read
from megatron_prism.models import batch, build, norm, spec, trainable
from megatron_prism.parallel import groups, host, megatron_versions

ATTRIBUTES = {"tensor_model_parallel": False, "partition_dim": -1, "partition_stride": 1, "sequence_parallel": False, "allreduce": True}
ONE, TP2 = GangConfig(), GangConfig(parallel=ParallelConfig(tp=2, sequence_parallel=True))
CP2 = {kind: GangConfig(parallel=ParallelConfig(cp=2, cp_comm_type=kind)) for kind in ("p2p", "all_gather", "a2a")}
CP2["a2a+p2p"] = GangConfig(parallel=ParallelConfig(cp=2, cp_comm_type="a2a+p2p", cp_a2a_size=2))
Facts = dict[str, Any]


class Fp32Norm(norm.LocalNorm):
    """A norm that stays in fp32, whatever wraps the model."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight.data = self.weight.data.float()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return self


CONTROLS = {
    "no key maps": [(spec, name, {}) for name in ("QKV_NORM", "FC1_NORM", "IN_PROJ_NORM")],
    "no extra state": [(module, "LocalFinalNorm", norm.LocalNorm) for module in (spec, build)],
    "fp32 norms": [(spec, "LocalNorm", Fp32Norm)],
}


def main(root: Path, side: str) -> None:
    torch.set_num_threads(1)
    if side == "te":
        standin.install(Path(sys.prefix) / "transformer_engine_python")
    groups.join()
    cases = [
        (case["name"], read(case["model"], ModelConfig, str), case["control"]) for case in json.loads((root / "cases.json").read_text())
    ]
    with groups.grid(ONE) as grid:
        found = {name: examine(root / name, model, grid, side, control) for name, model, control in cases}
    dist.destroy_process_group()
    join_half_a_world()
    with groups.grid(TP2) as grid:
        for name, model, control in cases:
            if control is None and not check_split(model, TP2.parallel.tp, 1, "tp", "pp"):
                found[name]["tp2"] = facts(built(model, grid, TP2, side, control))
    for kind, gang in CP2.items() if side == "te" else ():
        with groups.grid(gang) as grid:
            for name, model, control in cases:
                if control is None:
                    found[name].setdefault("context", {})[kind] = context(built(model, grid, gang, side, control))
    (root / f"{side}.json").write_text(json.dumps(found))


def join_half_a_world() -> None:
    """Be rank 1 of 2 where there is no rank 0: enough to build its half of a model."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())


def examine(home: Path, model: ModelConfig, grid: groups.Groups, side: str, control: str | None) -> Facts:
    chunks = built(model, grid, ONE, side, control)
    found = facts(chunks) | {"saved": save(home / side, model, chunks), "strict": {}, "weights": {}}
    for path in sorted(home.iterdir()):
        if path.name != side:
            found["strict"][path.name] = attempt(load_strictly, path, chunks)
            found["weights"][path.name] = attempt(sharded.load_weights, path, chunks)
    if side == "te":
        found["stock"] = classes(stock(model, grid))
        found["packed"] = [packed(module) for name, module in build.unwrap(chunks[0]).named_modules() if name.endswith(".core_attention")]
    return found


def built(model: ModelConfig, grid: groups.Groups, gang: GangConfig, side: str, control: str | None) -> list[Any]:
    """Return what build.build makes of a side's layers: local ones with a fault, or TE's on a GPU in which only TE believes."""
    with contextlib.ExitStack() as stack:
        if side == "te":
            stack.enter_context(believing_te())
        for module, name, value in CONTROLS.get(control or "", []) if side == "local" else []:
            stack.enter_context(mock.patch.object(module, name, value))
        return build.build(model, grid, gang)


@contextlib.contextmanager
def believing_te() -> Iterator[None]:
    with (
        mock.patch.object(spec, "use_transformer_engine", lambda: True),
        mock.patch.object(host, "has_cuda", lambda: False),
        standin.pretended_gpu(),
    ):
        yield


def stock(model: ModelConfig, grid: groups.Groups) -> torch.nn.Module:
    """Return the model of Megatron-Core's own specs of TE layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

    dense = get_gpt_layer_with_transformer_engine_spec()
    with mock.patch.object(spec, "dense", lambda *args: dense), mock.patch.object(spec, "hybrid", lambda *args: mamba_stack_spec):
        return build.unwrap(built(model, grid, ONE, "te", None)[0])


def facts(chunks: list[Any]) -> Facts:
    """Return what a model is, as far as its parts show it."""
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config

    model, (tensors, objects) = build.unwrap(chunks[0]), state_of(chunks)
    return {
        "parameters": {name: describe(parameter) for name, parameter in model.named_parameters()},
        "tensors": {key: list(parts[0].global_shape) for key, parts in tensors.items()},
        "objects": objects,
        "modules": classes(model),
        "attention": [attention(module) for name, module in model.named_modules() if name.endswith(".core_attention")],
        "residual": [scale for layer in model.decoder.layers for scale in residual_scales(layer)],
        "trained": trained(chunks, ["*.self_attention.*"]),
        "rotary_factor": _yarn_get_concentration_factor_from_config(model.config),
        "rope": model.rotary_pos_emb.inv_freq.tolist() if hasattr(model, "rotary_pos_emb") else None,
    }


def describe(parameter: torch.nn.Parameter) -> list[Any]:
    return [list(parameter.shape), str(parameter.dtype), {name: getattr(parameter, name, default) for name, default in ATTRIBUTES.items()}]


def classes(model: torch.nn.Module) -> dict[str, str]:
    """Return the class of each module that does something, by the module's name."""
    found = {name: f"{type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()}
    return {name: kind for name, kind in found.items() if not kind.endswith(".IdentityOp")}


def attention(module: Any) -> Facts:
    """Return what an attention layer multiplies its scores by, in each of its backends, and how far it sees: (before, after)."""
    backends = [getattr(module, f"{name}_attention") for name in ("flash", "fused", "unfused") if hasattr(module, f"{name}_attention")]
    return {"scales": [backend.softmax_scale for backend in backends or [module]], "window": getattr(module, "window_size", None)}


def context(chunks: list[Any]) -> list[Facts]:
    """Return what TE's attention layers were told of context parallelism: how they communicate, over which ranks, groups of which sizes."""
    modules = [module for name, module in build.unwrap(chunks[0]).named_modules() if name.endswith(".core_attention")]
    groups_of = [module.cp_group if isinstance(module.cp_group, list) else [module.cp_group] for module in modules]
    return [
        {"kind": module.cp_comm_type, "ranks": list(module.cp_global_ranks), "sizes": [group.size() for group in found]}
        for module, found in zip(modules, groups_of, strict=True)
    ]


def trained(chunks: list[Any], patterns: list[str]) -> list[str]:
    """Return the parameters, as a checkpoint names them, that are left to train."""
    states = sharded.weights(chunks)
    trainable.freeze(chunks, states, patterns)
    left = sorted(states["chunk0"][name].key for name, parameter in build.unwrap(chunks[0]).named_parameters() if parameter.requires_grad)
    trainable.freeze(chunks, states, ["*"])
    return left


def packed(module: Any) -> Facts:
    """Return what Megatron's wrapper hands to TE's own attention of two sequences of documents, once TE's signature has taken it."""
    from megatron.core.transformer.enums import AttnMaskType
    from transformer_engine.pytorch import DotProductAttention

    ids_BS = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.int32)
    params = batch.packed_documents({"document_ids": ids_BS})
    query = torch.zeros(8, 4, 16)
    signature = inspect.signature(DotProductAttention.forward)
    with mock.patch.object(DotProductAttention, "forward", lambda *args, **kwargs: signature.bind(*args, **kwargs).arguments):
        given = module(query, query[:, :2], query[:, :2], None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
    wanted = ("qkv_format", "attn_mask_type", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")
    return {name: given[name].tolist() if isinstance(given[name], torch.Tensor) else given[name] for name in wanted}


def residual_scales(layer: Any) -> list[float]:
    """Return what a layer's additions multiply a branch by: asked of them, with a branch of 1."""
    additions = [getattr(layer, f"{branch}_bda", None) for branch in ("mamba", "self_attn", "mlp")]
    one, none = torch.ones(1), torch.zeros(1)
    return [float(add(True, layer.config.bias_dropout_fusion)((one, None), none, 0.0)) for add in additions if hasattr(add, "__code__")]


def state_of(chunks: list[Any]) -> tuple[dict[str, list[Any]], list[str]]:
    """Return what a checkpoint would hold: its tensors by key, in shards (gate and up are two), and the keys of its other objects."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = sharded.weights(chunks)
    apply_factories(state)
    parts = list(nested_values(state))
    tensors = sorted((part for part in parts if isinstance(part, ShardedTensor)), key=lambda part: part.global_offset)
    by_key = {key: [part for part in tensors if part.key == key] for key in {part.key for part in tensors}}
    return by_key, sorted(part.key for part in parts if not isinstance(part, ShardedTensor))


def digests(chunks: list[Any]) -> dict[str, str]:
    """Return the hash of each tensor's bytes, by key."""
    tensors = {key: torch.cat([part.data for part in parts]) for key, parts in state_of(chunks)[0].items()}
    return {key: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}


def fill(chunks: list[Any], seed: int) -> None:
    """Make every parameter random: none is as it was, no norm is all ones."""
    torch.manual_seed(seed)
    for parameter in chunks[0].parameters():
        parameter.data.uniform_(-1, 1)


def save(path: Path, model: ModelConfig, chunks: list[Any]) -> dict[str, str]:
    """Save a checkpoint of random weights, unless it is there; return their digests."""
    from megatron.core import dist_checkpointing

    fill(chunks, seed=len(path.name))
    if not path.is_dir():
        (path / folder.STATE).mkdir(parents=True)
        dist_checkpointing.save(sharded.weights(chunks), str(path / folder.STATE), **megatron_versions.save_arguments())
        folder.write_meta(path, folder.describe(model, 0, 0))
        integrity.seal(path)
    return digests(chunks)


def attempt(load: Any, path: Path, chunks: list[Any]) -> Any:
    """Return the digests of what was loaded over other weights, or the error."""
    fill(chunks, seed=99)
    try:
        load(path, chunks)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return digests(chunks)


def load_strictly(path: Path, chunks: list[Any]) -> None:
    """Load a checkpoint that must have the model's keys and no others."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    loaded = dist_checkpointing.load(sharded.weights(chunks), str(path / folder.STATE), strict=StrictHandling.RAISE_ALL)
    build.unwrap(chunks[0]).load_state_dict(loaded["chunk0"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
