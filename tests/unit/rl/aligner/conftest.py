"""A few prompts, their answer table, and a reward server whose grader is a stub: right where the response is the gold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prism.data import tokenizer
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.rl.aligner import answers, prompts
from megatron_prism.rl.aligner.reward import Grade, Rewarder
from megatron_prism.rl.aligner.server import RewardServer

PROMPTS = [
    prompts.Prompt(id="a", domain="math", kind="math", prompt="What is 2 + 3?\n", gold="5"),
    prompts.Prompt(id="b", domain="math", kind="math", prompt="The product of 4 and 7:\n", gold="28"),
    prompts.Prompt(id="c", domain="science", kind="choice", prompt="Which? A or B?\n", gold="B", choices=("left", "right")),
]


def is_gold(items: Sequence[Item]) -> dict[str, Graded]:
    """Grade by equality: no verdict on form."""
    right = {item.id: item.response.strip() == item.gold and not item.is_truncated for item in items}
    return {name: Graded(id=name, outcome="right" if one else "wrong") for name, one in right.items()}


@pytest.fixture(scope="session")
def spec(tiny_tokenizer: Path) -> tokenizer.TokenizerSpec:
    return tokenizer.load(tiny_tokenizer)


@pytest.fixture(scope="session")
def rewarder(spec: tokenizer.TokenizerSpec) -> Callable[..., Rewarder]:
    """Return a function from a grading function to a Rewarder of PROMPTS."""
    ids = [tokenizer.encode_prompt(prompt.prompt, spec) for prompt in PROMPTS]
    table = answers.table(PROMPTS, ids)

    def make(grade: Grade = is_gold, pauses_s: tuple[float, ...] = (0.0, 0.0)) -> Rewarder:
        return Rewarder(table, spec, grade, pauses_s)

    return make


@pytest.fixture(scope="session")
def rows(spec: tokenizer.TokenizerSpec) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return a function from (prompt, response) texts to tokens_BS, padded with 0 as NeMo-Aligner does, and lengths_B."""

    def make(*pairs: tuple[str, str], end: bool = True, pad_to: int = 64) -> tuple[np.ndarray, np.ndarray]:
        ends = [spec.eos_id] if end else []
        ids = [[*tokenizer.encode_prompt(prompt, spec), *tokenizer.encode_text(response, spec), *ends] for prompt, response in pairs]
        tokens_BS = np.zeros((len(ids), pad_to), np.int64)
        for row, one in enumerate(ids):
            tokens_BS[row, : len(one)] = one
        return tokens_BS, np.array([len(one) for one in ids], np.int64)

    return make


@pytest.fixture
def serve(rewarder: Callable[..., Rewarder]) -> Iterator[Callable[..., RewardServer]]:
    """Return a function that serves on a free loopback port until the test ends: (grade, and RewardServer's arguments)."""
    servers: list[tuple[RewardServer, threading.Thread]] = []

    def start(grade: Grade = is_gold, host: str = "127.0.0.1", **options: Any) -> RewardServer:
        server = RewardServer(host, 0, rewarder(grade), **options)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()
