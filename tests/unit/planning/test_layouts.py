"""Which layouts a sweep looks at, and which one is near."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_prism.core.check.train import check_model, check_train
from megatron_prism.core.config import MambaConfig, ModelConfig, TrainConfig
from megatron_prism.core.load import build
from megatron_prism.planning import layouts

MODEL = ModelConfig(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=131072,
)
HYBRID = dataclasses.replace(
    MODEL,
    layer_pattern="M-M*-M-M" * 4,
    position_embedding="none",
    mamba=MambaConfig(num_heads=64, head_dim=64, state_dim=128, num_groups=1),
)
BASE: dict[str, Any] = {
    "run_dir": "none",
    "steps": 1,
    "init": {"checkpoint": "none"},
    "data": {"prepared": "none", "seq_length": 8192},
    "batch": {"global_size": 128},
}


def config_of(**keys: Any) -> TrainConfig:
    return build({**BASE, **keys}, TrainConfig, str)


def test_every_layout_is_valid_and_none_stands_twice() -> None:
    found = list(layouts.valid(config_of(), MODEL, 16))
    assert len(found) == len(set(map(repr, found))) > 100
    for laid in found:
        assert not check_train(laid, 16) and not check_model(MODEL, laid)
        assert laid.parallel.tp <= layouts.GPUS_PER_NODE and laid.parallel.sequence_parallel == (laid.parallel.tp > 1)
    grids = {(laid.parallel.tp, laid.parallel.pp, laid.parallel.cp) for laid in found}
    assert {(1, 1, 1), (2, 1, 1), (8, 2, 1), (1, 16, 1), (2, 4, 2)} <= grids
    assert {laid.parallel.vpp for laid in found if laid.parallel.pp == 4} == {None, 2, 4, 8}
    assert {laid.recompute.num_layers for laid in found if laid.parallel.pp == 1 and laid.recompute.granularity == "full"} == {8, 16, None}


def test_a_hybrid_of_one_group_has_no_tp_no_chunks_and_recomputes_mlps_alone() -> None:
    found = list(layouts.valid(config_of(), HYBRID, 8))
    assert found
    assert {(laid.parallel.tp, laid.parallel.vpp, laid.recompute.granularity) for laid in found} == {
        (1, None, "none"),
        (1, None, "selective"),
    }


def test_a_batch_that_does_not_divide_leaves_fewer() -> None:
    nine = config_of(batch={"global_size": 9})
    assert {64 // (laid.parallel.tp * laid.parallel.pp * laid.parallel.cp) for laid in layouts.valid(nine, MODEL, 64)} == {1}


def test_a_near_layout_changes_few_keys_and_says_which() -> None:
    here = config_of()
    one = config_of(parallel={"tp": 8, "sequence_parallel": True})
    two = config_of(parallel={"tp": 2, "sequence_parallel": True}, recompute={"granularity": "full", "num_layers": 4})
    assert layouts.distance(here, here) == 0 < layouts.distance(here, one) < layouts.distance(here, two)
    assert layouts.distance(here, config_of(batch={"global_size": 128, "micro_size": 2})) < layouts.distance(here, one)
    assert layouts.changes(here, here) == []
    assert layouts.changes(here, two) == [
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
        "recompute.granularity=full",
        "recompute.num_layers=4",
    ]
    assert layouts.changes(two, here) == [
        "parallel.tp=1",
        "parallel.sequence_parallel=false",
        "recompute.granularity=none",
        "recompute.num_layers=null",
    ]
