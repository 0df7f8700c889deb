"""The keys of `prism rl export nemo_rl`. The paper's numbers name their source; all other defaults are ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_prism.core.config.exported import Count, ExportedRunConfig, Place
from megatron_prism.core.config.section import Range


@dataclass(frozen=True, kw_only=True)
class NemoRlConfig(ExportedRunConfig):
    """A GRPO run of NVIDIA NeMo-RL, which grades math with its own math-verify."""

    hf: Place
    """The Hugging Face folder that the run starts from: prism convert export."""

    prompts: Path
    """The training prompts, of kind math: jsonl, a line {id, domain, kind, prompt, gold}."""

    validation_prompts: Path
    """The prompts of validation, in the same form."""

    repo: Place = "/opt/nemo-rl"
    """A checkout of NeMo-RL, whose examples/configs/grpo_math_1B.yaml the config is based on."""

    results: Place
    """The folder of checkpoints and logs."""

    num_nodes: Count = 1
    """The nodes."""

    gpus_per_node: Count = 8
    """The GPUs of a node."""

    num_generation_nodes: Annotated[int, Range(ge=0)] = 0
    """The nodes that only sample. 0: sampling and training share all GPUs. max_staleness above 0 needs some."""

    tp: Count = 1
    """The tensor parallel size, of training and of sampling."""

    kl: Annotated[float, Range(ge=0)] = 0.05
    """The weight of the KL term (the paper's beta)."""

    max_staleness: Annotated[int, Range(ge=0)] = 0
    """The most steps by which a rollout's weights may be behind. 0: synchronous."""

    tis_cap: Annotated[float | None, Range(ge=1)] = 2.0
    """The cap of truncated importance sampling between sampler and trainer. Null: no correction."""

    seed: Annotated[int, Range(ge=0, lt=2**31)] = 42
    """The seed."""
