"""A NeMo-RL GRPO config, for those on NeMo-Aligner's successor: only the keys that differ from NeMo-RL's own example, which it is based on.

Source: NVIDIA-NeMo/RL, examples/configs/grpo_math_1B.yaml at b26cfeb3 (its key names: tests/unit/rl/aligner/nemo_rl_keys.json).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core.config.nemo_rl import NemoRlConfig
from megatron_prism.core.errors import Problem
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.rl.aligner.prompts import Prompt

BASE = "examples/configs/grpo_math_1B.yaml"


def problems(config: NemoRlConfig) -> Iterator[Problem]:
    """Yield what NeMo-RL does not take together."""
    if config.max_staleness and not 0 < config.num_generation_nodes < config.num_nodes:
        found = (
            f"max_staleness {config.max_staleness} with num_generation_nodes {config.num_generation_nodes} of num_nodes {config.num_nodes}"
        )
        yield Problem("num_generation_nodes", found, "nodes that only sample, and some that train", "asynchronous GRPO samples elsewhere")
    if not config.max_staleness and config.num_generation_nodes:
        yield Problem("num_generation_nodes", str(config.num_generation_nodes), "0 where max_staleness is 0")
    if config.max_staleness and config.tis_cap is None:
        yield Problem("tis_cap", "null with max_staleness above 0", "a cap: asynchronous GRPO requires importance sampling correction")
    if (config.num_nodes - config.num_generation_nodes) * config.gpus_per_node % config.tp:
        yield Problem("tp", str(config.tp), "a divisor of the GPUs that train")


def length_problems(config: NemoRlConfig, prompts: Sequence[Prompt], spec: TokenizerSpec) -> list[Problem]:
    """Return the prompt that leaves a response the least room, where it leaves none. A chat template's own tokens are not counted."""
    sizes = {prompt.id: len(tokenizer.encode_prompt(prompt.prompt, spec)) for prompt in prompts}
    longest = max(sizes, key=lambda id: sizes[id])
    if sizes[longest] < config.seq_length:
        return []
    found = f"{config.seq_length}, and the prompt {longest} has {sizes[longest]} tokens"
    return [Problem("seq_length", found, "the longest prompt's tokens and a response's")]


def values(config: NemoRlConfig, folder: Path) -> dict[str, Any]:
    """Return the config as nested keys. folder: of train.jsonl and validation.jsonl, lines {input, output}."""
    is_async, rollouts = config.max_staleness > 0, config.num_prompts * config.num_samples
    resources = {"resources": {"num_nodes": config.num_generation_nodes, "gpus_per_node": config.gpus_per_node}} if is_async else {}
    falling = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": config.steps}
    schedule = {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": falling}
    return {
        "defaults": f"{config.repo}/{BASE}",
        "grpo": {
            "num_prompts_per_step": config.num_prompts,
            "num_generations_per_prompt": config.num_samples,
            "max_num_steps": config.steps,
            "max_num_epochs": config.steps,  # the steps alone end the run
            "normalize_rewards": True,
            "use_leave_one_out_baseline": False,  # the paper's: the mean of all, itself included
            "seed": config.seed,
            "async_grpo": {"enabled": is_async, "max_trajectory_age_steps": max(1, config.max_staleness)},
        },
        "loss_fn": {
            "reference_policy_kl_penalty": config.kl,
            "reference_policy_kl_type": "k3",
            "use_importance_sampling_correction": config.tis_cap is not None,
            "truncated_importance_sampling_ratio": config.tis_cap,
            "token_level_loss": True,
        },
        "policy": {
            "model_name": config.hf,
            "train_global_batch_size": rollouts,
            "train_micro_batch_size": 1,
            "max_total_sequence_length": config.seq_length,
            "dtensor_cfg": {"tensor_parallel_size": config.tp},
            "optimizer": {"kwargs": {"lr": config.lr}},
            "scheduler": [schedule, {"milestones": []}],
            "generation": {
                "backend": "vllm",
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": None,
                "vllm_cfg": {"async_engine": is_async, "tensor_parallel_size": config.tp},
                "colocated": {"enabled": not is_async, **resources},
            },
        },
        "data": {
            "train": {"dataset_name": "ResponseDataset", "data_path": str(folder / "train.jsonl"), "split_validation_size": 0},
            "validation": {"data_path": str(folder / "validation.jsonl")},
            "default": {
                "dataset_name": "ResponseDataset",
                "input_key": "input",
                "output_key": "output",
                "prompt_file": None,
                "env_name": "math",
            },
        },
        "checkpointing": {"checkpoint_dir": f"{config.results}/checkpoints"},
        "logger": {"log_dir": f"{config.results}/logs", "tensorboard_enabled": True},
        "cluster": {"num_nodes": config.num_nodes, "gpus_per_node": config.gpus_per_node},
    }
