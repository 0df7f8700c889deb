"""The config of `prism rl`, and the sections that only reinforcement learning has."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.config.section import MAY_CHANGE, Range, Section
from megatron_prism.core.config.train import OptimizerConfig, RunConfig, ScheduleConfig

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"]
Loss = Literal["clip", "gspo", "cispo"]
KLEstimator = Literal["k1", "k2", "k3"]
Normalization = Literal["token", "sequence", "constant"]
Overlong = Literal["none", "mask", "shape"]


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(Section):
    """How a response's outcome becomes its reward and its advantage, and the loss of its tokens. The defaults are the paper's GRPO (section 9.1).

    What the paper leaves open is open-instruct's default, as the paper was trained with it, or ours; each key says which.
    """

    advantage: Advantage = "grpo"
    """The advantage of a response. grpo (paper): (r - mean) / (std + advantage_eta) of its group. dr_grpo: r - mean. rloo: r minus the mean of
    the group's others. reinforce++: (r - mean) / (std + advantage_eta) of the whole batch. reinforce++_baseline: r minus its group's mean,
    then that over the whole batch."""

    advantage_eta: Annotated[float, Range(gt=0)] = 1e-8
    """What is added to a standard deviation. The paper gives no size: open-instruct's default."""

    keep_zero_variance: bool = False
    """Train on groups without variance too: their advantages are 0, and only the KL term has a gradient. The paper does not say: off, as
    open-instruct's default. reinforce++ has no groups, and keeps all."""

    loss: Loss = "clip"
    """The loss of a token. clip (paper): PPO's clipped ratio. gspo: the ratio of its whole sequence, clipped. cispo: the clipped ratio,
    without a gradient, times the log-probability; it is clipped above only."""

    clip_low: Annotated[float, Range(ge=0, le=1)] = 0.2
    """A ratio below 1 - clip_low is clipped. The paper gives no size: open-instruct's default. GSPO's authors use 3e-4."""

    clip_high: Annotated[float, Range(ge=0)] = 0.272
    """A ratio above 1 + clip_high is clipped. The paper gives no size: open-instruct's default. GSPO's authors use 4e-4."""

    kl_beta: Annotated[float, Range(ge=0)] = 0.05
    """The coefficient of the KL divergence from the reference in the loss (paper, Table 10). 0: no reference is needed."""

    kl_estimator: KLEstimator = "k3"
    """The estimator of that divergence, of l = log(policy / reference): k1 is l, k2 is l^2 / 2, k3 is exp(-l) - 1 + l. The paper does not name
    its own: open-instruct's default. k1 has k2's gradient, since its own is 0 in the mean."""

    tis_cap: Annotated[float | None, Range(gt=0)] = 2.0
    """The largest weight of truncated importance sampling, min(old / sampler, tis_cap), by token (paper: C = 2). Null: no such weight."""

    normalization: Normalization = "token"
    """What a token's loss is divided by. token (paper): all tokens of the batch. sequence: the tokens of its response, and the number of
    responses. constant: constant_tokens, and the number of responses (dr_grpo)."""

    constant_tokens: Annotated[int | None, Range(ge=1)] = None
    """Under constant: the divisor of a response's sum, for example the most tokens that a response may have."""

    overlong: Overlong = "none"
    """What is done with a response that did not end by an end token. none: it counts as its outcome says. mask: it is left out of its
    group's statistics and of the loss. shape: DAPO's linear penalty on the last overlong_tokens of the room, whether it ended or not. The
    paper does not say: none, as open-instruct's default."""

    overlong_tokens: Annotated[int, Range(ge=1)] = 4096
    """Under shape: the last tokens of a response's room, over which the penalty rises from 0 to overlong_penalty (DAPO's size)."""

    overlong_penalty: Annotated[float, Range(ge=0)] = 1.0
    """Under shape: the penalty of a response that fills its room (DAPO's size)."""

    stop_penalty: Annotated[float, Range(ge=0)] = 0.0
    """What a response loses that did not end by an end token. The paper has such a penalty and gives no size: off."""

    repetition_penalty: Annotated[float, Range(ge=0)] = 0.0
    """What a response loses for repetition: this times the share of its n-grams that stand in it earlier. The paper has such a penalty and
    gives no size: off."""

    repetition_ngram_tokens: Annotated[int, Range(ge=1)] = 20
    """The tokens of such an n-gram. The paper does not say: ours."""


