"""The config of `prism evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_prism.core.config.gang import GangConfig
from megatron_prism.core.config.grade import AnswerForm, GradeLimits, Think
from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.config.rl import MCoreConfig, VLLMConfig
from megatron_prism.core.config.run import LimitsConfig
from megatron_prism.core.config.section import IS_PATH, MAY_CHANGE, Pattern, Range, Section

Overlong = Literal["refuse", "shorten", "clip"]


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(Section):
    """A model that is served elsewhere, behind an `openai`-style interface."""

    url: Annotated[str, Pattern(r"https?://\S+", "an address that begins with http:// or https://")]
    """The interface's address, as http://127.0.0.1:8000/v1. Requests go nowhere else: no proxy and no redirection is followed."""

    model: str
    """The model's name there. With the address it stands for the weights' sums, which are not known: the same name must mean the same weights."""

    api: Literal["completions", "chat"] = "completions"
    """completions: a text is continued (URL/completions). chat: the server applies its template to turns (URL/chat/completions)."""

    token_variable: Annotated[str | None, Pattern(r"[A-Za-z_][A-Za-z0-9_]*", "the name of a variable")] = None
    """The environment variable that holds the access token. Null: none is sent."""

    tokenizer: Path | None = None
    """A folder with the model's tokenizer. Only sets whose prompts have a length in tokens (ruler) need it."""

    num_requests: Annotated[int, Range(ge=1), MAY_CHANGE] = 16
    """The requests that run at once."""

    num_retries: Annotated[int, Range(ge=0), MAY_CHANGE] = 5
    """How often a request that failed is sent again, each time after twice the wait, from 1 s to 60 s. Then its response is a fault."""

    timeout_s: Annotated[float, Range(gt=0), MAY_CHANGE] = 3600.0
    """The seconds of one request."""


@dataclass(frozen=True, kw_only=True)
class AtRestConfig(Section):
    """A model at rest: one of the two."""

    checkpoint: Annotated[Path | None, MAY_CHANGE] = None
    """A checkpoint, or a run's folder (its latest)."""

    hf: Annotated[Path | None, MAY_CHANGE] = None
    """A Hugging Face folder. Its weights are read straight into the ranks' shards: nothing is converted on the disk."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedConfig(AtRestConfig):
    """The model that is evaluated: one of the three."""

    endpoint: EndpointConfig | None = None


@dataclass(frozen=True, kw_only=True)
class RulerConfig(Section):
    """What is made of RULER."""

    lengths: tuple[Annotated[int, Range(ge=1)], ...] = (8192, 16384, 32768, 65536, 131072)
    """The contexts, in the model's own tokens, prompt and response together (paper: 8k to 128k)."""

    sub_tasks: tuple[str, ...] = ()
    """Which of the 13 sub-tasks. Empty: all for which there are files."""

    num_questions: Annotated[int, Range(ge=1)] = 100
    """The questions of a sub-task at each length (HELMET's, which the paper names: 100)."""

    files: Annotated[dict[str, Path], IS_PATH, MAY_CHANGE] = field(default_factory=dict)
    """The files that sub-tasks are made from, by name: docs/EVALUATE.md, RULER."""


