"""Which layouts a sweep looks at, and which one is near."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_prism.core.check.train import check_model, check_train
from megatron_prism.core.config import ModelConfig, TrainConfig
from megatron_prism.core.load import build
from megatron_prism.planning import layouts

BASE: dict[str, Any] = {
    "run_dir": "none",
    "steps": 1,
    "init": {"checkpoint": "none"},
    "data": {"prepared": "none", "seq_length": 8192},
    "batch": {"global_size": 128},
}


def config_of(**keys: Any) -> TrainConfig:
    return build({**BASE, **keys}, TrainConfig, str)


def test_every_layout_is_valid_and_none_stands_twice(llama_8b: ModelConfig) -> None:
    every = list(layouts.valid(config_of(), llama_8b, 16))
    assert len(every) == len(set(map(repr, every))) > 100
    for laid in every:
        assert not check_train(laid, 16) and not check_model(llama_8b, laid)
        assert laid.parallel.tp <= layouts.GPUS_PER_NODE and laid.parallel.sequence_parallel == (laid.parallel.tp > 1)
    grids = {(laid.parallel.tp, laid.parallel.pp, laid.parallel.cp) for laid in every}
    assert {(1, 1, 1), (2, 1, 1), (8, 2, 1), (1, 16, 1), (2, 4, 2)} <= grids
    assert {laid.parallel.vpp for laid in every if laid.parallel.pp == 4} == {None, 2, 4, 8}
    assert {laid.recompute.num_layers for laid in every if laid.parallel.pp == 1 and laid.recompute.granularity == "full"} == {8, 16, None}


def test_a_hybrid_of_one_group_has_no_tp_no_chunks_and_recomputes_mlps_alone(nemotron_h_8b: ModelConfig) -> None:
    assert nemotron_h_8b.mamba is not None
    one_group = dataclasses.replace(nemotron_h_8b, mamba=dataclasses.replace(nemotron_h_8b.mamba, num_groups=1))
    every = list(layouts.valid(config_of(), one_group, 8))
    assert every
    assert {(laid.parallel.tp, laid.parallel.vpp, laid.recompute.granularity) for laid in every} == {
        (1, None, "none"),
        (1, None, "selective"),
    }


def test_a_batch_that_does_not_divide_leaves_fewer(llama_8b: ModelConfig) -> None:
    nine = config_of(batch={"global_size": 9})
    assert {64 // (laid.parallel.tp * laid.parallel.pp * laid.parallel.cp) for laid in layouts.valid(nine, llama_8b, 64)} == {1}


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