@dataclass(frozen=True, kw_only=True)
class VLLMConfig(Section):
    """The engine `vllm`, which shares the gang's processes and devices with training."""

    tensor_parallel: Annotated[int | None, Range(ge=1)] = None
    """The ranks that hold one of vLLM's copies of the model; the gang's other ranks hold further copies. Null: parallel.tp."""

    memory_share: Annotated[float, Range(gt=0, lt=1)] = 0.4
    """The share of a GPU's memory that vLLM's weights and cache may fill while it samples; on a host the share of its memory for the cache."""


@dataclass(frozen=True, kw_only=True)
class MCoreConfig(Section):
    """The engine `mcore`, Megatron-Core's dynamic inference engine on the training model itself."""

    memory_share: Annotated[float, Range(gt=0, lt=1)] = 0.25
    """The most of a GPU's memory that its keys, values and states may fill while it samples: less where num_rows of the longest prompt and response
    need less. Where they need more, responses wait, or are computed again. Ours: of 80 GB it is Megatron-Core's own default of 20 GB."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How responses are sampled."""

    engine: Annotated[Literal["cached", "mcore", "vllm"], MAY_CHANGE] = "cached"
    """What samples: `cached` is the embedded engine, `mcore` Megatron-Core's dynamic one on a GPU, both on the training model's own weights.
    `vllm` has its own copy of them (docs/RL.md, Engines)."""

    mcore: Annotated[MCoreConfig, MAY_CHANGE] = field(default_factory=MCoreConfig)

    vllm: Annotated[VLLMConfig, MAY_CHANGE] = field(default_factory=VLLMConfig)

    num_samples: Annotated[int, Range(ge=1)] = 16
    """The responses to a prompt, its group (paper: 16)."""

    max_tokens: Annotated[int, Range(ge=1)]
    """The most tokens of a response (paper: 16,384 with its prompt)."""

    temperature: Annotated[float, Range(gt=0)] = 1.0
    """What divides the sampler's logits (paper: 1). `prism rl` refuses any other: the trainer's log-probabilities are those of temperature 1."""

    num_rows: Annotated[int, Range(ge=1), MAY_CHANGE] = 64
    """The responses that decode together on each data-parallel replica."""

    max_sampler_kl: Annotated[float | None, Range(gt=0), MAY_CHANGE] = None
    """The trust gate's bound: the largest mean KL divergence of trainer and sampler on the same tokens, at the start and in each step. A run
    that is beyond it ends. Null: 1e-9 in fp32, 1e-2 in bf16 (ours)."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(SamplingConfig):
    """What a step samples."""

    num_prompts: Annotated[int, Range(ge=1)] = 64
    """The prompts of a step (paper: 64)."""

    lag: Annotated[int, Range(ge=0, le=1), MAY_CHANGE] = 0
    """The updates that may lie between the weights that sample a response and those that it trains. 0: none, a step waits for its responses
    and their grades. 1: one step off, the next step's responses are sampled before this step's update and graded while it trains. The paper
    does not say: 0, ours."""

    max_refills: Annotated[int, Range(ge=0)] = 0
    """How often a step draws other prompts for groups that have nothing to learn from. The paper does not say: ours is never, and the step
    trains on the groups that are left."""

    keep: Annotated[bool, MAY_CHANGE] = False
    """Write each step's responses (rollouts/step_N.jsonl): ids, text, outcome, reward, log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class PackedBatchConfig(Section):
    """How a step's responses are laid out as microbatches. Several share a row, and none sees another."""

    seq_length: Annotated[int, Range(ge=1)]
    """The tokens of a row. A prompt with its longest response must fit (paper: 16,384, packed)."""

    micro_size: Annotated[int, Range(ge=1), MAY_CHANGE] = 1
    """The rows of a microbatch, on one rank."""

    num_minibatches: Annotated[int, Range(ge=1)] = 1
    """The optimizer steps of a step: its groups are divided among so many minibatches, trained on in turn, and from the second on the ratio is
    not 1. A step with fewer kept groups has fewer. Paper: 1, on-policy."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Section):
    """The reference model of the KL term: the weights that the run began with, which follow the policy by soft updates (paper)."""

    alpha: Annotated[float, Range(ge=0, le=1)] = 0.6
    """reference = alpha x policy + (1 - alpha) x reference. The paper gives no size: open-instruct's default."""

    interval: Annotated[int, Range(ge=0)] = 1
    """The steps between two updates. 0: the reference never changes. The paper does not say: ours."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptimizerConfig(OptimizerConfig):
    """AdamW. The learning rate is the paper's; it does not state the rest for reinforcement learning."""

    lr: Annotated[float, Range(ge=0)] = 5e-7
    """The learning rate at the end of the warm-up (paper)."""

    eps: Annotated[float, Range(gt=0)] = 1e-8
    """What is added to the root of the second moment. Ours: torch's default."""

    weight_decay: Annotated[float, Range(ge=0)] = 0.0
    """Decoupled weight decay. Biases and norms are not decayed. Ours: none."""


