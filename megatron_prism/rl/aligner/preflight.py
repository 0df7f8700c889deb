"""What NeMo-Aligner 0.7.0 cannot run, refused before anything is written, and what a user of it must know."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.config.aligner import AlignerConfig
from megatron_prism.core.errors import Problem
from megatron_prism.rl.aligner.overrides import data_parallel

FAMILIES = ("llama", "mistral")  # with a converter to .nemo, a type of TensorRT-LLM 0.13, and nothing else in their layers
NATIVE = "train it with this project's own RL (prism rl)"

# Read in the source of NeMo-Aligner 0.7.0 (the wheel and its repository's last commit), but where it says otherwise.
DEFECTS = (
    "There is no GRPO. REINFORCE subtracts a leave-one-out baseline and does not divide by the group's standard deviation; it has no ratio and no "
    "clipping. The KL penalty lowers the reward of the whole response.",
    "ReinforceRolloutBatch.chunk ignores its rank, so that every data parallel rank trains on the whole batch. model.global_batch_size is set to make "
    "up for it (is_chunk_patched: false): one update a step, on all rollouts, at dp times the work that is needed.",
    "utils/trt_llm.py imports tensorrt_llm without a condition: the actor does not start without it, even with trt_llm.enable=False.",
    "Groups are found by equal rows of padded prompts: prompts of one text would become one group. The export drops repeated prompts.",
    "A response that did not end is left out of the baseline, and a group with at most one that ended has no advantage.",
    "RLHFDataset drops all but the text, and silently puts another prompt in the place of one that is too long. The answer table and the export's limit "
    "are for that.",
    "The trainer needs CUDA. It was not run here; what was, is in docs/COMPATIBILITY.md.",
    "It is not maintained since May 2025; its authors refer to NeMo-RL.",
)


def model_problems(model: ModelConfig, config: AlignerConfig) -> Iterator[Problem]:
    """Yield why NeMo-Aligner cannot train a model."""
    where = f"checkpoint {config.checkpoint}"
    if model.mamba is not None:
        yield Problem(
            where, f"{model.family}, a hybrid with Mamba layers", "a dense model: NeMo-Aligner's actor is MegatronGPTModel", NATIVE
        )
        return
    if model.family not in FAMILIES:
        yield Problem(where, f"the family {model.family}", f"one of {', '.join(FAMILIES)}", NATIVE)
        return
    if model.window_size is not None and model.window_size < config.seq_length:
        found = f"a sliding window of {model.window_size} tokens"
        yield Problem(where, found, f"no window below seq_length {config.seq_length}: NeMo's converter counts it off by one", NATIVE)
    if model.tie_word_embeddings:
        yield Problem(where, "tied embeddings", "an output layer of its own: NeMo's converter back reads one", NATIVE)
    if model.family == "llama" and model.kv_channels * model.num_attention_heads != model.hidden_size:
        found = f"heads of {model.kv_channels} channels"
        yield Problem(where, found, "hidden_size / num_attention_heads, which NeMo's converter back assumes", NATIVE)


def size_problems(config: AlignerConfig, gpus_per_node: int) -> Iterator[Problem]:
    """Yield the sizes that do not divide."""
    world, split = config.num_nodes * gpus_per_node, config.tp * config.pp
    if gpus_per_node < 1 or world % split:
        yield Problem("tp, pp", f"tp {config.tp} x pp {config.pp} on {world} GPUs", "a product that divides the GPUs")
        return
    dp = data_parallel(config, gpus_per_node)
    ranks = dp * config.pp  # resharded, the ranks of a pipeline sample on their own
    if config.num_prompts % (config.rollout_micro_batch_size * ranks):
        found = f"num_prompts {config.num_prompts}, {ranks} ranks that sample {config.rollout_micro_batch_size} each"
        yield Problem("rollout_micro_batch_size", found, "num_prompts a multiple of their product")
    if (config.num_prompts * config.num_samples) % (config.micro_batch_size * dp):
        yield Problem(
            "micro_batch_size", f"{config.num_prompts * config.num_samples} rollouts", f"a multiple of {config.micro_batch_size} x dp {dp}"
        )
    if config.max_prompt_tokens > config.seq_length // 2:
        required = f"at most half of seq_length {config.seq_length}: RLHFDataset puts another prompt in the place of a longer one"
        yield Problem("max_prompt_tokens", str(config.max_prompt_tokens), required)
