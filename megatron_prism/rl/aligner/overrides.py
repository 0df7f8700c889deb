"""What NeMo-Aligner's train_gpt_reinforce_actor.py is started with: Hydra overrides, one word each.

The words are read from a file into a bash array, so no shell splits or expands them. Texts are quoted by Hydra's own grammar.
Source: NeMo-Aligner 0.7.0, examples/nlp/gpt/conf/gpt_reinforce_actor.yaml and tests/functional/reinforce.sh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prism.core.config.aligner import AlignerConfig
from megatron_prism.rl.aligner.prompts import SPLITS


def data_parallel(config: AlignerConfig, gpus_per_node: int) -> int:
    """Return the data parallel size."""
    return max(1, config.num_nodes * gpus_per_node // (config.tp * config.pp))


def global_batch_size(config: AlignerConfig, dp: int) -> int:
    """Return model.global_batch_size, with which a step has one update on all its rollouts.

    As released, each data parallel rank holds the whole batch (ReinforceRolloutBatch.chunk ignores its rank), of which it takes
    global_batch_size / dp rollouts an update. dp times the rollouts make that the whole batch: the same work, one update instead of dp.
    """
    rollouts = config.num_prompts * config.num_samples
    return rollouts if config.is_chunk_patched else rollouts * dp


def values(config: AlignerConfig, gpus_per_node: int, folder: Path, end_strings: tuple[str, ...], num_distinct: int) -> dict[str, Any]:
    """Return each key of NeMo-Aligner's config that is set, with its Hydra prefix (`++`: added where it is not there).

    folder: of the jsonl prompts. end_strings: the tokenizer's end tokens. num_distinct: of the training prompts; more steps than they
    fill need more epochs.
    """
    dp = data_parallel(config, gpus_per_node)
    return {
        "trainer.num_nodes": config.num_nodes,
        "trainer.devices": gpus_per_node,
        "trainer.precision": "bf16",
        "trainer.reinforce.max_epochs": math.ceil(config.steps / max(1, num_distinct // config.num_prompts)),
        "trainer.reinforce.max_steps": config.steps,
        "trainer.reinforce.val_check_interval": config.validation_interval,
        "trainer.reinforce.save_interval": config.save_interval,
        "trainer.reinforce.gradient_clip_val": 1.0,
        "trainer.reinforce.initial_policy_kl_penalty": config.kl,
        "trainer.reinforce.use_absolute_kl": True,
        "trainer.reinforce.num_rollouts_per_prompt": config.num_samples,
        "trainer.reinforce.rollout_batch_seq_length": config.seq_length,
        "trainer.reinforce.trt_llm.enable": True,
        "trainer.reinforce.trt_llm.reshard": config.pp > 1,
        "trainer.reinforce.trt_llm.unload_engine_train": False,
        "trainer.reinforce.trt_llm.model_type": "llama",
        "pretrained_checkpoint.restore_from_path": config.nemo,
        "exp_manager.explicit_log_dir": config.results,
        "exp_manager.create_wandb_logger": False,
        "remote_rm.reward_model.name": "reward_model",
        "remote_rm.reward_model.ip": "127.0.0.1",
        "remote_rm.reward_model.port": config.port,
        "remote_rm.pad_to_length": config.seq_length,
        "++model.tensor_model_parallel_size": config.tp,
        "++model.pipeline_model_parallel_size": config.pp,
        "++model.dist_ckpt_format": "torch_dist",
        "++model.dist_ckpt_load_strictness": "log_all",
        "model.seed": config.seed,
        "model.encoder_seq_length": config.seq_length,
        "model.micro_batch_size": config.micro_batch_size,
        "model.global_batch_size": global_batch_size(config, dp),
        "model.reinforce.num_rollout_samples": config.num_prompts,
        "model.reinforce.rollout_micro_batch_size": config.rollout_micro_batch_size,
        "++model.reinforce.length_params.max_length": config.seq_length - config.max_prompt_tokens,
        "model.reinforce.sampling_params.end_strings": list(end_strings),
        "model.optim.lr": config.lr,
        "model.optim.sched.name": "PolynomialDecayAnnealing",
        "++model.optim.sched.power": 1.0,
        "model.optim.sched.warmup_steps": 0,
        "model.optim.sched.min_lr": 0.0,
        "model.data.data_impl": "jsonl",
        "++model.data.data_prefix": {split: [str(folder / f"{split}.jsonl")] for split in SPLITS},
    }


REMOVED = ("model.optim.sched.constant_steps",)  # of the cosine schedule that the config has; the linear one takes no such key


def words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as Hydra's words."""
    return [*(f"{key}={written(value)}" for key, value in settings.items()), *(f"~{key}" for key in REMOVED)]


def written(value: Any) -> str:
    """Return a value in Hydra's grammar; a text is quoted, with neither an interpolation nor a line break left in it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        if "\n" in value or "${" in value:
            raise ValueError(f"{value!r} cannot be a word of Hydra")
        escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(part)}" for key, part in value.items()) + "}"
    return "[" + ",".join(map(written, value)) + "]"
