"""The config of `prism analyze landscape`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_prism.core.config.evaluate import AskingConfig, AtRestConfig
from megatron_prism.core.config.section import MAY_CHANGE, Range


@dataclass(frozen=True, kw_only=True)
class LandscapeConfig(AskingConfig):
    """`prism analyze landscape`: scores between three models, W = base + a (mid - base) + b (rl - mid). Started again, it goes on."""

    out: Annotated[Path, MAY_CHANGE]
    """The folder to write: landscape.json, and points/NAME, an evaluation of each point. One set of models."""

    base_model: AtRestConfig
    """The model before mid-training."""

    mid_model: AtRestConfig
    """The mid-trained model. Every point is asked with its tokenizer, its end tokens and its context."""

    rl_model: AtRestConfig
    """The model after reinforcement learning."""

    num_steps_to_mid: Annotated[int, Range(ge=1), MAY_CHANGE] = 6
    """The path's steps from base to mid, b being 0 (paper: 6)."""

    num_steps_to_rl: Annotated[int, Range(ge=1), MAY_CHANGE] = 4
    """The path's steps from mid to rl, a being 1 (paper, read from its picture: 4)."""

    plane_size: Annotated[int, Range(ge=0), MAY_CHANGE] = 0
    """Evaluate the plane through the three models too: so many points a side, from -0.3 to 1.3 of the way from mid to rl and to base, read from
    the paper's picture (paper: 5). 0: no plane."""

    keep_largest: Annotated[tuple[Annotated[float, Range(gt=0, lt=1)], ...], MAY_CHANGE] = ()
    """Evaluate mid with this share of the entries of rl - mid, the largest of all tensors together, and no change of the others (ours)."""

    num_nulls: Annotated[int, Range(ge=0), MAY_CHANGE] = 0
    """Evaluate mid with so many draws of a Gaussian update that has the norm of rl - mid in each tensor (ours)."""
