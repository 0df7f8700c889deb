"""From questions to what an engine is asked: each (question, sample) is one request with its own seed, and a key under which it is kept.

A request's random numbers depend on the evaluation's seed, its task, its question's id and its sample: not on the other requests, on how many
samples there are, or on the shards.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_prism.core.config.evaluate import Overlong
from megatron_prism.core.errors import Problem
from megatron_prism.core.manifest import sha256_json
from megatron_prism.data import chat, tokenizer
from megatron_prism.data.chat import ChatTemplate
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.eval.question import Question
from megatron_prism.eval.tasks import Task
from megatron_prism.generate.engine import Sampling, seed_of

SHARD_PROMPT_TOKENS = 1 << 22  # of a shard's prompts together: what rank 0 sends the others at once


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it. tokens: an array, as RULER's are many; empty where the model is served elsewhere, which reads the text.

    num_bos: the begin-of-text tokens at its beginning. num_clipped: the tokens that it lost. room: those left for its response in the context.
    """

    question: Question
    max_tokens: int
    prompt_sha256: str
    tokens: Sequence[int] = ()
    num_bos: int = 0
    num_clipped: int = 0
    room: int | None = None

    @property
    def is_shortened(self) -> bool:
        """Say whether the context leaves its response less room than its task."""
        return self.room is not None and self.room < self.max_tokens


@dataclass(frozen=True)
class Request:
    """One response that is asked for. key: of what it will be, by model, prompt, sampling and seed."""

    task: str
    asked: Asked
    sample: int
    seed: int
    sampling: Sampling
    key: str


def seed(run_seed: int, task: str, id: str, sample: int) -> int:
    """Return a response's seed."""
    named = f"{task}\0{id}".encode("utf-8", "backslashreplace")
    return seed_of(run_seed, int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big"), sample)


def ask(
    task: Task, spec: TokenizerSpec, template: ChatTemplate | None, context: int, overlong: Overlong, bos: str
) -> tuple[tuple[Asked, ...], list[Problem]]:
    """Return a task's questions as tokens, and the problems of those that do not fit. template: for questions that are a chat."""
    made, problems = [], []
    for question in task.questions:
        max_tokens = question.max_tokens or task.protocol.max_tokens
        tokens, where = _encode(question, task.is_chat, spec, template, bos), f"tasks.{task.name} question {question.id}"
        if not tokens:
            problems.append(Problem(where, "a prompt of 0 tokens", "at least one", "a prompt with text, or bos: one"))
        room, num_clipped = context - len(tokens), 0
        if overlong == "clip" and room < max_tokens < context:
            num_clipped, head = max_tokens - room, _num_bos(tokens, spec)
            tokens, room = [*tokens[:head], *tokens[head + num_clipped :]], max_tokens
        if room < 1 or (overlong == "refuse" and room < max_tokens):
            found = f"a prompt of {len(tokens)} tokens, and responses of {max_tokens}"
            clip = "a max_tokens below the context" if overlong == "clip" else "overlong: clip with a max_tokens below the context"
            fix = f"{clip}, or no such question"
            problems.append(Problem(where, found, f"together at most the context of {context}", fix))
        digest = hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).hexdigest()
        made.append(Asked(question, max_tokens, digest, array("i", tokens), _num_bos(tokens, spec), num_clipped, room))
    return tuple(made), problems


def ask_elsewhere(task: Task) -> tuple[Asked, ...]:
    """Return a task's questions for a model that is served elsewhere: what it reads is their text."""
    return tuple(Asked(one, one.max_tokens or task.protocol.max_tokens, sha256_json([one.prompt, task.is_chat])) for one in task.questions)


def _encode(question: Question, is_chat: bool, spec: TokenizerSpec, template: ChatTemplate | None, bos: str) -> list[int]:
    if is_chat or not isinstance(question.prompt, str):
        assert template is not None
        return chat.encode(template, spec, turns_of(question), add_generation_prompt=True)
    return encode_plain(question.prompt, spec, bos)


def encode_plain(text: str, spec: TokenizerSpec, bos: str) -> list[int]:
    """Return a plain prompt's tokens. bos: `tokenizer`, `none` or `one`, as the config says."""
    tokens = tokenizer.encode_prompt(text, spec)
    if bos == "tokenizer":
        return tokens
    plain = tokens[_num_bos(tokens, spec) :]
    return [spec.bos_id, *plain] if bos == "one" and spec.bos_id is not None else plain


def turns_of(question: Question) -> Sequence[dict[str, str]]:
    """Return a question as the turns of a chat."""
    return [{"role": "user", "content": question.prompt}] if isinstance(question.prompt, str) else question.prompt


def _num_bos(tokens: Sequence[int], spec: TokenizerSpec) -> int:
    return next((place for place, token in enumerate(tokens) if token != spec.bos_id), len(tokens))


def of_task(task: Task, asked: Sequence[Asked], model: Mapping[str, Any], run_seed: int, end_ids: tuple[int, ...]) -> Iterator[Request]:
    """Yield a task's requests, by question and sample. model: what else decides a response: the weights' sum, engine, precision, context."""
    protocol = task.protocol
    for one in asked:
        sampling = Sampling(max_tokens=one.max_tokens, temperature=protocol.temperature, top_p=protocol.top_p, end_ids=end_ids)
        for sample in range(protocol.num_samples):
            own = seed(run_seed, task.name, one.question.id, sample)
            key = sha256_json({"model": dict(model), "prompt": one.prompt_sha256, "sampling": asdict(sampling), "seed": own})
            yield Request(task.name, one, sample, own, sampling, key)


def shards(requests: Sequence[Request], most: int) -> list[list[Request]]:
    """Return requests as shards of at most `most`, each with one task and one sampling, the longest prompts first."""
    grouped: dict[tuple[str, Sampling], list[Request]] = {}
    for request in requests:
        grouped.setdefault((request.task, request.sampling), []).append(request)
    made: list[list[Request]] = []
    for own in grouped.values():
        shard: list[Request] = []
        num_tokens = 0
        for request in sorted(own, key=lambda one: -len(one.asked.tokens)):
            if shard and (len(shard) == most or num_tokens + len(request.asked.tokens) > SHARD_PROMPT_TOKENS):
                made.append(shard)
                shard, num_tokens = [], 0
            shard.append(request)
            num_tokens += len(request.asked.tokens)
        made.append(shard)
    return made
