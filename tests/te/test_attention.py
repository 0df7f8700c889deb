"""The attention that Transformer Engine chooses for a run's shapes: its own code is asked, over the stand-in of tests/te, with cuDNN saying yes or no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import RLConfig, TrainConfig
from megatron_prism.core.load import build
from megatron_prism.models.attention_backend import AttentionChoice
from megatron_prism.parallel import cudnn
from megatron_prism.train import kernels

HERE = Path(__file__).parent
MODEL = {
    "family": "mistral",
    "num_layers": 1,
    "hidden_size": 512,
    "ffn_hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 64,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
CASES = {
    "dense": {"size_S": 2048, "cudnn": True},
    "two sequences": {"size_S": 1024, "size_B": 2, "cudnn": True},
    "packed": {"size_S": 2048, "cudnn": True, "packed": True},
    "window": {"size_S": 2048, "cudnn": True, "model": {"window_size": 100}},
    "refused by cuDNN": {"size_S": 2048, "cudnn": False},
    "packed, refused by cuDNN": {"size_S": 2048, "cudnn": False, "packed": True},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("attention")
    cases = [{**case, "name": name, "model": MODEL | case.get("model", {})} for name, case in CASES.items()]
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(HERE / "attention_worker.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize(
    ("name", "backend", "words"),
    [
        ("dense", "fused", "2048 tokens, 8 heads of 64, 2 of keys, bfloat16"),
        ("two sequences", "fused", "1024 tokens, 8 heads of 64, 2 of keys, bfloat16"),
        ("packed", "fused", "packed documents (thd)"),
        ("window", "fused", "a window of 100"),
        ("refused by cuDNN", "unfused", "2048 tokens"),
        ("packed, refused by cuDNN", "unfused", "packed documents (thd)"),
    ],
)
def test_the_choice_is_transformer_engines(answers: dict[str, Any], name: str, backend: str, words: str) -> None:
    assert answers[name]["backend"] == backend
    assert words in answers[name]["call"]


def test_the_reason_is_transformer_engines(answers: dict[str, Any]) -> None:
    assert answers["dense"]["reasons"] == []
    assert any("FusedAttention" in reason for reason in answers["refused by cuDNN"]["reasons"])


def test_the_layer_is_left_as_it_was(answers: dict[str, Any]) -> None:
    assert all(answers[name]["next_time"] == answers[name]["backend"] for name in CASES)
    assert all(answers[name]["loggers"] == answers["dense"]["loggers"] for name in CASES)


def test_gradients_are_summed_in_the_layers_without_apex(answers: dict[str, Any]) -> None:
    """Not in the output layer, which is Megatron-Core's own and needs apex."""
    told = answers["fused gradients"]
    assert not any(told["off"].values()) and told["on"].pop("output_layer") is False
    assert len(told["on"]) == 4 and all(told["on"].values()), told["on"]


RUN = {
    "run_dir": "run",
    "steps": 1,
    "data": {"prepared": "data", "seq_length": 2048},
    "batch": {"global_size": 2},
    "model": MODEL,
    "optimizer": {"lr": 0.1},
}
UNFUSED = AttentionChoice("unfused", "", "2048 tokens", ("Disabling FusedAttention as no backend supports the provided input",))


def _config(**changes: Any) -> TrainConfig:
    return build({**RUN, **changes}, TrainConfig, str)


@pytest.mark.parametrize(
    ("choice", "changes", "is_refused"),
    [
        (UNFUSED, {}, True),
        (UNFUSED, {"attention_backend": "unfused"}, False),
        (UNFUSED, {"data": {**RUN["data"], "seq_length": 1024}}, True),
        (UNFUSED, {"data": {**RUN["data"], "seq_length": 1023}}, False),
        (AttentionChoice("fused", "sub-backend 1", "", ()), {}, False),
        (AttentionChoice("flash", "2.8.3", "", ()), {}, False),
        (AttentionChoice("none", "", "", ()), {"attention_backend": "unfused", "data": {**RUN["data"], "seq_length": 8}}, True),
        (None, {}, False),
    ],
)
def test_a_long_sequence_is_not_computed_unfused_in_silence(
    choice: AttentionChoice | None, changes: dict[str, Any], is_refused: bool
) -> None:
    told = kernels.refusal(choice, _config(**changes))
    assert (told is not None) is is_refused
    if choice is UNFUSED and told:
        assert "no backend supports the provided input" in told and "attention_backend: unfused" in told


