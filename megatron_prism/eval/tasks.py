"""A config's tasks: which set each one asks, by which protocol, and where both come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.check.evaluate import kind_of
from megatron_prism.core.config import TaskConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import sha256_file
from megatron_prism.eval.question import Protocol, Question
from megatron_prism.eval.sets import own_file, published

FILE = "file"


@dataclass(frozen=True)
class Task:
    """A task whose responses are sampled: its questions, and how they are asked and graded. origin: the set's file, its sum and its size."""

    name: str
    set: str
    questions: tuple[Question, ...]
    protocol: Protocol
    is_chat: bool
    origin: Mapping[str, Any]


def read(name: str, config: TaskConfig) -> Task:
    """Return a task of questions. Raises: InputError where its set is unknown, or its file is missing or wrong."""
    set_name = config.set or name
    if set_name not in known():
        raise InputError(Problem(f"tasks.{name}.set", repr(set_name), f"one of {', '.join(known())}"))
    if config.path is None:
        raise InputError(Problem(f"tasks.{name}.path", "no value", f"the file of the set {set_name}"))
    if set_name == FILE:
        loaded, default = published.Loaded(questions=own_file.load(config.path)), own_file.PROTOCOL
    else:
        loaded, default = published.read(set_name, config.path, config.chat), published.SETS[set_name].protocol
    for note in loaded.notes:
        log.get().warning("tasks.%s: %s", name, note)
    origin = {
        "path": str(config.path),
        "sha256": sha256_file(config.path),
        "num_questions": len(loaded.questions),
        "limit": config.limit,
        "notes": list(loaded.notes),
    }
    return Task(name, set_name, loaded.questions[: config.limit], protocol_of(config, default), config.chat, origin)


def known() -> tuple[str, ...]:
    """Return the names of all sets."""
    return (FILE, *published.SETS)


def protocol_of(config: TaskConfig, default: Protocol) -> Protocol:
    """Return a set's protocol with what a config changes of it."""
    names = ("num_samples", "temperature", "top_p", "max_tokens", "think", "answer")
    return replace(default, **{name: value for name in names if (value := getattr(config, name)) is not None})


def is_sampled(name: str, config: TaskConfig) -> bool:
    """Say whether a task's responses are sampled by us: lm-eval and the held-out loss ask the model themselves."""
    return kind_of(name, config) in ("questions", "ruler")
