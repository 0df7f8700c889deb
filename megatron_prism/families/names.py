"""The names of a folder's tensors: which rule each belongs to, and which no rule needs.

Trainers save wrapped names (`module.`, `_orig_mod.`), old versions of transformers saved buffers, and transformers itself accepts some
spellings beside the one that it writes. Pure functions of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_prism.core.config import ModelConfig
from megatron_prism.families.rules import Rule

# DDP and DeepSpeed; torch.compile; FSDP 1; activation checkpointing; Lightning
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
ADAPTER = re.compile(r"^base_model\.model\.|\.lora_[AB]\.|\.lora_embedding_[AB]|\.base_layer\.|\.lora_magnitude_vector")
HEAD, EMBEDDING = "lm_head.weight", "embedding.word_embeddings.weight"
INV_FREQ, MTP = re.compile(r"rotary_emb\.inv_freq"), re.compile(r"mtp")


def unwrapped(name: str) -> str:
    """Return a tensor's name without what wrapped its module: `module.model.norm.weight` is `model.norm.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_dropped(name: str, model: ModelConfig) -> bool:
    """Say whether transformers leaves a tensor out when it loads: a rotary buffer, and Nemotron-H's heads for further tokens.

    Source: transformers 5.24, PreTrainedModel._adjust_missing_and_unexpected_keys; NemotronHPreTrainedModel._keys_to_ignore_on_load_unexpected.
    """
    if model.position_embedding == "rope" and INV_FREQ.search(name):
        return True
    return model.family == "nemotron_h" and MTP.search(name) is not None


@dataclass(frozen=True)
class Spelled:
    """A model's rules with the names that a folder has on disk. copies: a tied head stored beside its embedding, by name."""

    rules: tuple[Rule, ...]
    copies: Mapping[str, str]


def spelled(rules: Sequence[Rule], names: Collection[str], model: ModelConfig) -> Spelled:
    """Return a model's rules in a folder's spelling. A tied matrix may stand under the embedding's name, under the head's, or under both.

    Source: transformers 5.24, PreTrainedModel.tie_weights, and the prefixes that from_pretrained adds or removes.
    """
    names = frozenset(names)
    own = [replace(rule, hf=tuple((_on_disk(name, names), shape) for name, shape in rule.hf)) for rule in rules]
    head = _on_disk(HEAD, names)
    if not model.tie_word_embeddings or head not in names:
        return Spelled(tuple(own), {})
    embedding, shape = next(rule.hf[0] for rule in own if rule.mcore == EMBEDDING)
    if embedding in names:
        return Spelled(tuple(own), {head: embedding})
    return Spelled(tuple(replace(rule, hf=((head, shape),)) if rule.mcore == EMBEDDING else rule for rule in own), {})


def _on_disk(name: str, names: Collection[str]) -> str:
    """Return the spelling of a rule's name that a folder has; the rule's own where it has none."""
    return next((spelling for spelling in _spellings(name) if spelling in names), name)


def _spellings(name: str) -> Iterator[str]:
    yield name
    if name.startswith("backbone."):
        yield f"model.{name.removeprefix('backbone.')}"
    else:
        yield name.removeprefix("model.")  # saved as the model without its head
        yield f"model.{name}"