@dataclass(frozen=True, kw_only=True)
class LmEvalConfig(Section):
    """Which tasks of lm-eval are run."""

    names: tuple[str, ...] = ()
    """lm-eval's names. Empty: the set's own, as of leaderboard_v1."""

    files: Annotated[dict[str, Path], IS_PATH, MAY_CHANGE] = field(default_factory=dict)
    """The local file or folder of a task's data, by lm-eval's name of it or of its group, or "" for all others: docs/EVALUATE.md, Retention."""

    num_fewshot: Annotated[int | None, Range(ge=0)] = None
    """The examples before a question. Null: each task's own. A leaderboard's are always its own."""

    hub: bool = False
    """Let lm-eval load what no file holds, from its cache or from the network."""


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(Section):
    """The loss on what a prepared mixture holds out, by source."""

    mixture: Annotated[Path, MAY_CHANGE]
    """The mixture's folder (`prism prepare`)."""

    seq_length: Annotated[int, Range(ge=1)]
    """The tokens of a sequence."""

    sequences: Annotated[int, Range(ge=1)] = 64
    """The most sequences of each source."""

    document_mask: bool = False
    """Mask and positions by document, for a model that was trained with data.document_mask."""

    micro_size: Annotated[int, Range(ge=1), MAY_CHANGE] = 1
    """The sequences of a microbatch."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Section):
    """A task: a set of questions, and how they are asked. What is null is as the set's protocol says (docs/EVALUATE.md)."""

    set: str | None = None
    """The set: a published one, `file` (lines of {id, kind, prompt, gold or choices or tests}), ruler, lm_eval or held_out. Null: the task's name."""

    path: Annotated[Path | None, MAY_CHANGE] = None
    """The set's file, in the form in which it is published."""

    num_samples: Annotated[int | None, Range(ge=1)] = None
    """The responses to each question. More of them later cost only the new ones."""

    temperature: Annotated[float | None, Range(ge=0)] = None
    """What divides the logits; 0 is greedy."""

    top_p: Annotated[float | None, Range(gt=0, le=1)] = None
    """The smallest set of tokens of at least this probability is drawn from."""

    max_tokens: Annotated[int | None, Range(ge=1)] = None
    """The most tokens of a response."""

    think: Think | None = None
    """Whether a response counts only as `<think> ... </think> answer`: grade.think of `prism rl`."""

    answer: AnswerForm | None = None
    """How a mathematical answer stands in a response: grade.answer of `prism rl`."""

    limit: Annotated[int | None, Range(ge=1)] = None
    """Only the first so many questions. Null: all."""

    chat: bool = False
    """Ask through the model's chat template. The paper's mid-training has none: its texts are `User: ...` and `Assistant: ...`, and ours ask so."""

    ruler: RulerConfig | None = None

    lm_eval: LmEvalConfig | None = None

    held_out: HeldOutConfig | None = None


@dataclass(frozen=True, kw_only=True)
class AskingConfig(GangConfig):
    """What is asked of a model, and how: the keys that evaluations share with analyses by score."""

    tasks: dict[str, TaskConfig]
    """The tasks by name."""

    engine: Literal["cached", "mcore", "vllm"] = "cached"
    """What samples: `cached` is the embedded engine, `mcore` Megatron-Core's dynamic one on a GPU, `vllm` has its own copy of the model (docs/RL.md,
    Engines). vLLM's random numbers are its own."""

    mcore: Annotated[MCoreConfig, MAY_CHANGE] = field(default_factory=MCoreConfig)

    vllm: Annotated[VLLMConfig, MAY_CHANGE] = field(default_factory=VLLMConfig)

    num_rows: Annotated[int, Range(ge=1), MAY_CHANGE] = 64
    """The responses that decode together on each data-parallel replica."""

    cache_tokens: Annotated[int | None, Range(ge=1), MAY_CHANGE] = None
    """The most tokens that the cached engine's cache of a replica holds: long prompts and responses decode in fewer rows than num_rows. Null:
    num_rows decode whatever their length."""

    shard_responses: Annotated[int, Range(ge=1), MAY_CHANGE] = 512
    """The responses of a shard, which is sampled and graded as one and written whole: what a killed evaluation loses at most (ours)."""

    overlong: Overlong = "shorten"
    """What becomes of a prompt that does not fit the model's context with max_tokens. shorten: its response has the room that is left, and one that
    fills it is truncated. clip: the prompt loses its beginning. refuse: nothing is evaluated. The summary counts them. The paper does not
    say: ours. A prompt that leaves room for no token is refused, unless it is clipped."""

    bos: Literal["tokenizer", "none", "one"] = "tokenizer"
    """The begin-of-text tokens of a plain prompt. tokenizer: what tokenizer.json's post-processor writes, with what the text spells itself. The
    summary names how many there are, and two are warned of."""

    grade: GradeLimits = field(default_factory=GradeLimits)

    max_sampler_kl: Annotated[float | None, Range(gt=0), MAY_CHANGE] = None
    """The trust gate's bound: the largest mean KL divergence of the model's own pass and the engine on the same tokens, before anything is
    sampled. Null: 1e-9 in fp32, 1e-2 in bf16 (ours)."""

    limits: Annotated[LimitsConfig, MAY_CHANGE] = field(default_factory=LimitsConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AskingConfig):
    """`prism evaluate`: a model's scores on tasks. Started again, it goes on; asked for more, it samples only what is new."""

    out: Annotated[Path, MAY_CHANGE]
    """The folder to write: results.jsonl (every response), summary.json, manifest.json, and what was sampled and graded. One model's."""

    model: EvaluatedConfig

    against: Annotated[Path | None, MAY_CHANGE] = None
    """An earlier evaluation's folder, for a verdict: exit code 1 where it is NO-GO (docs/EVALUATE.md, Verdicts)."""

    policy: Annotated[PolicyConfig, MAY_CHANGE] = field(default_factory=PolicyConfig)
