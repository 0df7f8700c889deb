"""`prism train`'s config, and the sections that only training has."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_prism.core.config.gang import FP8Config, OffloadConfig, ParallelConfig, Precision, RecomputeConfig
from megatron_prism.core.config.model import ModelConfig
from megatron_prism.core.config.run import GuardConfig, LimitsConfig, LogConfig, SaveConfig, ValidationConfig
from megatron_prism.core.config.section import Section


@dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """Where the weights come from: a checkpoint, or `seed` (then `model` and `tokenizer` must be given). Beside a checkpoint `model` is
    what it must be.

    max_position_embeddings: the positions that a checkpoint's model is extended to, in its config.json too when it is written back. Nothing
    else of it changes: the paper's step to 128k mentions no change of the rotary positions.
    """

    checkpoint: Path | None = None
    tokenizer: Path | None = None
    max_position_embeddings: int | None = None

    def extend(self, model: ModelConfig) -> ModelConfig:
        """Return a checkpoint's architecture as the run begins with it."""
        return model if self.max_position_embeddings is None else replace(model, max_position_embeddings=self.max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class MixtureChange(Section):
    """From `step` (steps done) on: other weights, by source name, in percent; where `prepared` is given, of another mixture."""

    step: int
    weights: dict[str, float] | None = None
    prepared: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """A prepared mixture (`prism prepare`); `weights` replaces the mixture's own, by source name, in percent.

    A source that `weights` leaves out is not read. changes: other mixtures later in the run. max_epochs: how often a
    source may be read over; the paper reads one 4.4 times (Table 1), and states no limit.
    document_mask: neither attention nor a Mamba layer's state passes from one document to the next, and positions begin
    again in each. The paper describes no masking at 8k: off.
    """

    prepared: Path
    seq_length: int
    weights: dict[str, float] | None = None
    changes: tuple[MixtureChange, ...] = ()
    max_epochs: float | None = None
    document_mask: bool = False
    num_workers: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Section):
    """Sequences a step over all ranks, and a microbatch on one rank. Paper: 128 and 1 (Table 16)."""

    global_size: int
    micro_size: int = 1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW. Defaults are the paper's (Table 16), but clip_grad, which it does not state (lm-engine's default)."""

    lr: float = 5e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-10
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then `kind` down to lr * final_factor at the last step.

    wsd_decay_steps is the length of WSD's last, linear part. Paper: cosine, 500 warm-up steps, factor 0.1 (Table 16).
    """

    kind: Literal["cosine", "linear", "exponential", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    final_factor: float = 0.1
    wsd_decay_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """`prism train`: from-scratch base training, mid-training and long-context extension are this one job.

    world_size: the ranks that the run is laid out for, a GPU each; a gang of another size is refused. None: any.
    deterministic: the same bits again on the same ranks. environment: variables for NCCL, CUDA, torch and Transformer Engine,
    over those that follow from the config (parallel/environment.py).
    trainable: patterns of parameter names as a checkpoint has them; all others stay as they are, bit for bit.
    """

    run_dir: Path
    steps: int
    data: DataConfig
    batch: BatchConfig
    world_size: int | None = None
    seed: int = 1234
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelConfig | None = None
    precision: Precision = "bf16"
    fp8: FP8Config | None = None
    deterministic: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    trainable: tuple[str, ...] = ("*",)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    log: LogConfig = field(default_factory=LogConfig)
