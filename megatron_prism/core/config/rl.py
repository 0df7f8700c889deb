"""The config of reinforcement learning, in sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_prism.core.config.section import Range, Section

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
