"""What stands at a key: its bounds are checked wherever it stands, its words are there, and its mark says what a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config import ClusterConfig, PartConfig, PipelineConfig, PrepareConfig, SourceConfig, StudyConfig, TrainConfig
from megatron_prism.core.config.keys import PLACE, keys, section_of, sections, walk, words
from megatron_prism.core.config.section import Pattern, Range
from megatron_prism.core.load import build, flat

JOBS = (TrainConfig, PrepareConfig, ClusterConfig, PipelineConfig, StudyConfig)
EVERY = [(cls, name) for cls in JOBS for name, key in walk(cls) if key.bounds]
Full = dict[type, dict[str, Any]]
MIGHT_CHANGE = (  # the prefixes that checkpoint/run_folder.py had before the marks, and the path of the data (checkpoint/same_data.py)
    *(
        "run_dir",
        "world_size",
        "init.checkpoint",
        "init.tokenizer",
        "data.prepared",
        "data.num_workers",
        "data.changes",
        "data.max_epochs",
        "batch.micro_size",
    ),
    *("recompute.", "validation.", "save.", "log.", "guard.", "limits.", "parallel.tp", "parallel.pp", "parallel.cp", "parallel.vpp"),
    *("parallel.sequence_parallel", "parallel.overlap", "environment", "deterministic", "offload.activation_layers"),
    *("attention_backend", "cuda_graphs", "gc_interval", "logits_chunk_tokens", "fusion.", "parallel.grad_reduce"),
)


def outside(bound: Range | Pattern) -> list[Any]:
    """Return values just outside a bound, and those that are no number."""
    if isinstance(bound, Pattern):
        return ["", "a b", "a\n"]
    edges = [limit for limit in (bound.gt, bound.lt, bound.ne) if limit is not None]
    edges += [bound.ge - 1] if bound.ge is not None else []
    edges += [bound.le + 1] if bound.le is not None else []
    return [*edges, math.nan, -math.inf, *([math.inf] if bound.finite else [])]


def put(config: Any, path: list[str], value: Any) -> Any:
    """Return a config with another value at a dotted key; PLACE is the first entry of a list."""
    name, *rest = path
    if isinstance(config, tuple):
        return (put(config[0], rest, value), *config[1:])
    return dataclasses.replace(config, **{name: put(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(("cls", "name"), EVERY, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_value_outside_the_bounds_of_its_key_is_named(full: Full, cls: type, name: str) -> None:
    (key,) = [key for dotted, key in walk(cls) if dotted == name]
    config = build(full[cls], cls, str)
    assert not list(check_bounds(config))
    for value in outside(key.bounds[0]):
        (problem,) = check_bounds(put(config, name.split("."), value))
        assert (problem.where, problem.required) == (name.replace(PLACE, "0"), key.required), value
    assert not key.is_nullable or not list(check_bounds(put(config, name.split("."), None)))


def test_an_integer_that_no_float_holds_is_compared() -> None:
    assert Range(ge=1).holds(10**400) and not Range(ge=1, lt=2**31).holds(10**400) and not Range(gt=0, finite=False).holds(-(10**400))


def test_bounds_of_what_a_list_or_a_mapping_holds(full: Full) -> None:
    config = build(full[TrainConfig], TrainConfig, str)
    broken = put(put(config, ["data", "weights"], {"a": -1.0, "b": 1.0}), ["data", "changes", PLACE, "weights"], {"c": math.nan})
    assert [problem.where for problem in check_bounds(broken)] == ["data.weights.a", "data.changes.0.weights.c"]
    cluster = put(build(full[ClusterConfig], ClusterConfig, str), ["sbatch"], ("--a", "-b"))
    assert [problem.where for problem in check_bounds(cluster, "cluster.")] == ["cluster.sbatch.1"]


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (Range(ge=1), "at least 1"),
        (Range(ge=0), "0 or more"),
        (Range(gt=0), "more than 0"),
        (Range(ge=0, le=1), "between 0 and 1"),
        (Range(ge=0, lt=1), "at least 0 and below 1"),
        (Range(ge=1, lt=2**31), "at least 1 and below 2**31"),
        (Range(ge=1, le=65535), "between 1 and 65535"),
        (Range(ne=0), "a number other than 0"),
        (Range(le=-0.5), "at most -0.5"),
    ],
)
def test_a_range_in_words(bound: Range, said: str) -> None:
    assert str(bound) == said


@pytest.mark.parametrize("cls", JOBS)
def test_every_key_has_words_and_sections_their_docstring(cls: type) -> None:
    for place, section, own in sections(cls):
        assert section.__doc__ and not section.__doc__.startswith(section.__name__), section
        silent = [f"{place}{key.name}" for key in own if not words(section).get(key.name) and not section_of(key.kind)]
        assert not silent
        assert not words(section).keys() - {key.name for key in own}


def test_inherited_keys_keep_their_words_and_come_behind() -> None:
    assert words(TrainConfig)["seed"].startswith("The seed") and words(SourceConfig)["path"] == words(PartConfig)["path"]
    names = [key.name for key in keys(TrainConfig)]
    assert names[:5] == ["data", "batch", "validation", "run_dir", "steps"] and names[-1] == "offload"


def test_a_resumed_run_may_change_what_it_always_might(full: Full) -> None:
    marked = {name for name, key in walk(TrainConfig) if key.may_change}
    whole = flat(build(full[TrainConfig], TrainConfig, str))
    least = flat(build({key: full[TrainConfig][key] for key in ("run_dir", "steps", "data", "batch")}, TrainConfig, str))
    for config in (whole, least):
        assert {name for name in config if name in marked} == {name for name in config if name.startswith(MIGHT_CHANGE)}
    assert {"fp8", "model"} <= least.keys() and "model.mamba.num_heads" in whole