@pytest.mark.parametrize(("seq_length", "is_refused"), [(1024, True), (1023, False)])
def test_reinforcement_learning_is_asked_for_its_own_rows(seq_length: int, is_refused: bool) -> None:
    """A row holds several responses, none of which sees another."""
    values = {"run_dir": "run", "steps": 1, "prompts": "prompts", "rollout": {"max_tokens": 8}, "batch": {"seq_length": seq_length}}
    config = build(values, RLConfig, str)
    assert (kernels.refusal(UNFUSED, config) is not None) is is_refused
    batch = kernels._batch(config)
    assert batch["tokens"].shape == (1, seq_length)
    lengths = batch["document_ids"].unique(return_counts=True)[1].tolist()
    assert lengths[0] == seq_length // 2 + 1 and len(lengths) >= 9 and max(lengths[1:]) == seq_length // 16


def test_documents_on_an_h100_may_cost_what_nobody_planned() -> None:
    masked = {"data": {**RUN["data"], "document_mask": True}}
    fused, flash = (AttentionChoice(backend, "", "2048 tokens, packed documents (thd)", ()) for backend in ("fused", "flash"))
    told = kernels.caution(fused, _config(deterministic=True, **masked))
    assert told is not None and "packed documents" in told and "flash-attn" in told
    short = {"data": {**masked["data"], "seq_length": 1023}}
    for choice, changes in ((flash, masked), (fused, RUN), (fused, short)):
        assert kernels.caution(choice, _config(deterministic=True, **changes)) is None
    assert kernels.caution(fused, _config(**masked)) is None


def refused_on_the_last_rank(grid: Any) -> str:
    """On a rank of run_distributed: only the last one's attention is unfused."""
    from unittest import mock

    from megatron_prism.core.errors import EnvironmentFault
    from megatron_prism.models import attention_backend

    with mock.patch.object(attention_backend, "choice", lambda *args: UNFUSED if grid.rank == grid.world_size - 1 else None):
        try:
            kernels.find([], None, _config(), grid)
        except EnvironmentFault as error:
            return f"{error.exit_code} {error.is_agreed} {error}"
    return "not refused"


def test_every_rank_ends_where_one_is_slow(run_distributed: Callable[..., list[str]]) -> None:
    told = run_distributed(refused_on_the_last_rank, 2)
    assert told[0] == told[1] and told[0].startswith("4 True for 2048 tokens Transformer Engine has its unfused attention")


def test_the_cudnn_libraries_of_a_process_are_named(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    ours, other = "/venv/lib/python3.12/site-packages/nvidia/cudnn/lib", "/usr/local/cuda/lib64"
    lines = [
        f"7f00-7f01 r-xp 00000000 00:00 1    {folder}/{name}"
        for folder in (ours, other)
        for name in ("libcudnn.so.9", "libcudnn_ops.so.9.1")
    ]
    maps.write_text("\n".join([*lines, "7f02-7f03 rw-p 00000000 00:00 0", "7f04-7f05 r-xp 0 00:00 1 /usr/lib/libc.so.6"]) + "\n")
    assert cudnn.folders(maps) == (other, ours)
    assert cudnn.cure((other, ours)) == (
        f"two cuDNNs are loaded ({other}, {ours}): export CUDNN_HOME=/venv/lib/python3.12/site-packages/nvidia/cudnn,"
        " which Transformer Engine then loads too"
    )
    assert "CUDNN_HOME=/usr/lib/python3/dist-packages/nvidia/cudnn," in cudnn.cure(
        (other, "/usr/lib/python3/dist-packages/nvidia/cudnn/lib")
    )
    assert "flash-attn" in cudnn.cure((ours,)) and "flash-attn" in cudnn.cure(())
    assert cudnn.folders(tmp_path / "absent") == ()
