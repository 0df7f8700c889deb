"""transformers as the oracle: a Hugging Face folder's own model, with the defects of transformers that we know of mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_prism.core import log


def load(root: Path, dtype: torch.dtype | None = None) -> Any:
    """Return a folder's model by plain transformers, without custom code and without the network; dtype None: as on disk."""
    from transformers import AutoModelForCausalLM

    choice = {} if dtype is None else {"dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(root, local_files_only=True, attn_implementation="eager", **choice)
    if unfloor_time_steps(model):
        log.get().info("transformers holds Nemotron-H's time steps above time_step_min; set to the config's time_step_limit, as it was trained")
    return model.eval()


def unfloor_time_steps(model: Any) -> int:
    """Let Nemotron-H's mixers limit the time step as its config says, and not to time_step_min, which only initialises it.

    transformers 5.23 clamps at time_step_min (0.001): logits differ by 6.6e-2. The published code and Megatron-Core do not clamp.
    Returns the mixers changed. Source: transformers/models/nemotron_h, NemotronHMamba2Mixer.__init__.
    """
    limit = tuple(float(end) for end in getattr(model.config, "time_step_limit", None) or ())
    mixers = [module for module in model.modules() if getattr(module, "time_step_limit", limit) != limit]
    for mixer in mixers:
        mixer.time_step_limit = limit
    return len(mixers)
