"""Find the family for `architectures` in a config.json, or for the name in a ModelConfig."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, InputError, Problem
from megatron_prism.families import granite, granite_moe_hybrid, llama, mistral, nemotron_h, qwen2
from megatron_prism.families.rules import NO_EXPERTS, Rule, check_experts, check_names

FAMILIES = (llama, mistral, granite, granite_moe_hybrid, nemotron_h, qwen2)
# what trainers put in place of the class that they wrap; the model_type tells which it is
WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "DeepSpeedEngine",
    "PeftModelForCausalLM",
}
EXPERTS_IN_NAME = re.compile("moe(?!hybrid)|mixtral", re.IGNORECASE)  # GraniteMoe, Qwen2Moe, Olmoe, HunYuanMoEV1, ...


def of_model(model: ModelConfig, where: str = "model.family") -> ModuleType:
    """Return the family of an architecture. `where`: the key for messages.

    Raises: InputError for an unknown name.
    """
    for family in FAMILIES:
        if model.family == family.NAME:
            return family
    raise InputError(Problem(where, repr(model.family), f"one of {', '.join(family.NAME for family in FAMILIES)}"))


def of_hf(hf: Mapping[str, Any], where: str) -> ModuleType:
    """Return the family of a config.json. `architectures` and `model_type` must agree: transformers goes by the latter.

    `architectures` may be silent, or name the class wrapped by a trainer, or without its head: transformers loads the same model.
    Raises: CheckpointError where no family knows its architecture. The message names a mixture of experts as such.
    """
    named, kind = hf.get("architectures"), hf.get("model_type")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    by_class = [family for family in FAMILIES if {*map(unwrapped, names)} & {*family.ARCHITECTURES}]
    by_type = [family for family in FAMILIES if kind == family.MODEL_TYPE]
    if by_type and (named in (None, []) or by_type[0] in by_class or (names and {*names} <= WRAPPERS)):
        return by_type[0]
    if by_class and kind is None:
        return by_class[0]
    if by_class:
        required = f"{by_class[0].MODEL_TYPE!r}, as architectures {named!r} has it"
        fix = "transformers goes by model_type: correct the key that is wrong"
        raise CheckpointError(Problem(f"{where}:model_type", repr(kind), required, fix))
    known = sorted(name for family in FAMILIES for name in family.ARCHITECTURES)
    experts = check_experts(hf, where)
    fix = NO_EXPERTS if experts or EXPERTS_IN_NAME.search(repr(named)) else ""
    raise CheckpointError([Problem(f"{where}:architectures", repr(named), f"one of {', '.join(known)}", fix), *experts])


def unwrapped(name: str) -> str:
    """Return the class with a head that a name in `architectures` means: FSDPLlamaForCausalLM and LlamaModel are LlamaForCausalLM."""
    name = name.removeprefix("FSDP")  # transformers removes it too when it saves
    return f"{name.removesuffix('Model')}ForCausalLM" if name.endswith("Model") else name


def num_parameters(model: ModelConfig) -> int:
    """Return an architecture's parameters; a tied embedding counts once."""
    return sum(parameters(model).values())


def parameters(model: ModelConfig) -> dict[str, int]:
    """Return the size of each Megatron-Core parameter, by name."""
    sizes: dict[str, int] = {}
    for rule in rules(model):
        sizes[rule.parameter] = sizes.get(rule.parameter, 0) + math.prod(rule.shape)
    return sizes


def rules(model: ModelConfig) -> list[Rule]:
    """Return the weight map of an architecture, checked to name every tensor once."""
    family_rules = of_model(model).rules(model)
    check_names(family_rules)
    return family_rules
