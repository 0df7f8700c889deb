"""A landscape of toy models, on the ranks of a test's gang; and the weights of a point, out of the models and out of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.analysis import landscape
from megatron_prism.checkpoint import at_rest
from megatron_prism.core.config import GangConfig, LandscapeConfig
from megatron_prism.core.load import build
from megatron_prism.eval import model, sample
from megatron_prism.jobs import analyze_landscape, evaluate
from megatron_prism.models import build as models
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import gate
from tests.distributed.killing import Point, killed
from tests.distributed.toy_evaluate import Toy, logged

POINTS = {"written": Point(sample, "_keep", 5, True)}


def run(
    groups: Groups,
    out: str,
    three: Mapping[str, Any],
    tasks: Mapping[str, Any],
    grid: dict[str, Any],
    point: str | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Return a landscape's result, and under `gates` how often the engine was held against the model. point: where the process is killed."""
    given = {"out": out, "precision": "fp32", "parallel": grid, "tasks": tasks, "num_rows": 8, "shard_responses": 16, **three, **values}
    resolved = analyze_landscape.resolve(build(given, LandscapeConfig, str), groups.world_size)
    counted = mock.Mock(side_effect=gate.at_start)
    fate = killed(POINTS, point, (sample, "run"), None, "SIGKILL")
    with mock.patch.object(evaluate.grader, "Grader", Toy), mock.patch.object(gate, "at_start", counted), logged(Path(f"{out}.log")), fate:
        return analyze_landscape.landscape_in_gang(resolved, groups) | {"gates": counted.call_count}


def differing(groups: Groups, three: list[str], point: dict[str, Any], wanted: str, grid: dict[str, Any]) -> float:
    """Return by how much this rank's weights of a point differ from those of a folder, at most."""
    given, loaded = build({"precision": "fp32", "parallel": grid}, GangConfig, str), []
    at_rests = [at_rest.read(Path(path)) for path in three]
    with at_rest.opened(at_rests) as opened:
        by_name = dict(zip(landscape.MODELS, opened, strict=True))
        whole_of = partial(landscape.tensor, landscape.Point(**point), by_name, thresholds={}, seed=0)
        for load in (
            lambda chunks: model.fill(chunks, at_rests[1], whole_of),
            lambda chunks: model.load_hf(at_rest.read(Path(wanted)), chunks),
        ):
            chunks = models.build(at_rests[1].model, groups, given)
            load(chunks)
            loaded.append([parameter.detach().double() for chunk in chunks for parameter in chunk.parameters()])
    return max(float((one - other).abs().max()) for one, other in zip(*loaded, strict=True) if torch.is_tensor(one))
