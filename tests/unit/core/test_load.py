"""Loading a config: what wins, what is refused, and whether each problem names the file and the key that hold it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prism.core.config import Llama3Rope, ModelConfig, PrepareConfig, TrainConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.load import build, load, to_dict, to_yaml


def refusal(path: Path, *overrides: str, cls: type = TrainConfig) -> tuple[Problem, ...]:
    with pytest.raises(InputError) as caught:
        load(path, cls, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_file_becomes_frozen_types_and_defaults(write: Any, values: dict) -> None:
    config = load(write("a.yaml", values), TrainConfig)
    assert (config.run_dir, config.steps, config.batch.micro_size, config.seed) == (Path("runs/a"), 100, 2, 1234)
    assert config.data.weights == {"math": 60.0, "code": 40.0}
    with pytest.raises(AttributeError):
        config.steps = 3  # type: ignore[misc]


def test_later_values_win_through_chains_and_lists_of_bases(write: Any, values: dict) -> None:
    write("deep/root.yaml", values | {"seed": 1})
    write("deep/middle.yaml", {"base": "root.yaml", "seed": 2, "batch": {"global_size": 16}})
    write("other.yaml", {"seed": 3, "steps": 200, "data": {"seq_length": 32}})
    top = write("top.yaml", {"base": ["deep/middle.yaml", "other.yaml"], "data": {"num_workers": 1}})
    config = load(top, TrainConfig, ["optimizer.lr=1e-3", "steps=300"])
    assert (config.seed, config.steps, config.optimizer.lr) == (3, 300, 1e-3)
    assert (config.batch.global_size, config.batch.micro_size) == (16, 2)  # a mapping is merged key by key
    assert (config.data.seq_length, config.data.num_workers, config.data.prepared) == (32, 1, Path("data/a"))


def test_the_layout_for_the_world_size_stands_between_files_and_overrides(write: Any, values: dict) -> None:
    tuned = {8: {"parallel": {"tp": 2, "pp": 2}, "batch": {"micro_size": 1}}, 64: {"parallel": {"tp": 4}}}
    write("base.yaml", values | {"world_size": 64, "layouts": tuned, "parallel": {"pp": 1}})
    top = write("top.yaml", {"base": "base.yaml", "layouts": {64: {"parallel": {"cp": 2}}}, "parallel": {"tp": 1}})

    def grid(*overrides: str) -> tuple[int | None, int, int, int, int]:
        config = load(top, TrainConfig, overrides)
        return config.world_size, config.parallel.tp, config.parallel.pp, config.parallel.cp, config.batch.micro_size

    assert grid() == (64, 4, 1, 2, 2)
    assert grid("world_size=8") == (8, 2, 2, 1, 1)
    assert grid("world_size=8", "parallel.tp=1") == (8, 1, 2, 1, 1)
    (problem,) = refusal(top, "world_size=16")
    assert (problem.where, problem.found) == (f"{top}:world_size", "16") and "8, 64" in problem.required and "layouts.16={}" in problem.fix
    assert grid("world_size=16", "layouts.16={}") == (16, 1, 1, 1, 2)
    assert grid("world_size=16", "layouts.16.parallel.tp=2", "parallel.pp=4") == (16, 2, 4, 1, 2)
    assert grid("world_size=8", "layouts.8={}") == grid("world_size=8")


def test_a_misspelt_key_of_a_layout_is_named_there(write: Any, values: dict) -> None:
    path = write("a.yaml", values | {"world_size": 8, "layouts": {8: {"parallel": {"tq": 2}}}})
    (problem,) = refusal(path)
    assert problem.where == f"{path}:layouts.8:parallel.tq"
    (problem,) = refusal(write("b.yaml", {"out": "o", "tokenizer": "t", "sources": [], "layouts": {8: {}}}), cls=PrepareConfig)
    assert problem.where.endswith("b.yaml:layouts")


def test_lists_are_replaced_whole_and_become_tuples(write: Any) -> None:
    sources = [{"name": "a", "path": ["a.txt", "b.txt"], "weight": 60}, {"name": "b", "path": ["c.txt"], "weight": 40}]
    write("base.yaml", {"out": "o", "tokenizer": "t", "sources": sources})
    top = write("top.yaml", {"base": "base.yaml", "sources": [{"name": "c", "path": ["d.txt"], "weight": 100}]})
    assert [source.path for source in load(top, PrepareConfig).sources] == [("d.txt",)]
    assert [source.path for source in load(top.with_name("base.yaml"), PrepareConfig).sources] == [("a.txt", "b.txt"), ("c.txt",)]
    (problem,) = refusal(
        write("short.yaml", {"base": "base.yaml", "sources": [{"path": ["a"], "weight": 1, "name": "a", "wieght": 1}]}), cls=PrepareConfig
    )
    assert "short.yaml:sources.0.wieght" in problem.where and "'weight'" in problem.fix


def test_an_entry_of_a_list_has_what_its_base_gives_it(write: Any) -> None:
    write("parts/root.yaml", {"text": "{q}", "valid_percent": 1.0})
    write("parts/a.yaml", {"base": "root.yaml", "name": "a", "path": ["a/${seed}.txt"], "weight": 1, "parts": []})
    sources = [{"base": "parts/a.yaml", "weight": 60, "valid_percent": 2.0}, {"name": "b", "path": ["b.txt"], "weight": 40}]
    top = write("top.yaml", {"out": "o", "tokenizer": "t", "seed": 7, "sources": sources})
    first, second = load(top, PrepareConfig).sources
    assert (first.name, first.text, first.valid_percent, first.weight, first.path) == ("a", "{q}", 2.0, 60.0, ("a/7.txt",))
    assert (second.name, second.text) == ("b", "{text}")
    assert load(top, PrepareConfig, ["sources.0.weight=50"]).sources[0].weight == 50
    for base, where in ((3, "top.yaml:sources.0.base"), ("absent.yaml", "absent.yaml"), ("top.yaml", "top.yaml:base")):
        (problem,) = refusal(write("top.yaml", {"out": "o", "tokenizer": "t", "sources": [{"base": base, "weight": 1}]}), cls=PrepareConfig)
        assert problem.where.endswith(where)


@pytest.mark.parametrize("text", ["a: !!timestamp x", "a: !!int x", "a: [", "a: !!python/name:os.system"])
def test_what_yaml_cannot_read_is_one_problem(tmp_path: Path, text: str) -> None:
    """PyYAML itself fails on some, with errors that are not its own."""
    (tmp_path / "a.yaml").write_text(text)
    (problem,) = refusal(tmp_path / "a.yaml")
    assert problem.where.endswith("a.yaml") and problem.required == "a readable YAML file"


def test_a_place_is_named_without_detours(write: Any, values: dict, tmp_path: Path) -> None:
    wrong = write("base/root.yaml", values | {"seed": "no"})
    (problem,) = refusal(write("recipes/top.yaml", {"base": "../base/root.yaml"}))
    assert problem.where == f"{wrong}:seed"
    (tmp_path / "base" / "below").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "base" / "below")  # behind it .. is base, and not tmp_path
    write("root.yaml", values)
    (problem,) = refusal(write("top.yaml", {"base": "linked/../root.yaml"}))
    assert problem.where == f"{tmp_path}/linked/../root.yaml:seed"


@pytest.mark.parametrize(("bases", "end"), [("a.yaml", "a.yaml"), ("b.yaml", "a.yaml"), (["c.yaml", "b.yaml"], "a.yaml")])
def test_base_that_leads_back_is_refused(write: Any, bases: Any, end: str) -> None:
    write("c.yaml", {"seed": 1})
    write("b.yaml", {"base": end})
    (problem,) = refusal(write("a.yaml", {"base": bases}))
    assert problem.where.endswith("a.yaml:base") and "inherits from itself" in problem.found


def test_the_same_base_twice_is_no_cycle(write: Any, values: dict) -> None:
    write("root.yaml", values)
    write("b.yaml", {"base": "root.yaml", "seed": 5})
    assert load(write("a.yaml", {"base": ["root.yaml", "b.yaml"]}), TrainConfig).seed == 5


BOMB = "".join(f"{at}: &{at} [{', '.join([f'*{before}'] * 9)}]\n" for before, at in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\n" + BOMB,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: " + "[" * 100_000,
        "a: " + "[" * 50 + "]" * 50,
        "a: [" + "1, " * 30_000 + "1]",
        "a: &a {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: 1}}}}}}}}}}\nb: &b [[[[[[[[[[[[[*a]]]]]]]]]]]]]\nc: &c [[[[[[[[[[[[[*b]]]]]]]]]]]]]\nd: [[[[[[[[[[[[[*c]]]]]]]]]]]]]",
    ],
    ids=["aliases of aliases", "within itself", "mapping within itself", "no end", "deep", "long", "deep by aliases"],
)
def test_a_file_that_stands_for_too_much_is_refused(write: Any, text: str) -> None:
    (problem,) = refusal(write("a.yaml", text))
    limits = ("more than 20,000 values, or nested deeper than 50", "maximum nesting depth")  # ours, and PyYAML's own (6.0.4)
    assert problem.where.endswith("a.yaml") and any(limit in problem.found for limit in limits)


def test_an_alias_is_what_it_stands_for(write: Any) -> None:
    text = "run_dir: r\nsteps: &n 8\ndata: {prepared: p, seq_length: *n}\nbatch: &b {global_size: *n}\n"
    config = load(write("a.yaml", text), TrainConfig)
    assert (config.data.seq_length, config.batch.global_size) == (8, 8)
    (problem,) = refusal(write("a.yaml", text + "seed: *absent\n"))
    assert "undefined alias" in problem.found


def test_a_device_is_no_config(write: Any, values: dict) -> None:
    (problem,) = refusal(write("a.yaml", values | {"base": "/dev/zero"}))
    assert problem.where == "/dev/zero"


@pytest.mark.parametrize("base", [None, 3, True])
def test_base_that_names_no_file_is_refused(write: Any, values: dict, base: Any) -> None:
    (problem,) = refusal(write("a.yaml", values | {"base": base}))
    assert problem.where.endswith("a.yaml:base")


def test_interpolation_sees_the_merged_config(write: Any, values: dict) -> None:
    values["data"]["seq_length"] = "${steps}"
    path = write("a.yaml", values | {"run_dir": "runs/lr${optimizer.lr}", "seed": "${batch.global_size}"})
    config = load(path, TrainConfig, ["steps=48"])
    assert (config.run_dir, config.seed, config.data.seq_length) == (Path("runs/lr5e-05"), 8, 48)


@pytest.mark.parametrize("seed", ["${absent.key}", "${seed}", "${steps}", "${"])
def test_interpolation_that_does_not_resolve_is_refused(write: Any, values: dict, seed: str) -> None:
    problems = refusal(write("a.yaml", values | {"seed": seed, "steps": "${seed}"}))
    assert all("a.yaml" in problem.where for problem in problems)


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "5.0e-05", "0.00005"])
def test_floats_as_people_write_them(write: Any, text: str) -> None:
    path = write(
        "a.yaml", f"run_dir: r\nsteps: 1\ndata: {{prepared: p, seq_length: 1}}\nbatch: {{global_size: 1}}\noptimizer: {{lr: {text}}}\n"
    )
    assert load(path, TrainConfig).optimizer.lr == 5e-5
    assert load(path, TrainConfig, [f"optimizer.eps={text}"]).optimizer.eps == 5e-5


def test_unknown_key_is_named_with_its_file_and_the_nearest_key(write: Any, values: dict) -> None:
    values["optimizer"]["weight_decya"] = 0.1
    base, top = write("base.yaml", values), write("top.yaml", {"base": "base.yaml", "batch": {"micro_sise": 1}})
    where = {problem.where: problem.fix for problem in refusal(top, "optimiser.lr=3", "zzzz=1")}
    assert where == {
        f"{base}:optimizer.weight_decya": "did you mean 'weight_decay'?",
        f"{top}:batch.micro_sise": "did you mean 'micro_size'?",
        "override:optimiser": "did you mean 'optimizer'?",
        "override:zzzz": "",
    }


def test_a_value_where_a_list_is_required_says_how_one_is_written(write: Any, values: dict) -> None:
    (problem,) = refusal(write("a.yaml", values), "recompute.modules=mlp")
    assert str(problem) == "override:recompute.modules: found 'mlp'; required a list; a list is written [mlp]"


def test_a_section_that_is_given_as_one_value_is_named_by_its_keys() -> None:
    values = {"out": "o", "tokenizer": "t", "sources": [{"name": "a", "weight": 100, "turns": "messages", "keep": ["score"]}]}
    with pytest.raises(InputError) as caught:
        build(values, PrepareConfig, lambda key: ".".join(map(str, key)))
    keep, turns = map(str, caught.value.problems)
    assert turns == "sources.0.turns: found 'messages'; required a section with keys of its own: field, prefix"
    assert keep.startswith("sources.0.keep.0: found 'score'; required a section with keys of its own: at_least, equals, field,")


def test_every_wrong_value_is_named_with_the_file_that_set_it(write: Any, values: dict) -> None:
    values["batch"]["micro_size"] = "2"
    base, top = write("base.yaml", values), write("top.yaml", {"base": "base.yaml", "precision": "fp8", "seed": True})
    assert [problem.where for problem in refusal(top, "schedule.warmup_steps=2.5")] == [
        f"{top}:seed",
        f"{top}:precision",
        "override:schedule.warmup_steps",
        f"{base}:batch.micro_size",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "3"),
        ("steps", True),
        ("steps", 3.0),
        ("steps", None),
        ("optimizer", {"lr": "5e-5x"}),
        ("optimizer", {"lr": True}),
        ("parallel", {"sequence_parallel": 1}),
        ("parallel", {"sequence_parallel": "yes"}),
        ("run_dir", 3),
        ("optimizer", []),
        ("precision", "FP32"),
    ],
)
def test_a_value_of_another_type_is_refused(values: dict, key: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        build(values | {key: value}, TrainConfig, lambda path: ".".join(map(str, path)))
    (problem,) = caught.value.problems
    assert problem.where.split(".")[0] == key


def test_an_int_serves_for_a_float(values: dict) -> None:
    config = build(values | {"optimizer": {"lr": 1}}, TrainConfig, str)
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)


def test_missing_keys_are_all_named(write: Any, values: dict) -> None:
    del values["steps"], values["data"]["prepared"]
    path = write("a.yaml", values)
    assert {(problem.where, problem.found) for problem in refusal(path)} == {
        (f"{path}:steps", "no value"),
        (f"{path}:data.prepared", "no value"),
    }


@pytest.mark.parametrize(
    "content",
    ["- a\n", "3\n", "a: [\n", "a: 1\na: 2\n", "a: !!python/object/apply:os.getcwd []\n", "? [1]\n: 2\n", "seed: !!binary aGVsbG8=\n"],
)
def test_a_file_that_is_no_config_is_refused(write: Any, content: str) -> None:
    problems = refusal(write("a.yaml", content))
    assert all("a.yaml" in problem.where for problem in problems)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, write: Any, name: str) -> None:
    assert [problem.where for problem in refusal(tmp_path / name)] == [str(tmp_path / name)]
    assert [problem.where for problem in refusal(write("top.yaml", {"base": name}))] == [str(tmp_path / name)]


@pytest.mark.parametrize("override", ["steps", "=3", "steps=[", "steps='", "steps=${", "[=3"])
def test_an_override_that_does_not_read_is_refused(write: Any, values: dict, override: str) -> None:
    (problem,) = refusal(write("a.yaml", values), override)
    assert "override" in problem.where


def test_yaml_of_a_config_reads_back_equal(write: Any, values: dict) -> None:
    model = to_dict(
        ModelConfig(
            family="llama",
            num_layers=1,
            hidden_size=8,
            ffn_hidden_size=8,
            num_attention_heads=2,
            num_query_groups=1,
            kv_channels=4,
            vocab_size=9,
            max_position_embeddings=8,
            rope_scaling=Llama3Rope(factor=8.0),
        )
    )
    config = build(values | {"model": model, "parallel": {"vpp": 2}, "optimizer": {"lr": 1 / 3, "eps": 1e-30}}, TrainConfig, str)
    assert load(write("a.yaml", to_yaml(config)), TrainConfig) == config


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=6) | st.sampled_from(
    ["5e-5", "null", "true", "0x1", "{text}", "- a", "#a", "2020-01-01", "a: b", "${b}", "\\${b}", "\n", "~", "???"]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, weight=st.floats(allow_nan=False, allow_infinity=False))
def test_yaml_keeps_any_text_and_float(tmp_path: Path, text: str, weight: float) -> None:
    source = {"name": "a", "path": [text], "weight": weight, "text": text}
    config = build({"out": "o", "tokenizer": "t", "sources": [source]}, PrepareConfig, str)
    (tmp_path / "a.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(tmp_path / "a.yaml", PrepareConfig) == config


RETYPED = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
    st.just([1]),
    st.just({"a": 1}),
    st.just({1: "a"}),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutation_builds_or_names_a_key(values: dict, data: st.DataObject) -> None:
    config = copy.deepcopy(values)
    places = [(config, key) for key in config] + [(part, key) for part in config.values() if isinstance(part, dict) for key in part]
    for _ in range(data.draw(st.integers(1, 3))):
        part, key = data.draw(st.sampled_from(places))
        change = data.draw(st.sampled_from(["delete", "rename", "retype"]))
        value = part.pop(key, 1)
        if change == "rename":
            part[data.draw(st.text(min_size=1, max_size=6))] = value
        elif change == "retype":
            part[key] = data.draw(RETYPED)
    try:
        built = build(config, TrainConfig, lambda path: "key:" + ".".join(map(str, path)))
        assert math.isfinite(built.steps)
    except InputError as error:
        assert error.problems and all(problem.where.startswith("key:") and len(problem.where) > 4 for problem in error.problems)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["steps", "data", "data.weights", "optimizer.lr", "run_dir"]),
    text=st.text(st.characters(codec="ascii"), max_size=8),
)
def test_any_override_loads_or_is_refused(tmp_path: Path, values: dict, key: str, text: str) -> None:
    path = tmp_path / "fuzz.yaml"
    if not path.exists():
        path.write_text(to_yaml(build(values, TrainConfig, str)))
    try:
        assert isinstance(load(path, TrainConfig, [f"{key}={text}"]), TrainConfig)
    except InputError as error:
        assert all(problem.where for problem in error.problems)
