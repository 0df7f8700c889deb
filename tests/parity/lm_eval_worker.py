"""What one rank of test_lm_eval.py runs: our harness on a list of models, and with a known fault built in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.checkpoint import folder, sharded
from megatron_prism.core.config import GangConfig, ParallelConfig
from megatron_prism.data import tokenizer
from megatron_prism.eval.retention import harness, lm, lm_tasks, serve
from megatron_prism.models import build, token_scores
from megatron_prism.parallel.groups import Groups

MAX_TOKENS = 16  # of a generation: lm-eval's own 256 show nothing more
manager = cache(lm_tasks.manager)  # it reads 14,683 tasks


def run(
    groups: Groups, layout: dict[str, Any], models: dict[str, str], data: str, cases: dict[str, dict[str, Any]], limit: int
) -> dict[str, Any]:
    """Return by "model case", on rank 0, what the harness returns on this layout.

    A case: {"names", "models": those it runs on, "control": a fault to build in, or None, "max_context": or None, "again": whether it is run
    a second time with the answers of the first}.
    """
    torch.set_num_threads(1)
    made: dict[str, Any] = {}
    for name, ckpt in models.items():
        checkpoint = folder.read(Path(ckpt))
        gang = GangConfig(parallel=ParallelConfig(**layout), precision="fp32", seed=0)
        chunks = build.build(checkpoint.model, groups, gang)
        sharded.load_weights(checkpoint.root, chunks)
        spec = tokenizer.load(checkpoint.assets)
        for key, case in cases.items():
            if name not in case["models"]:
                continue
            served = serve.Served(chunks, checkpoint.model, groups, spec, 3, 1500, case.get("max_context"))
            kept = lm.InMemory()
            with (
                fault(case.get("control")),
                mock.patch.object(lm, "MAX_TOKENS", MAX_TOKENS),
                mock.patch.object(lm_tasks, "manager", manager),
            ):
                for _ in range(1 + case.get("again", False)):
                    evaluated = harness.run(served, case["names"], {"": Path(data)}, limit=limit, kept=kept)
            if evaluated is not None:
                results, figures = evaluated
                made[f"{name} {key}"] = {"results": [asdict(result) for result in results], "figures": figures}
    return made


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    """Build a known fault in: the parity tests must see it."""
    asked, texts = serve._asked, lm.rows_of

    def one_early(rows: Any, size_N: int) -> torch.Tensor:
        asked_3N = asked(rows, size_N)
        asked_3N[1] = (asked_3N[1] - 1).clamp(min=0)
        return asked_3N

    def cut_on_the_right(pairs: Any, longest: int) -> Any:
        return texts([(context[:longest], continuation) for context, continuation in pairs], longest)

    faults: dict[str | None, tuple[Any, str, Any]] = {
        None: (serve, "_asked", asked),
        "positions one early": (serve, "_asked", one_early),
        "cut on the right": (lm, "rows_of", cut_on_the_right),
        "the largest of a rank alone": (token_scores, "_reduced", lambda values, op, groups: values),
    }
    with mock.patch.object(*faults[name]):
        yield
