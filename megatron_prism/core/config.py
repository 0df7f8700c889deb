"""What a job's YAML may say: frozen dataclasses, one spelling from the YAML key to the field to the metric.

No default stands anywhere else. Defaults that the paper states carry its table; the others are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_prism.core.config_precision import FP8Config, OffloadConfig
from megatron_prism.core.config_run import GuardConfig, LimitsConfig, LogConfig, SaveConfig, ValidationConfig
from megatron_prism.core.section import Section

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Section):
    """LLaMA-3.1's rotary scaling (HF `rope_type: llama3`); Megatron-Core fixes all but `factor`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class MambaConfig(Section):
    """A Mamba-2 mixer's sizes; heads of one group share their B and C. chunk_size changes speed and memory, not the result."""

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    conv_kernel: int = 4
    chunk_size: int = 128


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A decoder's architecture, in Megatron-Core's words. A family reads it from HF's config.json and writes it back.

    family names the file of families/ that knows it.
    layer_pattern is a hybrid's, a letter a Megatron layer: M Mamba, * attention, - MLP; None: num_layers of attention and MLP.
    vocab_size is the true size (HF's); padding for tensor parallelism is derived when the model is built.
    window_size is the tokens a token attends to, itself included (HF's sliding_window); None: all before it.
    The multipliers are Granite's, applied at run time and never folded into weights; attention_multiplier is the scale
    of the attention scores, None: 1 / sqrt(kv_channels).
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layer_pattern: str | None = None
    mamba: MambaConfig | None = None
    activation: Literal["swiglu", "relu2"] = "swiglu"
    qkv_bias: bool = False
    norm_epsilon: float = 1e-5
    position_embedding: Literal["rope", "none"] = "rope"
    rotary_base: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    init_method_std: float = 0.02
    window_size: int | None = None
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


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
class ParallelConfig(Section):
    """The rank grid; data parallelism is what the world size leaves over.

    vpp is the number of model chunks a pipeline rank holds (interleaved 1F1B); None means one. distributed_optimizer
    shards the optimizer over data parallelism; a run keeps it as it began.
    cp_comm_type is how attention passes keys and values between context-parallel ranks on a GPU, in Megatron-Core's words;
    under a2a+p2p, groups of cp_a2a_size neighbours exchange heads (a2a), and the groups keys and values (p2p).
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    cp_a2a_size: int | None = None
    vpp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def cp_sizes(self) -> list[int] | None:
        """The ranks of an a2a and of a p2p group under a2a+p2p, else None."""
        return None if self.cp_a2a_size is None else [self.cp_a2a_size, self.cp // self.cp_a2a_size]


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
class RecomputeConfig(Section):
    """Activation recompute: `full` recomputes whole layers (the first num_layers of a stage; None: all of them), `selective` their modules.

    modules: Megatron-Core's names. core_attn, its default, saves much with unfused attention and next to nothing with Transformer Engine's.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    num_layers: int | None = None
    modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)


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


@dataclass(frozen=True, kw_only=True)
class KeepConfig(Section):
    """A condition on a field of the record (`a.b`: a field within one); one of the five operations is set.

    A record that does not meet it is left out and counted. A record without the field is a bad record.
    """

    field: str
    equals: str | int | float | bool | None = None
    not_equals: str | int | float | bool | None = None
    at_least: float | None = None
    one_of: tuple[str, ...] = ()
    starts_with: str | None = None


@dataclass(frozen=True, kw_only=True)
class TurnsConfig(Section):
    """Text from a list of turns ({role, content}, or {from, value}), joined with one line break; system turns are left out (ours).

    prefix: every utterance begins "User: " or "Assistant: " (paper, section 3.1: chat).
    """

    field: str = "messages"
    prefix: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """So many different texts for each value of a field of the record, chosen by lot (paper, section 3.1); other values are left out.

    Without a field all records are of one group, `all`.
    """

    counts: dict[str, int]
    field: str | None = None


@dataclass(frozen=True, kw_only=True)
class PartConfig(Section):
    """Files, and how their records become texts.

    path: files or globs (.jsonl or .txt, also .gz and .zst; .parquet; save_to_disk folders).
    keep: conditions on a record, all of which must hold. text: how a record becomes text, as `{field}` in braces; or turns.
    A .txt file is split into documents at blank lines (`split: paragraph`) or taken whole (`split: file`).
    hf_id: where it comes from, for the reader.
    """

    path: tuple[str, ...] = ()
    keep: tuple[KeepConfig, ...] = ()
    text: str = "{text}"
    turns: TurnsConfig | None = None
    sample: SampleConfig | None = None
    split: Literal["paragraph", "file"] = "file"
    hf_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig(PartConfig):
    """One source of a mixture: a part of its own, or several `parts` end to end. weight: percent of the training tokens.

    valid_path: files held out for validation, read like the source's own; else valid_percent of the documents, chosen by their hash.
    min_tokens: shorter documents are left out (the paper does so before the 128k step; its threshold is not given).
    dedup: `exact` leaves out a text that was there before, `minhash` also one much like it (the paper names no method: ours).
    decontaminate: leave out what the mixture's `decontaminate` finds. domain: what reports add it to.
    available_tokens: what it is said to hold, for a plan without data.
    """

    name: str
    weight: float
    parts: tuple[PartConfig, ...] = ()
    valid_path: tuple[str, ...] = ()
    valid_percent: float = 0.0
    min_tokens: int = 1
    dedup: Literal["none", "exact", "minhash"] = "none"
    decontaminate: bool = True
    domain: str | None = None
    available_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig(Section):
    """Leave out documents that share `ngram` words in a row with a text of `against` (the paper describes no decontamination: ours).

    A text of fewer words is looked for whole, one of fewer than `shortest` not at all (and counted).
    """

    against: tuple[PartConfig, ...]
    ngram: int = 13
    shortest: int = 8


@dataclass(frozen=True, kw_only=True)
class PackingConfig(Section):
    """Best-fit-decreasing packing into sequences of `seq_length`, in place of plain concatenation (paper, section 8.1).

    A document longer than seq_length is cut into chunks that overlap by `overlap` tokens (paper: optional, no number: 0 is ours).
    """

    seq_length: int
    overlap: int = 0


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """`prism prepare`: weighted sources, tokenized once into Megatron .bin/.idx files.

    tokens: the training budget whose blend is planned and reported; None: what the scarcest source gives in one epoch.
    seed: of `sample`. max_epochs: how often the budget may read a source over.
    tokenizer_backend: gigatoken gives the same ids, several times as fast, for the kinds of tokenizer it reads.
    """

    out: Path
    tokenizer: Path
    sources: tuple[SourceConfig, ...]
    tokens: int | None = None
    max_epochs: float | None = None
    seed: int = 1234
    decontaminate: DecontaminateConfig | None = None
    packing: PackingConfig | None = None
    append_eos: bool = True
    num_workers: int | None = None
    tokenizer_backend: Literal["tokenizers", "gigatoken"] = "tokenizers"
    on_bad_record: Literal["error", "skip"] = "error"
