"""Do a checkpoint's model and the readers of its config.json rotate alike? Frequency by frequency, and the factor on the attention scores.

At the length of a comparison of logits wrong frequencies may hardly show: at 64 tokens a model with yarn and one without it look the same.
Shape legend: F rotary frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.families import rope_v4
from megatron_prism.models import rope
from megatron_prism.models.build import unwrap

TOLERANCE = 1e-6  # relative: fp32 computed in another order differs by 2e-7


@dataclass(frozen=True)
class Rotary:
    """How a model rotates: its frequencies, radians a position, and the factor on cosines and sines."""

    inverse_F: torch.Tensor
    factor: float


def of_checkpoint(chunk: Any, model: ModelConfig) -> Rotary | None:
    """Return how a built Megatron model rotates; None: it has no rotary positions. The factor is read back from the softmax's scale."""
    bare = unwrap(chunk)
    if model.position_embedding != "rope":
        return None
    plain = model.kv_channels**-0.5 if model.attention_multiplier is None else model.attention_multiplier
    scale = plain if bare.config.softmax_scale is None else bare.config.softmax_scale
    return Rotary(bare.rotary_pos_emb.inv_freq.float().cpu(), math.sqrt(scale / plain))


def of_transformers(model: Any) -> Rotary | None:
    """Return how a model of transformers rotates; None: it has no rotary positions."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    return None if rotary is None else Rotary(rotary.inv_freq.float().cpu(), float(rotary.attention_scaling))


def of_v4(hf: Mapping[str, Any], model: ModelConfig, where: str) -> Rotary | str:
    """Return how transformers 4 would rotate with this config.json, or in words why it would not load."""
    read, problems = rope_v4.read(hf, model, where)
    if problems:
        return "; ".join(map(str, problems))
    return Rotary(rope.inverse_frequencies(read), rope.attention_factor(read))


def difference(ours: Rotary | None, theirs: Rotary | None) -> str:
    """Return in words where two models rotate differently, the worst frequency first named; empty where they rotate alike.

    All attention layers of a model share its frequencies.
    """
    if ours is None or theirs is None:
        return "" if ours is theirs else "only one of them has rotary positions"
    if len(ours.inverse_F) != len(theirs.inverse_F):
        return f"{len(ours.inverse_F)} frequencies, and {len(theirs.inverse_F)}"
    relative_F = ((ours.inverse_F.double() - theirs.inverse_F.double()).abs() / theirs.inverse_F.double().abs()).nan_to_num(nan=math.inf)
    if float(relative_F.max()) > TOLERANCE:
        worst, wrong = int(relative_F.argmax()), int((relative_F > TOLERANCE).sum())
        one, other = float(ours.inverse_F[worst]), float(theirs.inverse_F[worst])
        return f"inv_freq[{worst}] of every attention layer is {one:.9g}, and {other:.9g} ({wrong} of {len(relative_F)} frequencies differ)"
    if not math.isclose(ours.factor, theirs.factor, rel_tol=TOLERANCE):
        return f"the attention factor of every attention layer is {ours.factor:.9g}, and {theirs.factor:.9g}"
    return ""


def compare(ours: Rotary | None, transformers_model: Any, hf: Mapping[str, Any], model: ModelConfig, where: str) -> dict[str, Any]:
    """Return a checkpoint's rotary positions beside those of transformers and of a reader of transformers 4's kind, in words.

    rotary_passed is false where transformers differs, or where config.json has transformers 4's keys and they say something else. Without
    these keys a reader of transformers 4's kind takes defaults: that is said, and no fault of the checkpoint.
    """
    theirs = difference(ours, of_transformers(transformers_model))
    old = of_v4(hf, model, where) if ours is not None else ours
    theirs_v4 = old if isinstance(old, str) else difference(ours, old)
    return {
        "rotary_transformers": theirs or "same",
        "rotary_v4_reading": theirs_v4 or "same",
        "rotary_passed": not theirs and not (theirs_v4 and rope_v4.has_keys(hf)),
    }
