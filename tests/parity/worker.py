"""One rank of a gang that runs models in Megatron and in transformers: worker.py FOLDER reads cases.json, writes results.json.

A case: {"name", "hf", "ckpt", "tokens", "parallel": the layout, "control": a fault to build in, or None, "replace": wrong values of the
architecture, "documents": the lengths of the documents in each row of the tokens, or None}. A result: the largest difference of the logits,
of the loss, and the worst relative difference of a Hugging Face parameter's gradient, with its name; also the logits' relative difference. Loss and gradients come from the
training step's own forward and backward pass. The oracle is given each document alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.checkpoint import folder, reference, sharded, torch_dist
from megatron_prism.core import load
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig
from megatron_prism.families import blocks, registry
from megatron_prism.models import build
from megatron_prism.models.batch import INPUTS, Batch, model_batch, packed_documents
from megatron_prism.models.forward import logits
from megatron_prism.parallel import megatron_versions
from megatron_prism.parallel.groups import Groups, grid, join
from megatron_prism.train import optim, step
from megatron_prism.train.objective import CROSS_ENTROPY
from megatron_prism.train.timers import Timers

Gradients = dict[str, torch.Tensor]
Found = tuple[torch.Tensor, float, Gradients]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    join()
    results = {}
    for case in json.loads((root / "cases.json").read_text()):
        parallel = ParallelConfig(**case["parallel"], distributed_optimizer=False)
        gang = GangConfig(parallel=parallel, precision="fp32", seed=0)
        with grid(gang) as groups:
            found = megatron(root / "gradients", case, gang, groups)
        if dist.get_rank() == 0:
            documents = tuple(length for row in case["documents"] or [[len(case["tokens"])]] for length in row)
            oracle = transformers_oracle(Path(case["hf"]), tuple(case["tokens"]), documents, case["control"] == "floored_time_step")
            results[case["name"]] = compare(found, oracle)
    if dist.get_rank() == 0:
        (root / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def compare(found: Found, wanted: Found) -> dict[str, Any]:
    assert found[2].keys() == wanted[2].keys()
    errors = {name: float((found[2][name] - theirs).norm() / theirs.norm()) for name, theirs in wanted[2].items()}
    worst = max(errors, key=errors.__getitem__)
    difference = found[0] - wanted[0]
    return {
        "logits": float(difference.abs().max()),
        "logits_relative": float(difference.norm() / wanted[0].norm()),
        "loss": abs(found[1] - wanted[1]),
        "gradient": errors[worst],
        "parameter": worst,
    }


def megatron(scratch: Path, case: dict[str, Any], gang: GangConfig, groups: Groups) -> Found:
    """Return Megatron's logits, its loss, and its gradients under their Hugging Face names: on rank 0 whole, elsewhere of no meaning.

    The gradients are put together as a checkpoint's weights are: each rank saves its shards, rank 0 reads whole tensors.
    """
    model, tokens = folder.read(Path(case["ckpt"])).model, case["tokens"]
    bare = build.build(load.build({**load.to_dict(model), **case["replace"]}, ModelConfig, str), groups, gang)
    sharded.load_weights(Path(case["ckpt"]), bare)
    break_weights(bare[0], case["control"])
    batch = batch_of(tokens, case["documents"], case["control"])
    logits_SV = packed_logits(bare, batch, groups) if case["documents"] else logits(bare, tokens, groups)
    chunks = optim.wrap(bare, gang)
    sums = step.forward_backward(chunks, [batch] * (groups.pp if groups.vpp else 1), CROSS_ENTROPY, groups, Timers())
    loss = step.read(sums)[0].loss
    for chunk in bare:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    if groups.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    save(bare, scratch)
    whole = torch.zeros(len(tokens), model.vocab_size)
    if logits_SV is not None:
        whole.copy_(logits_SV[:, : model.vocab_size])
    if groups.pp > 1:
        dist.broadcast(whole, groups.last_stage_rank, group=groups.pp_group)
    return whole, loss, hf_gradients(model, torch_dist.TensorReader(scratch)) if groups.rank == 0 else {}


def save(chunks: list[Any], scratch: Path) -> None:
    from megatron.core import dist_checkpointing

    megatron_versions.write_results_in_memory()  # on a device host.install() has not
    dist.barrier()
    dist_checkpointing.save(sharded.weights(chunks), str(scratch), **megatron_versions.save_arguments())
    dist.barrier()


def batch_of(tokens: list[int], documents: list[list[int]] | None, control: str | None) -> Batch:
    tokens_BS = torch.tensor(tokens).view(len(documents or [0]), -1)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    ids_BS = torch.zeros_like(tokens_BS, dtype=torch.int32)
    if documents:
        ids_BS = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in documents]).int()
    mask_BS = torch.zeros(tokens_BS.shape)
    mask_BS[:, :-1] = (ids_BS.diff() == 0).float()  # nothing follows a document's last token
    batch = {"tokens": tokens_BS, "labels": tokens_BS.roll(-1, 1), "loss_mask": mask_BS, "position_ids": positions_BS}
    return batch | {"document_ids": ids_BS} if documents and control != "no document mask" else batch


@torch.no_grad()
def packed_logits(chunks: list[Any], batch: Batch, groups: Groups) -> torch.Tensor | None:
    """Return the logits (B * S, V) in one process; None on a layout."""
    if groups.world_size > 1:
        return None
    row = model_batch(batch, INPUTS, groups)
    return chunks[0](row["tokens"], row["position_ids"], None, packed_seq_params=packed_documents(batch)).flatten(0, 1)


def break_weights(chunk: Any, control: str | None) -> None:
    parameters = dict(build.unwrap(chunk).named_parameters())
    if control == "swapped_gate_and_up":
        fc1 = parameters["decoder.layers.0.mlp.linear_fc1.weight"].data
        fc1.copy_(torch.cat(fc1.chunk(2)[::-1]))
    elif control == "no_qkv_bias":
        for layer in range(3):
            parameters[f"decoder.layers.{layer}.self_attention.linear_qkv.bias"].data.zero_()
    elif control == "dropped_norm":
        parameters["decoder.layers.0.input_layernorm.weight"].data.fill_(1)


def hf_gradients(model: ModelConfig, reader: torch_dist.TensorReader) -> Gradients:
    return dict(blocks.hf_tensors(registry.rules(model), lambda rule: reader.read(rule.mcore, rule.shape)))


@lru_cache(maxsize=1)
def transformers_oracle(hf: Path, tokens: tuple[int, ...], documents: tuple[int, ...], floored: bool, rounded: bool = False) -> Found:
    """Return what transformers computes in fp32. rounded: from weights rounded to bf16."""
    model = reference.load(hf, torch.float32)
    if rounded:
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.bfloat16())
    if floored:  # as transformers itself does it
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (model.config.time_step_min, float("inf"))
    alone = torch.tensor(tokens).split(documents)
    logits = [model(document[None]).logits[0] for document in alone]
    losses = [
        torch.nn.functional.cross_entropy(mine[:-1], document[1:], reduction="sum") for mine, document in zip(logits, alone, strict=True)
    ]
    loss = torch.stack(losses).sum() / (len(tokens) - len(documents))
    loss.backward()
    prefix = "backbone." if model.config.model_type == "nemotron_h" else "model."  # on disk; in memory it is model. for all
    gradients = {name.replace("model.", prefix, 1): parameter.grad for name, parameter in model.named_parameters()}
    return torch.cat(logits).detach(), loss.item(), gradients


if __name__ == "__main__":
    main(Path(sys.argv[1]))