@dataclass(frozen=True, kw_only=True)
class PolicyScheduleConfig(ScheduleConfig):
    """Learning rate over steps: linear warm-up, then `kind` down to lr * final_factor at the last step."""

    kind: Literal["cosine", "linear", "exponential", "wsd", "constant"] = "linear"
    """The shape of the decay (paper: linear)."""

    final_factor: Annotated[float, Range(ge=0, le=1)] = 0.0
    """The last step's learning rate, as a share of lr. Ours: 0."""


@dataclass(frozen=True, kw_only=True)
class RLValidationConfig(Section):
    """Validation on prompts that are not trained on: pass@1 and pass@num_samples, unbiased, by domain."""

    prompts: Path | None = None
    """The held-out prompts, a folder as `prompts`. Null: no validation."""

    num_samples: Annotated[int, Range(ge=1)] = 4
    """The responses to a prompt. Each validation draws with the same seeds."""

    interval: Annotated[int, Range(ge=0)] = 0
    """The steps between validations. 0: only at the start and at the end."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig(Section):
    """Records: everything that a step saw (records/step_N), for `prism rl replay`. They cost a fingerprint of every tensor and change no bit."""

    interval: Annotated[int, Range(ge=0)] = 0
    """Record the first step and every `interval` steps from it: under save.interval of the same number, each step after a checkpoint. 0:
    none; `--record` makes it 1."""

    keep_last: Annotated[int, Range(ge=1)] = 16
    """Keep this many of the newest records."""


@dataclass(frozen=True, kw_only=True)
class RLConfig(RunConfig):
    """`prism rl`: reinforcement learning on verifiable rewards. A step trains on what its own weights sampled, or those of the step before."""

    prompts: Annotated[Path, MAY_CHANGE]
    """The prompt set's folder (`prism prompts`). A resumed run may find the same set at another path, and no other set."""

    mode: Annotated[Literal["all", "rollout", "train"], MAY_CHANGE] = "all"
    """What a step does. all: it samples, grades and trains. rollout (`--only rollout`): it samples and grades with the weights that the run
    starts from, and trains nothing. train (`--only train`): it trains on the responses of train_from, and neither samples nor grades."""

    train_from: Path | None = None
    """Under mode train: the folder of the run whose records have the responses (`--from RUN`). The run draws the prompts of the other, so
    prompts, seed and the sizes in rollout.* are as there; the algorithm may be another."""

    rollout: RolloutConfig

    batch: PackedBatchConfig

    logits_chunk_tokens: Annotated[int | None, Range(ge=1), MAY_CHANGE] = 2048
    """Compute logits, loss and entropy of this many of a rank's tokens at a time, so that their memory does not grow with seq_length. Null: of
    all tokens at once. Ours: a microbatch of no more tokens is computed whole, with the same bits."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)

    grade: GradeConfig = field(default_factory=GradeConfig)

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    optimizer: PolicyOptimizerConfig = field(default_factory=PolicyOptimizerConfig)

    schedule: PolicyScheduleConfig = field(default_factory=PolicyScheduleConfig)

    validation: Annotated[RLValidationConfig, MAY_CHANGE] = field(default_factory=RLValidationConfig)

    record: Annotated[RecordConfig, MAY_CHANGE] = field(default_factory=RecordConfig)
