"""Every problem of a prepare config: one change to a valid one each, named by its key."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_prism.core.check import data
from megatron_prism.core.config import PrepareConfig
from megatron_prism.core.load import build

NAN = math.nan


def prepare(*sources: dict[str, Any], **changes: Any) -> list[str]:
    whole = [{"name": "a", "path": ["a.txt"], "weight": 100.0} | source for source in sources]
    return [
        problem.where
        for problem in data.check_prepare(build({"out": "o", "tokenizer": "t", "sources": whole, **changes}, PrepareConfig, str))
    ]


@pytest.mark.parametrize(
    ("sources", "key"),
    [
        ([], "sources"),
        ([{"weight": 60}, {"weight": 40}], "sources.1.name"),
        ([{"weight": 60}, {"name": "b", "weight": 30}], "sources.weight"),
        ([{"weight": 101}, {"name": "b", "weight": -1}], "sources.1.weight"),
        ([{"weight": NAN}], "sources.0.weight"),
        ([{"weight": NAN}], "sources.weight"),
        ([{"name": ""}], "sources.0.name"),
        ([{"name": "../a"}], "sources.0.name"),
        ([{"path": []}], "sources.0.path"),
        ([{"valid_percent": 100}], "sources.0.valid_percent"),
        ([{"valid_percent": NAN}], "sources.0.valid_percent"),
        ([{"valid_percent": 1, "valid_path": ["v"]}], "sources.0.valid_percent"),
        ([{"name": ".a"}], "sources.0.name"),
        ([{"name": "report"}], "sources.0.name"),
        ([{"min_tokens": 0}], "sources.0.min_tokens"),
        ([{"parts": [{"path": ["a"]}]}], "sources.0.path"),
        ([{"path": [], "parts": [{}]}], "sources.0.parts.0.path"),
        ([{"path": [], "parts": [{"path": ["a"]}], "text": "{q}"}], "sources.0.text"),
        ([{"path": [], "parts": [{"path": ["a"]}], "valid_path": ["v"]}], "sources.0.valid_path"),
        ([{"available_tokens": 0}], "sources.0.available_tokens"),
    ],
)
def test_a_mixture_that_does_not_hold_is_named(sources: list, key: str) -> None:
    assert key in prepare(*sources)


def test_prepare_numbers_and_a_mixture_that_holds() -> None:
    assert prepare({"weight": 27.5}, {"name": "b", "weight": 72.5}) == []
    assert prepare({"path": [], "parts": [{"path": ["a.txt"]}], "hf_id": "x/y"}) == []
    assert prepare({}, tokens=0, num_workers=0, max_epochs=0) == ["tokens", "max_epochs", "num_workers"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"decontaminate": {"against": []}}, "decontaminate.against"),
        ({"decontaminate": {"against": [{}]}}, "decontaminate.against.0.path"),
        ({"decontaminate": {"against": [{"path": ["a"], "sample": {"field": "x", "counts": {}}}]}}, "decontaminate.against.0.sample"),
        ({"decontaminate": {"against": [{"path": ["a"]}], "shortest": 14}}, "decontaminate.shortest"),
        ({"decontaminate": {"against": [{"path": ["a"]}], "shortest": 0}}, "decontaminate.shortest"),
        ({"packing": {"seq_length": 0}}, "packing.seq_length"),
        ({"packing": {"seq_length": 8, "overlap": 8}}, "packing.overlap"),
    ],
)
def test_a_step_of_the_whole_mixture_that_does_not_hold_is_named(changes: dict, key: str) -> None:
    assert prepare({}, **changes) == [key]
    assert prepare({}, decontaminate={"against": [{"path": ["a"]}]}, packing={"seq_length": 8, "overlap": 7}) == []


@pytest.mark.parametrize(("total", "holds"), [(100.0, True), (100 + 5e-7, True), (100.001, False), (99.9, False)])
def test_weights_sum_to_a_hundred(total: float, holds: bool) -> None:
    assert (data.check_weights({"a": 30.0, "b": total - 30.0}, "data.weights") == []) is holds
