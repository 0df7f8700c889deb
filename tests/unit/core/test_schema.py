"""The JSON Schema of a YAML says what loading and the bounds say: of our own configs, and of values that are wrong."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config import (
    CkaConfig,
    ClusterConfig,
    EvaluateConfig,
    FilterConfig,
    LandscapeConfig,
    MergeConfig,
    MixConfig,
    PipelineConfig,
    PolicyConfig,
    PrepareConfig,
    PromptsConfig,
    RLConfig,
    StudyConfig,
    TrainConfig,
)
from megatron_prism.core.config.keys import PLACE, Key, section_of, walk
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build
from megatron_prism.core.schema import schema

jsonschema = pytest.importorskip("jsonschema", reason="pip install -e '.[dev]'")
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FOLDERS = {
    "analyses": CkaConfig,
    "clusters": ClusterConfig,
    "evaluations": EvaluateConfig,
    "pipelines": PipelineConfig,
    "policies": PolicyConfig,
    "mixtures": PrepareConfig,
    "sources": PrepareConfig,
    "prompts": PromptsConfig,
}
DATA = CONFIGS / "studies" / "paper"  # the paper's tables: no configs
FILES = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent != DATA]
JOBS = (TrainConfig, PrepareConfig, PromptsConfig, ClusterConfig, PipelineConfig, StudyConfig)


def job_of(path: Path) -> type:
    if path.parent == Path("studies"):
        return StudyConfig
    if "rl" in path.stem.split("_"):
        return RLConfig
    if len(path.parts) == 3 and path.parts[0] == "studies":  # named after the stage: data_mc, prompts_mcs
        stages = {"data": PrepareConfig, "prompts": PromptsConfig, "cka": CkaConfig, "policy": PolicyConfig}
        if path.stem.partition("_")[0] in stages:
            return stages[path.stem.partition("_")[0]]
    if path.stem == "landscape":
        return LandscapeConfig
    tiny = {
        "mixture": PrepareConfig,
        "decontaminate": PrepareConfig,
        "prompts": PromptsConfig,
        "filter": FilterConfig,
        "mix": MixConfig,
        "merge": MergeConfig,
        "eval": EvaluateConfig,
        "evaluate": EvaluateConfig,
    }
    of_tiny = tiny.get(path.stem.rpartition("_")[2], TrainConfig)
    named = {"mixes": MixConfig, "passes": FilterConfig}
    return named.get(path.parent.name) or FOLDERS.get(path.parts[0], of_tiny)


@functools.cache
def validator(cls: type, at: str) -> Any:
    whole = schema(cls)
    return jsonschema.Draft7Validator({**whole, **whole["$defs"][at]} if at else whole)


def faults(cls: type, values: Any, at: str = "") -> list[str]:
    """Return where a YAML's values are not what the schema (or a definition of it) says."""
    return [".".join(map(str, error.absolute_path)) for error in validator(cls, at).iter_errors(json.loads(json.dumps(values)))]


@pytest.mark.parametrize("cls", (*JOBS, FilterConfig, MergeConfig, MixConfig, RLConfig))
def test_it_is_a_schema(cls: type) -> None:
    jsonschema.Draft7Validator.check_schema(schema(cls))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_our_configs_fulfil_it_each_file_alone(path: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / path), resolve=False)
    at = "SourceConfig" if path.parts[0] == "sources" else ""
    assert faults(job_of(path), values, at) == []
    assert isinstance(values, dict)
    assert faults(job_of(path), {**values, "nonsense": 1}, at) == [""]


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"optimizer": {"lrr": 1}}, "optimizer"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"steps": True}, "steps"),
        ({"precision": "fp8"}, "precision"),
        ({"optimizer": []}, "optimizer"),
        ({"data": {"changes": [{"step": 1, "prepard": "x"}]}}, "data.changes.0"),
        ({"data": {"weights": {"a": -1}}}, "data.weights"),
        ({"environment": {"NCCL_DEBUG": 1}}, "environment"),
        ({"layouts": {"8": {"parallel": {"tq": 1}}}}, "layouts.8.parallel"),
        ({"layouts": {"8": {"layouts": {}}}}, "layouts.8"),
        ({"layouts": {"8": {"base": "a.yaml"}}}, "layouts.8"),
        ({"base": 3}, "base"),
        ({"model": {"attention_multiplier": 0.0}}, "model"),
        ({"recompute": {"modules": ["all"]}}, "recompute"),
    ],
)
def test_what_is_wrong_is_found(values: dict[str, Any], where: str) -> None:
    assert any(place.startswith(where) or where.startswith(place) for place in faults(TrainConfig, values))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"base": ["a.yaml", "b.yaml"], "layouts": {"8": {"parallel": {"tp": 2}}}},
        {"steps": "${a.b}", "optimizer": "${x}", "precision": "${y}", "data": {"weights": {"a": "${z}"}, "seq_length": "1_024"}},
        {"optimizer": {"lr": 1}, "fp8": None, "trainable": ["${a}"]},
        {"data": {"changes": [{"base": "change.yaml"}, "${changes.0}"]}},
    ],
)
def test_what_a_file_may_say_besides_values_is_accepted(values: dict[str, Any]) -> None:
    assert faults(TrainConfig, values) == []


LEAVES = [(cls, name, key) for cls in JOBS for name, key in walk(cls) if not section_of(key.kind)]
VALUES = [
    None,
    True,
    0,
    1,
    -1,
    2,
    0.5,
    -0.5,
    1.5,
    2**40,
    "",
    "a",
    "a b",
    "24:00:00",
    [],
    ["a"],
    ["core_attn"],
    [1],
    {},
    {"a": 1},
    {"a": "b"},
]


@pytest.mark.parametrize(("cls", "name", "key"), LEAVES, ids=lambda value: value if isinstance(value, str) else "")
def test_schema_agrees_with_loading_on_each_key(full: dict[type, dict], cls: type, name: str, key: Key) -> None:
    verdicts = set()
    for value in [*VALUES, *(get_args(key.kind) if get_origin(key.kind) is Literal else ())]:
        values, alone = full[cls], value
        part, (*above, last) = values, name.split(".")
        for step in above:
            part = part[0] if step == PLACE else part.setdefault(step, {})
        part[last] = value
        for step in reversed(name.split(".")):
            alone = [alone] if step == PLACE else {step: alone}
        is_accepted = loads(cls, values)
        assert is_accepted == (not faults(cls, alone)), value
        verdicts.add(is_accepted)
    assert verdicts == {True, False}


def loads(cls: type, values: dict[str, Any]) -> bool:
    try:
        return not list(check_bounds(build(values, cls, str)))
    except InputError:
        return False
