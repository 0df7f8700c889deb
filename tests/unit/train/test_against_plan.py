"""A run's first steps beside the plan: the prediction of a gang is the planner's, and a difference above 15 % is a warning."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_prism.core.config import TrainConfig
from megatron_prism.core.load import build
from megatron_prism.train import against_plan

ROOT = Path(__file__).resolve().parents[3]
MODEL = {
    "family": "llama",
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
CONFIG = build(
    {
        "run_dir": "run",
        "steps": 20,
        "world_size": 4,
        "data": {"prepared": "data", "seq_length": 64},
        "batch": {"global_size": 4},
        "model": MODEL,
        "parallel": {"pp": 2, "tp": 2},
        "trainable": ["*.self_attention.*"],
    },
    TrainConfig,
    str,
)


def prediction_of(grid: Any) -> list[Any]:
    """On a rank: the stages of the gang's prediction, as text, and its step's time."""
    from megatron_prism.checkpoint import sharded
    from megatron_prism.models import build as models

    assert CONFIG.model is not None
    chunks = models.build(CONFIG.model, grid, CONFIG)
    with mock.patch.object(against_plan, "host", types.SimpleNamespace(has_cuda=lambda: True, device_name=lambda: "NVIDIA H200")):
        predicted = against_plan.prediction(CONFIG.model, CONFIG, chunks, sharded.weights, grid)
    assert predicted is not None and against_plan.prediction(CONFIG.model, CONFIG, chunks, sharded.weights, grid) is None
    return [[str(stage) for stage in predicted.stages], predicted.time.step_s]


def planned() -> list[Any]:
    """In a process of its own: the same, by `prism plan`."""
    from megatron_prism.jobs import plan
    from megatron_prism.planning.gpus import H200
    from megatron_prism.planning.predict import predict

    assert CONFIG.model is not None
    stages = plan.built(CONFIG.model, CONFIG)
    return [[str(stage) for stage in stages], predict(stages, CONFIG.model, CONFIG, 4, gpu=H200).time.step_s]


def test_the_prediction_of_a_gang_is_the_planners(run_distributed: Callable[..., list[Any]]) -> None:
    program = "import json; from tests.unit.train.test_against_plan import planned; print(json.dumps(planned()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stages, step_s = json.loads(done.stdout)
    assert len(set(stages)) == 2
    assert run_distributed(prediction_of, 4, parallel={"pp": 2, "tp": 2}) == [[stages, step_s]] * 4


@pytest.mark.parametrize(
    ("step_s", "memory_gib", "level"),
    [(1.1, 11.0, "INFO"), (1.16, 10.0, "WARNING"), (1.0, 11.6, "WARNING"), (0.84, 10.0, "WARNING"), (0.86, 8.6, "INFO")],
)
def test_what_is_far_from_the_plan_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step_s: float, memory_gib: float, level: str
) -> None:
    monkeypatch.setattr(against_plan, "host", types.SimpleNamespace(peak_memory_bytes=lambda: memory_gib * 2**30))
    monkeypatch.setattr(against_plan, "groups", types.SimpleNamespace(agree=list))
    monkeypatch.setattr(against_plan.torch.distributed, "get_rank", lambda: 0)
    predicted: Any = types.SimpleNamespace(time=types.SimpleNamespace(step_s=1.0), memory_gib=[4.0, 10.0])
    beside = against_plan.AgainstPlan(predicted, first_step=100)
    with caplog.at_level(logging.INFO):
        for step in range(101, 121):
            beside.record(step, 60.0 if step <= 105 or step == 108 else step_s)  # the first steps, and one slow one, do not count
            assert (beside.as_values() is not None) is (step >= 110)
    assert beside.as_values() == {"step_s_planned": 1.0, "step_s": step_s, "memory_gib_planned": 10.0, "memory_gib": memory_gib}
    assert [record.levelname for record in caplog.records] == [level]
    assert f"step {step_s:.3g} s, planned 1 ({step_s - 1:+.0%})" in caplog.text


def test_a_run_without_a_prediction_compares_nothing() -> None:
    beside = against_plan.AgainstPlan(None, 0)
    for step in range(1, 30):
        beside.record(step, 1.0)
    assert beside.as_values() is None
