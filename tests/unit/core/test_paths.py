"""`~` and variables in paths: every path key of every config, and every path of the command line; no folder named ~ is ever made."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from megatron_prism.cli.entry import app
from megatron_prism.cli.submit import read_command
from megatron_prism.core import paths
from megatron_prism.core.config import (
    CkaConfig,
    ClusterConfig,
    EvaluateConfig,
    FilterConfig,
    LandscapeConfig,
    MergeConfig,
    MixConfig,
    PipelineConfig,
    PrepareConfig,
    StudyConfig,
    TrainConfig,
)
from megatron_prism.core.config.keys import options, walk
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import load, to_yaml
from megatron_prism.launch.pipeline import in_full


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("TILDE", "~/a")
    monkeypatch.delenv("ABSENT", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/a/~/b", "/home/me/a/~/b"),
        ("$SCRATCH/a", "/scratch/a"),
        ("${SCRATCH}/a$SCRATCH.x", "/scratch/a/scratch.x"),
        ("$TILDE/b", "/home/me/a/b"),
        ("a~/b", "a~/b"),
        ("./~", "./~"),
        ("US$5/$(a)/$", "US$5/$(a)/$"),
        (r"\~/a", "~/a"),
        (r"a\$ABSENT", "a$ABSENT"),
        (r"\\$SCRATCH", r"\/scratch"),
        (r"a\b", r"a\b"),
    ],
)
def test_a_path_is_expanded_as_a_shell_would(text: str, path: str) -> None:
    assert paths.expanded(text) == path


@pytest.mark.parametrize("path", ["~", "~/a", r"\~", r"\\~a", "$A", "a/${A}", r"\$A", r"\\${A}", "a~", r"a\b", "", "$A/~"])
def test_what_is_escaped_is_read_as_it_was(path: str) -> None:
    assert paths.expanded(paths.escaped(path)) == path


@pytest.mark.parametrize("text", ["$ABSENT/a", "a/${ABSENT}", "~no_such_user/a"])
def test_what_stands_for_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ABSENT is not set|~no_such_user is no user"):
        paths.expanded(text)


PREPARE: dict[str, Any] = {
    "reuse": "~/before",
    "out": "~/out",
    "tokenizer": "$SCRATCH/tok",
    "sources": [{"name": "a", "weight": 100, "path": ["~/a*.jsonl", "b"], "valid_path": ["$SCRATCH/v"], "parts": [{"path": ["~/p"]}]}],
    "decontaminate": {"against": [{"path": ["~/eval"]}]},
}
TRAIN: dict[str, Any] = {
    "run_dir": "~/run",
    "steps": 1,
    "data": {"prepared": "~/data", "seq_length": 8, "changes": [{"step": 1, "prepared": "~/other"}]},
    "batch": {"global_size": 1},
    "init": {"checkpoint": "$SCRATCH/ck", "tokenizer": "~/tok"},
}
CLUSTER: dict[str, Any] = {
    "gpus_per_node": 8,
    "venv": "~/venv",
    "container": {"image": "~/a.sqsh", "mounts": ["~/data:/data:ro", "$SCRATCH:/scratch"], "workdir": "$SCRATCH"},
    "setup": [["echo", "~", "$ABSENT"]],  # words of a command, no paths
}
STUDY: dict[str, Any] = {"name": "a", "run_dir": "~/run", "stages": [{"name": "a", "command": ["~/a.py"], "output": "$SCRATCH/a"}]}
PIPELINE: dict[str, Any] = {"name": "a", "run_dir": "~/run", "stages": [{"name": "a", "command": ["prepare", "~/a.yaml"]}]}
FILTER: dict[str, Any] = {
    "out": "~/passes",
    "prompts": "$SCRATCH/set",
    "init": {"checkpoint": "~/ck", "tokenizer": "~/tok"},
    "rollout": {"max_tokens": 8},
}
MIX: dict[str, Any] = {"out": "~/mix", "sets": [{"prompts": "~/set", "passes": "$SCRATCH/passes"}], "domains": {"math": {}}}
MERGE: dict[str, Any] = {"out": "~/out", "models": [{"path": "$SCRATCH/a"}], "base_model": "~/b", "config_from": "~/b"}
EVALUATE: dict[str, Any] = {
    "out": "~/scores",
    "model": {"checkpoint": "~/ck", "hf": "$SCRATCH/hf", "endpoint": {"url": "http://~", "model": "~/m", "tokenizer": "~/tok"}},
    "tasks": {
        "a": {"path": "~/a.jsonl", "held_out": {"mixture": "$SCRATCH/mix", "seq_length": 8}},
        "b": {"ruler": {"files": {"essays": "~/e"}}, "lm_eval": {"files": {"": "$SCRATCH/lm"}}},
    },
    "against": "~/before",
}
EITHER = {"checkpoint": "~/ck", "hf": "$SCRATCH/hf"}
LANDSCAPE: dict[str, Any] = {
    "out": "~/landscape",
    "tasks": EVALUATE["tasks"],
    "base_model": EITHER,
    "mid_model": EITHER,
    "rl_model": EITHER,
}
CKA: dict[str, Any] = {
    "out": "~/cka",
    "models": [{"name": "~", "hf": "~/hf"}, {"name": "b", "checkpoint": "$SCRATCH/ck"}],
    "distributions": {"a": {"path": ["~/a.jsonl"], "text": "~ {text}"}},
}
CONFIGS = [
    (CkaConfig, CKA),
    (EvaluateConfig, EVALUATE),
    (LandscapeConfig, LANDSCAPE),
    *((PrepareConfig, PREPARE), (TrainConfig, TRAIN), (ClusterConfig, CLUSTER)),
    (StudyConfig, STUDY),
    *((PipelineConfig, PIPELINE), (FilterConfig, FILTER), (MixConfig, MIX), (MergeConfig, MERGE)),
]


def at(config: Any, key: str) -> list[str]:
    """Return the texts at a dotted key of a config, N standing for every entry of a list."""
    values = [config]
    for part in key.split("."):
        values = [value for each in values for value in (_entries(each) if part == "N" else [getattr(each, part)]) if value is not None]
    return [str(text) for value in values for text in (_entries(value) if isinstance(value, (tuple, dict)) else [value])]


def _entries(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


@pytest.mark.parametrize(("cls", "values"), CONFIGS, ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_every_path_key_is_expanded(write: Any, cls: type, values: dict[str, Any]) -> None:
    config = load(write("a.yaml", values), cls)
    keys = [name for name, key in walk(cls) if key.is_path]
    assert keys, "no path key"
    for key in keys:
        texts = at(config, key)
        assert texts and not [text for text in texts if "~" in text or "$" in text], key
    Path("again.yaml").write_text(to_yaml(config))
    assert load(Path("again.yaml"), cls) == config


def test_a_path_that_stands_for_nothing_is_named_by_its_key(write: Any) -> None:
    source = {**PREPARE["sources"][0], "path": ["a", "~no_such_user/a"]}
    path = write("a.yaml", {**PREPARE, "sources": [source]})
    with pytest.raises(InputError) as caught:
        load(path, PrepareConfig, ["out=$ABSENT/a"])
    assert [problem.where for problem in caught.value.problems] == ["override:out", f"{path}:sources.0.path.1"]
    with pytest.raises(InputError, match=r"out: .*'HOME' not found.*written \$NAME"):
        load(path, PrepareConfig, ["out=${HOME}/a"])
    with pytest.raises(InputError, match="a.yaml:base: found '[$]ABSENT/b.yaml'"):
        load(write("a.yaml", {"base": "$ABSENT/b.yaml"}), PrepareConfig)


@pytest.mark.parametrize("image", ["docker://$oauthtoken@nvcr.io#nvidia/pytorch:26.06-py3", "$oauthtoken@nvcr.io#nvidia/a", "a/b:1"])
def test_the_address_of_an_image_is_no_path(write: Any, image: str) -> None:
    config = load(write("a.yaml", {"gpus_per_node": 8, "container": {"image": image}}), ClusterConfig)
    assert config.container is not None and config.container.image == image


def test_every_path_of_the_command_line_is_expanded() -> None:
    jobs: Any = typer.main.get_command(app)
    commands = {**jobs.commands, **{f"convert {name}": command for name, command in jobs.commands["convert"].commands.items()}}
    count = 0
    for name, command in commands.items():
        for parameter in command.params if command is not jobs.commands["convert"] else []:
            if Path in options(get_type_hints(inspect.unwrap(command.callback))[parameter.name]):
                count += 1
                needed = [word for other in command.params if other.required and other is not parameter for word in given(other, "a")]
                call = read_command([*name.split(), *needed, *given(parameter, "~/x")])
                assert call is not None and str(call.arguments[parameter.name]) == "/home/me/x", (name, parameter.name)
                with pytest.raises(InputError, match="ABSENT is not set"):
                    read_command([*name.split(), *needed, *given(parameter, "$ABSENT/x")])
    assert count > 20
    with pytest.raises(InputError, match="/home/me/absent.yaml|~/absent.yaml"):
        in_full(["~/absent.yaml"], read_command)


@pytest.mark.parametrize(
    ("words", "where"), [(["report", "--out", "out"], "RUN"), (["study", "s.yaml", "--status", "--beside"], "--beside")]
)
def test_every_one_of_several_paths_is_expanded(words: list[str], where: str) -> None:
    more = ["--beside"] if where == "--beside" else []
    done = CliRunner().invoke(app, [*words, "$ABSENT/x", *more, "$ABSENT/y"])
    assert isinstance(done.exception, InputError) and [problem.where for problem in done.exception.problems] == [where] * 2


def given(parameter: Any, value: str) -> list[str]:
    """Return the words that give a parameter."""
    return [value] if parameter.param_type_name == "argument" else [parameter.opts[0], value]
