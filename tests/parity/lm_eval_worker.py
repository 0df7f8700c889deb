"""What one rank of test_lm_eval.py runs: our harness on a list of models, and with a known fault built in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.checkpoint import folder, sharded
from megatron_prism.core.config import GangConfig, ParallelConfig
from megatron_prism.data import tokenizer
from megatron_prism.eval import harness, lm, serve
from megatron_prism.models import build, token_scores
from megatron_prism.parallel.groups import Groups

MAX_TOKENS = 40  # of a generation: lm-eval's own 256 show nothing more


def run(
    groups: Groups, layout: dict[str, Any], models: dict[str, str], data: str, names: list[str], limit: int, controls: list[str]
) -> dict[str, Any]:
    """Return by model, on rank 0, what the harness returns on this layout; a control has the first model's name and its own."""
    torch.set_num_threads(1)
    made: dict[str, Any] = {}
    for name, ckpt in models.items():
        checkpoint = folder.read(Path(ckpt))
        gang = GangConfig(parallel=ParallelConfig(**layout), precision="fp32", seed=0)
        chunks = build.build(checkpoint.model, groups, gang)
        sharded.load_weights(checkpoint.root, chunks)
        served = serve.Served(chunks, checkpoint.model, groups, tokenizer.load(checkpoint.assets), num_rows=3, batch_tokens=1500)
        for control in [None, *(controls if name == next(iter(models)) else [])]:
            with fault(control), mock.patch.object(lm, "MAX_TOKENS", MAX_TOKENS):
                found = harness.run(replace(served), names, {"": Path(data)}, limit=limit)
            if found is not None:
                results, figures = found
                made[f"{name} {control}" if control else name] = {"results": [asdict(result) for result in results], "figures": figures}
    return made


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    """Build a known fault in: the parity tests must see it."""
    asked, texts = serve._asked, serve.rows_of

    def one_early(rows: Any, size_N: int) -> torch.Tensor:
        asked_3N = asked(rows, size_N)
        asked_3N[1] = (asked_3N[1] - 1).clamp(min=0)
        return asked_3N

    def cut_on_the_right(pairs: Any, longest: int) -> Any:
        return texts([(context[:longest], continuation) for context, continuation in pairs], longest)

    faults: dict[str | None, tuple[Any, str, Any]] = {
        None: (serve, "_asked", asked),
        "positions one early": (serve, "_asked", one_early),
        "cut on the right": (serve, "rows_of", cut_on_the_right),
        "the largest of a rank alone": (token_scores, "_reduced", lambda values, op, groups: values),
    }
    with mock.patch.object(*faults[name]):
        yield
