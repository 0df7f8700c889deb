"""Tasks that ask the model themselves, and not for responses that we sample: the held-out loss of a prepared mixture.

What one came to is kept whole by the weights and its config, so that it is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_prism.core.config import EvaluateConfig, TaskConfig
from megatron_prism.core.errors import Problem
from megatron_prism.core.load import to_dict
from megatron_prism.core.manifest import sha256_json
from megatron_prism.data import loader
from megatron_prism.data.mixture import Prepared, read_prepared
from megatron_prism.eval import held_out
from megatron_prism.eval.model import Evaluated
from megatron_prism.parallel.groups import Groups

HELD_OUT = "held_out"


def read(config: TaskConfig) -> Prepared:
    """Return a task's mixture. Raises: InputError where it is none."""
    assert config.held_out is not None
    return read_prepared(config.held_out.mixture)


def check(name: str, config: TaskConfig, prepared: Prepared, evaluated: Evaluated) -> list[Problem]:
    """Return why a model's loss on a mixture would mean nothing, or cannot be computed."""
    assert config.held_out is not None
    where, problems = f"tasks.{name}.held_out", loader.check_held_out(prepared, config.held_out.seq_length)
    if all(source.valid is None for source in prepared.sources):
        problems.append(Problem(f"{where}.mixture", "no source that holds anything out", "valid_percent or valid_path of a source"))
    own = evaluated.tokenizer_sha256()
    if prepared.tokenizer_sha256 != own:
        problems.append(
            Problem(f"{where}.mixture", "data of another tokenizer", f"that of {evaluated.assets}", "prepare it with the model's")
        )
    if config.held_out.seq_length > evaluated.model.max_position_embeddings:
        required = f"at most the context of {evaluated.model.max_position_embeddings}"
        problems.append(Problem(f"{where}.seq_length", str(config.held_out.seq_length), required))
    return problems


def key_of(config: EvaluateConfig, task: TaskConfig, prepared: Prepared, weights: str) -> str:
    """Return what a task's figures are kept under. weights: the model's sum."""
    assert task.held_out is not None
    own = to_dict(task.held_out) | {"mixture": prepared.sha256, "micro_size": None}
    return sha256_json({"weights": weights, "precision": config.precision, "seed": config.seed, HELD_OUT: own})


def measure(config: EvaluateConfig, task: TaskConfig, prepared: Prepared, chunks: Sequence[Any], groups: Groups) -> dict[str, Any]:
    """Return a task's part of the summary; every rank of the gang calls this. score: None, as a loss is no share."""
    wanted = task.held_out
    assert wanted is not None
    by_source = held_out.losses(
        chunks,
        prepared,
        groups,
        num_sequences=wanted.sequences,
        seq_length=wanted.seq_length,
        micro_size=wanted.micro_size,
        seed=config.seed,
    )
    return {
        "score": None,
        "losses": {name: asdict(loss) for name, loss in by_source.items()},
        "protocol": {"seq_length": wanted.seq_length, "sequences": wanted.sequences, "seed": config.seed, "source": "ours"},
        "set": {"name": HELD_OUT, "path": str(wanted.mixture), "sha256": prepared.sha256},
    }
