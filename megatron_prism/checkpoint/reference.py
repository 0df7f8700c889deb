"""transformers as the oracle: a Hugging Face folder's own model, with the defects of transformers that we know of mended."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_prism.core import log
from megatron_prism.core.errors import CheckpointError, PrismError, Problem, raise_problems
from megatron_prism.hf import recognise, safetensors

KERNELS = ("mamba_ssm", "causal_conv1d")
REQUIRED = "a folder that plain transformers loads: safetensors weights, every one of them, of a model that transformers itself has"


def load(root: Path, dtype: torch.dtype | None = None) -> Any:
    """Return a folder's model by plain transformers, without custom code, pickled weights or the network; dtype None: as on disk.

    Raises: CheckpointError with what is wrong with the folder's files, or what transformers said, where it cannot load it so, or would make
    up weights that the folder lacks. For an adapter beside the model, which transformers loads or not, as peft is installed or not.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    choice: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    choice |= {"local_files_only": True, "attn_implementation": "eager", "use_safetensors": True, "output_loading_info": True}
    raise_problems(recognise.adapter_beside(root))
    try:
        with said_of(root), without_kernels():
            model, loaded = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=False, **choice)  # None would ask at a terminal
    except CheckpointError:
        safetensors.open_shards(root)  # transformers names a symptom of a Git-LFS pointer, a pickle, a shard that was not fetched
        raise
    if missing := sorted(loaded["missing_keys"]):
        found = f"no {missing[0]} (and {len(missing) - 1} more), which transformers would draw at random"
        raise CheckpointError(Problem(str(root), found, REQUIRED))
    if unfloor_time_steps(model):
        log.get().info(
            "transformers holds Nemotron-H's time steps above time_step_min; set to the config's time_step_limit, as it was trained"
        )
    model.generation_config = GenerationConfig()  # the caller's choices alone: a published repetition_penalty is no part of the model
    return model.eval()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within the block mamba_ssm and causal_conv1d cannot be imported, so that transformers computes its Mamba layers with torch.

    It looks for them when a model's file is first imported, and then calls their CUDA kernels for tensors on the host too.
    Source: transformers/integrations/hub_kernels.py, use_kernel_func_from_hub_with_fallback (5.24).
    """
    kept = {name: sys.modules[name] for name in KERNELS if name in sys.modules}
    sys.modules.update(dict.fromkeys(KERNELS))  # type: ignore[arg-type]  # None: an import fails
    try:
        yield
    finally:
        for name in KERNELS:
            del sys.modules[name]
        sys.modules.update(kept)


@contextmanager
def said_of(root: Path) -> Iterator[None]:
    """Raise what transformers raises while it loads or runs a folder as a CheckpointError with what it said."""
    try:
        yield
    except (PrismError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # KeyError for a config, RuntimeError for a shape, ImportError for a quantisation, and others
        said = " ".join(str(error).split())
        raise CheckpointError(Problem(str(root), f"{type(error).__name__} of transformers: {said}", REQUIRED)) from error


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
