"""The config of `prism train`, and the sections that every run that trains a model has (RunConfig)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.gang import GangConfig
from megatron_prism.core.config.model import ModelConfig, YarnRope
from megatron_prism.core.config.run import GuardConfig, LimitsConfig, LogConfig, SaveConfig, ValidationConfig
from megatron_prism.core.config.section import MAY_CHANGE, Range, Section

Weight = Annotated[float, Range(gt=0)]  # percent


@dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """Where the weights come from: a checkpoint, or `seed`. From `seed`, `model` and `tokenizer` must be given."""

    checkpoint: Annotated[Path | None, MAY_CHANGE] = None
    """The checkpoint to start from, or a run folder (its latest). It brings its own tokenizer. A resumed run does not read it."""

    tokenizer: Annotated[Path | None, MAY_CHANGE] = None
    """The tokenizer's folder, for a run from scratch."""

    max_position_embeddings: Annotated[int | None, Range(ge=1)] = None
    """The positions that a checkpoint's model is extended to. Its config.json and tokenizer_config.json have them when it is written back.
    Nothing else of the model changes, but by the three keys below: the paper's step to 128k mentions no change of the rotary positions."""

    rope_theta: Annotated[float | None, Range(gt=1)] = None
    """Another base of the rotary frequencies for a checkpoint's model. The paper mentions none: an option of ours. Null: the checkpoint's."""

    yarn: YarnRope | None = None
    """yarn for a checkpoint's model. max_position_embeddings is then factor x original_max_position_embeddings. The paper mentions none: an
    option of ours. Null: the checkpoint's."""

    window_size: Annotated[int | None, Range(ge=1)] = None
    """A wider window of attention for a checkpoint's model. As wide as max_position_embeddings: none. The paper mentions none: an option of
    ours. Null: the checkpoint's."""

    @property
    def extends(self) -> bool:
        """Say whether the run begins with another architecture than the checkpoint's, or says anew what it is."""
        return any(value is not None for value in (self.max_position_embeddings, self.rope_theta, self.yarn, self.window_size))

    def extend(self, model: ModelConfig) -> ModelConfig:
        """Return a checkpoint's architecture, extended as the run begins with it."""
        positions = model.max_position_embeddings if self.max_position_embeddings is None else self.max_position_embeddings
        window = model.window_size if self.window_size is None else self.window_size
        return replace(
            model,
            max_position_embeddings=positions,
            rotary_base=model.rotary_base if self.rope_theta is None else self.rope_theta,
            yarn=model.yarn if self.yarn is None else self.yarn,
            window_size=None if self.window_size is not None and window is not None and window >= positions else window,
        )


