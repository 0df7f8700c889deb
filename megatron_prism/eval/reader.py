"""How a model that the gang builds reads: its tokenizer, its chat template, and each task's questions as its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_prism.core.check.gang import check_model_on_gang
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.config import EvaluateConfig, SamplingConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.data import chat, tokenizer
from megatron_prism.eval import requests
from megatron_prism.eval.model import Evaluated
from megatron_prism.eval.requests import Asked
from megatron_prism.eval.tasks import Task
from megatron_prism.generate import engines


@dataclass(frozen=True)
class Reader:
    """A model at rest, and how it reads. template: where a task needs it."""

    config: EvaluateConfig
    evaluated: Evaluated
    spec: tokenizer.TokenizerSpec
    template: chat.ChatTemplate | None

    @property
    def context(self) -> int:
        """Return the most tokens of a prompt and its response."""
        return self.evaluated.model.max_position_embeddings

    def ask(self, tasks: Iterable[Task]) -> dict[str, tuple[Asked, ...]]:
        """Return the questions of tasks as tokens. Raises: InputError with every one that does not fit."""
        asked: dict[str, tuple[Asked, ...]] = {}
        problems: list[Problem] = []
        for task in tasks:
            asked[task.name], wrong = requests.ask(task, self.spec, self.template, self.context, self.config.overlong, self.config.bos)
            problems += wrong
        raise_problems(problems)
        return asked

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a plain prompt as the model gets it."""
        return len(requests.encode_plain(text, self.spec, self.config.bos))


def read(config: EvaluateConfig, evaluated: Evaluated, tasks: Mapping[str, Task], world_size: int) -> Reader:
    """Return how a model reads. Raises: InputError with every reason why the gang cannot build it, or it cannot be asked."""
    model, spec = evaluated.model, tokenizer.load(evaluated.assets)
    needs_template = any(task.is_chat or not all(isinstance(one.prompt, str) for one in task.questions) for task in tasks.values())
    template = chat.load(evaluated.assets) if needs_template else None
    raise_problems(
        [
            *check_model_on_gang(model, config),
            *check_architecture(model),
            *engines.check(sampling_of(config), model, world_size, config.parallel.tp, config.parallel.pp, section=""),
            *tokenizer.check_vocabulary(evaluated.assets / tokenizer.FILE, model.vocab_size),
            *([] if spec.end_ids else [Problem("model", f"no end token in the files of {evaluated.root}", "an EOS, or no response ends")]),
            *(
                [Problem("bos", "one", f"a tokenizer with a BOS: {spec.folder} has none", "none")]
                if config.bos == "one" and spec.bos_id is None
                else []
            ),
        ]
    )
    return Reader(config, evaluated, spec, template)


def sampling_of(config: EvaluateConfig) -> SamplingConfig:
    """Return what names the engine, as reinforcement learning's config has it. How responses are drawn is each task's."""
    return SamplingConfig(
        engine=config.engine,
        mcore=config.mcore,
        vllm=config.vllm,
        num_rows=config.num_rows,
        max_tokens=1,
        max_sampler_kl=config.max_sampler_kl,
    )
