"""The keys of `prism rl export nemo_aligner`. The paper's numbers name their source; all other defaults are ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_prism.core.config.exported import Count, ExportedRunConfig, Place
from megatron_prism.core.config.section import IS_PATH, Pattern, Range


@dataclass(frozen=True, kw_only=True)
class AlignerConfig(ExportedRunConfig):
    """A REINFORCE run of NeMo-Aligner 0.7.0 with our reward server. NeMo-Aligner has no GRPO."""

    checkpoint: Path
    """Our checkpoint that the run starts from, or a run folder (its latest). Its model is checked, and its tokenizer is the reward server's."""

    nemo: Place
    """The same weights as a .nemo file or folder, made by convert.sh. It need not exist yet."""

    prompts: Path
    """The training prompts: jsonl, a line {id, domain, kind, prompt, and gold | gold and choices | tests}."""

    validation_prompts: Path | None = None
    """The prompts of validation and test, in the same form. Null: the training prompts, so that val_rewards is not a held-out figure."""

    repo: Place = "/opt/NeMo-Aligner"
    """A checkout of NeMo-Aligner 0.7.0 as the container sees it. Its wheel lacks the examples, which start a run."""

    nemo_repo: Place = "/opt/NeMo"
    """A checkout of NeMo as the container sees it, for convert.sh."""

    image: Annotated[str, IS_PATH, Pattern(r"[^\s'\"]+", "an image of pyxis, in one word")]
    """The container with NeMo-Aligner's pins."""

    mounts: Annotated[tuple[str, ...], IS_PATH] = ()
    """The file systems mounted in that container: host:container. The exported folder, nemo and results must be in one, at the same place."""

    results: Place
    """The folder of NeMo-Aligner's logs and checkpoints."""

    num_nodes: Count = 1
    """The nodes of the actor. The reward server has one more, of the cluster's `cpu`."""

    tp: Count = 1
    """The tensor parallel size."""

    pp: Count = 1
    """The pipeline parallel size."""

    kl: Annotated[float, Range(ge=0)] = 0.05
    """The weight of the KL penalty (the paper's beta). NeMo-Aligner subtracts it from the reward of the whole response."""

    max_prompt_tokens: Count = 2048
    """The most tokens of a prompt, at most half of seq_length. A response gets the rest."""

    micro_batch_size: Count = 1
    """The sequences of a training microbatch."""

    rollout_micro_batch_size: Count = 8
    """The prompts that a rank samples at once. It divides num_prompts with the data parallel size."""

    validation_interval: Count = 10
    """The steps between validations."""

    save_interval: Count = 10
    """The steps between checkpoints."""

    seed: Annotated[int, Range(ge=0, lt=2**31)] = 1234
    """The seed of the sampler and of the order of the prompts."""

    port: Annotated[int, Range(ge=1024, lt=65536)] = 5555
    """The port of the reward server, and of the forwarder on each node of the actor."""

    is_chunk_patched: bool = False
    """The checkout's ReinforceRolloutBatch.chunk splits the batch over the ranks. As released it does not, and global_batch_size makes up for it."""
