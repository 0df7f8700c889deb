"""A gang of one that runs models in Megatron and in transformers: worker.py FOLDER reads cases.json, writes results.json.

A case: {"name", "hf", "ckpt", "tokens", "control": a fault to build in, or None, "replace": wrong values of the architecture}.
A result: the largest difference of the logits, and the worst relative difference of a Hugging Face parameter's gradient,
with its name.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import folder, layout, sharded
from megatron_prism.core.config import ModelConfig, ParallelConfig
from megatron_prism.families import find
from megatron_prism.models import build
from megatron_prism.parallel.groups import Groups, gang

Gradients = dict[str, torch.Tensor]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    with gang(ParallelConfig(), seed=0) as groups:
        for case in json.loads((root / "cases.json").read_text()):
            tokens_BS = torch.tensor([case["tokens"]])
            ours, our_gradients = megatron(Path(case["ckpt"]), tokens_BS, groups, case["control"], case["replace"])
            theirs, their_gradients = transformers_oracle(Path(case["hf"]), tokens_BS)
            assert our_gradients.keys() == their_gradients.keys()
            errors = {name: relative(our_gradients[name], theirs) for name, theirs in their_gradients.items()}
            worst = max(errors, key=errors.__getitem__)
            results[case["name"]] = {"logits": float((ours - theirs).abs().max()), "gradient": errors[worst], "parameter": worst}
    (root / "results.json").write_text(json.dumps(results))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def loss_of(logits_BSV: torch.Tensor, tokens_BS: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_BSV[0, :-1], tokens_BS[0, 1:])


def megatron(ckpt: Path, tokens_BS: torch.Tensor, groups: Groups, control: str | None, replace: dict[str, Any]) -> tuple[torch.Tensor, Gradients]:
    """Return Megatron's logits, and its gradients under their Hugging Face names."""
    model = folder.read(ckpt).model
    (chunk,) = build.build(dataclasses.replace(model, **replace), groups, ParallelConfig(), "fp32")
    sharded.load_weights(ckpt, [chunk])
    parameters = dict(chunk.named_parameters())
    if control == "swapped_gate_and_up":
        fc1 = parameters["decoder.layers.0.mlp.linear_fc1.weight"].data
        fc1.copy_(torch.cat(fc1.chunk(2)[::-1]))
    elif control == "dropped_norm":
        parameters["decoder.layers.0.input_layernorm.weight"].data.fill_(1)
    logits_BSV = chunk(tokens_BS, torch.arange(tokens_BS.shape[1])[None], None)[..., : model.vocab_size]
    loss_of(logits_BSV, tokens_BS).backward()
    keys = {entry.key: name for name, entry in sharded.weights([chunk])["chunk0"].items() if name in parameters}
    return logits_BSV.detach(), hf_gradients(model, {key: parameters[name].grad for key, name in keys.items()})


def hf_gradients(model: ModelConfig, by_key: dict[str, Any]) -> Gradients:
    found: Gradients = {}
    for rule in find.rules(model):
        gradient = by_key[rule.mcore][tuple(slice(size) for size in rule.shape)]  # without the rows that pad the vocabulary
        found |= {name: part for (name, _), part in zip(rule.hf, layout.unpack(rule, gradient, model), strict=True)}
    return found


def transformers_oracle(hf: Path, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    logits_BSV = model(tokens_BS).logits
    loss_of(logits_BSV, tokens_BS).backward()
    return logits_BSV.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