@dataclass(frozen=True, kw_only=True)
class MixtureChange(Section):
    """Another mixture, from a step on."""

    step: Annotated[int, Range(ge=1)]
    """The change comes after this many steps."""

    weights: dict[str, Weight] | None = None
    """The weights from then on, by source name, in percent. Null: the mixture's own."""

    prepared: Path | None = None
    """Another prepared mixture. Null: the previous one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """A prepared mixture, and how a run reads it."""

    prepared: Annotated[Path, MAY_CHANGE]
    """The mixture's folder (`prism prepare`). A resumed run may find the same mixture at another path, and no other mixture."""

    seq_length: Annotated[int, Range(ge=1)]
    """The tokens of a sequence."""

    weights: dict[str, Weight] | None = None
    """Weights in place of the mixture's own, by source name, in percent. A source that is left out is not read. Null: the mixture's own."""

    changes: Annotated[tuple[MixtureChange, ...], MAY_CHANGE] = ()
    """Other mixtures later in the run. A resumed run may change those that it has not reached."""

    max_epochs: Annotated[float | None, Range(gt=0, finite=False), MAY_CHANGE] = None
    """The most epochs of a source. The paper reads one 4.4 times (Table 1) and states no limit. Null: no limit."""

    document_mask: bool = False
    """Neither attention nor a Mamba layer's state crosses from one document to the next, and positions restart in each. The paper
    describes no masking at 8k: off."""

    num_workers: Annotated[int, Range(ge=0), MAY_CHANGE] = 0
    """The number of processes per rank that read data. 0: the rank itself reads."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Section):
    """What a step reads."""

    global_size: Annotated[int, Range(ge=1)]
    """The sequences of a step, over all ranks (paper: 128, Table 16)."""

    micro_size: Annotated[int, Range(ge=1), MAY_CHANGE] = 1
    """The sequences of a microbatch, on one rank (paper: 1, Table 16)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW. Defaults are the paper's (Table 16), except clip_grad."""

    lr: Annotated[float, Range(ge=0)] = 5e-5
    """The learning rate at the end of the warm-up (paper, Table 16)."""

    beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    """The decay of the first moment (paper, Table 16)."""

    beta2: Annotated[float, Range(ge=0, lt=1)] = 0.95
    """The decay of the second moment (paper, Table 16)."""

    eps: Annotated[float, Range(gt=0)] = 1e-10
    """What is added to the root of the second moment (paper, Table 16)."""

    weight_decay: Annotated[float, Range(ge=0)] = 0.1
    """Decoupled weight decay (paper, Table 16). Biases and norms are not decayed."""

    clip_grad: Annotated[float, Range(ge=0)] = 1.0
    """The largest gradient norm: larger gradients are scaled down to it. 0: never. The paper does not state it: lm-engine's default."""

    moments: Literal["fp32", "bf16"] = "fp32"
    """The dtype in which the two moments are kept between steps, in memory and in checkpoints. A step computes in fp32. bf16 is Megatron-Core's
    precision-aware optimizer on a GPU, for precision bf16 and parallel.distributed_optimizer; main weights stay in fp32."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then `kind` down to lr * final_factor at the last step."""

    kind: Literal["cosine", "linear", "exponential", "wsd", "constant"] = "cosine"
    """The shape of the decay (paper: cosine, Table 16). exponential is lm-engine's, which reaches its end exactly. wsd is warm-up,
    stable, decay."""

    warmup_steps: Annotated[int, Range(ge=0)] = 0
    """The steps of the warm-up (paper: 500, Table 16)."""

    final_factor: Annotated[float, Range(ge=0, le=1)] = 0.1
    """The last step's learning rate, as a share of lr (paper: 0.1, Table 16). Without effect under constant."""

    wsd_decay_steps: Annotated[int | None, Range(ge=1)] = None
    """Under wsd: the length of the last, linear part."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(GangConfig):
    """A run that trains a model, by whatever objective: where it begins, how it steps, what it saves."""

    run_dir: Annotated[Path, MAY_CHANGE]
    """The run's folder. A run that is started again with the same folder resumes."""

    steps: Annotated[int, Range(ge=1)]
    """The optimizer steps of the whole run."""

    init: InitConfig = field(default_factory=InitConfig)

    model: ModelConfig | None = None
    """The architecture of a run from scratch. With init.checkpoint: the architecture that the checkpoint must have."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    gc_interval: Annotated[int, Range(ge=0), MAY_CHANGE] = 0
    """Collect Python's garbage every this many steps, on all ranks at once. 0: whenever Python does, on each rank at another step."""

    trainable: tuple[str, ...] = ("*",)
    """Patterns of the checkpoint names of the parameters to train. All others keep their values, bit for bit."""

    save: Annotated[SaveConfig, MAY_CHANGE] = field(default_factory=SaveConfig)

    guard: Annotated[GuardConfig, MAY_CHANGE] = field(default_factory=GuardConfig)

    limits: Annotated[LimitsConfig, MAY_CHANGE] = field(default_factory=LimitsConfig)

    log: Annotated[LogConfig, MAY_CHANGE] = field(default_factory=LogConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """`prism train`: from-scratch base training, mid-training and long-context extension are this one job."""

    data: DataConfig

    batch: BatchConfig

    validation: Annotated[ValidationConfig, MAY_CHANGE] = field(default_factory=ValidationConfig)
