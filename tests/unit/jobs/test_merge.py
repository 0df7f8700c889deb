"""`prism merge` as a shell sees it: options or a YAML, what is printed, exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_prism import cli
from megatron_prism.cli.submit import read_command
from megatron_prism.launch.pipeline import read_pipeline
from tests.unit.merge.folders import moved, tensors

Prism = Callable[..., tuple[int, str]]


@pytest.fixture
def prism(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prism:
    """Return a function that runs a command and returns its exit code and all it said."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["prism", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            said = capsys.readouterr()
            return int(end.code or 0), said.out + said.err
        return 0, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    make_folder(root / "a=1", {}, 1)  # a weight is what follows the last =
    return root / "a=1", moved(root / "a=1", root / "b", 1)


def test_options_and_a_yaml_are_one_merge(prism: Prism, models: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = models
    code, said = prism("merge", "--model", f"{one}=0.15", "--model", f"{two}=.85", "--out", tmp_path / "x", "--json", tmp_path / "x.json")
    assert code == 0 and str(tmp_path / "x") in said
    assert json.loads((tmp_path / "x.json").read_text())["parents"] == {str(one): 0.15, str(two): 0.85}
    values = {"out": str(tmp_path / "no"), "models": [{"path": str(one), "weight": 0.15}, {"path": str(two), "weight": 0.85}]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert prism("merge", tmp_path / "a.yaml", f"out={tmp_path / 'y'}")[0] == 0
    first, second = (tensors(tmp_path / name) for name in ("x", "y"))
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert prism("merge", tmp_path / "a.yaml", "--dry-run")[0] == 0 and not (tmp_path / "no").exists()


def test_what_is_wrong_is_named_by_its_option_or_file(prism: Prism, models: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = models
    code, said = prism("merge")
    assert code == 2 and "--out: found no value" in said and "--model: found no value" in said
    code, said = prism("merge", "--model", one, "--model", f"{two}=1", "--out", tmp_path / "x", "--method", "karcher")
    assert code == 2 and "--method: found 'karcher'; required 'linear', 'slerp', 'task_arithmetic' or 'ties'" in said
    code, said = prism("merge", "--model", one, "--model", f"{two}=nan", "--out", tmp_path / "x")
    assert code == 2
    code, said = prism("merge", "--model", "=0.5", "--model", f"{two}=0.5", "--out", tmp_path / "x")
    assert code == 2 and "--model: found '=0.5'; required DIR=WEIGHT; no folder is named" in said
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump({"out": str(tmp_path / "x"), "models": [{"path": str(one)}, {"path": str(two), "weight": 1}]})
    )
    code, said = prism("merge", tmp_path / "a.yaml")
    assert code == 2 and f"{tmp_path / 'a.yaml'}:models.0.weight: found no value" in said
    code, said = prism("merge", tmp_path / "a.yaml", "--t", 0.5)
    assert code == 2 and "--t beside" in said
    assert not (tmp_path / "x").exists()


def test_a_folder_whose_name_ends_in_a_number_needs_no_weight(prism: Prism, models: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = models
    words = ("merge", "--out", tmp_path / "x", "--dry-run")
    assert prism(*words, "--model", one, "--model", two, "--method", "slerp", "--t", 0.5)[0] == 0
    code, said = prism(*words, "--model", one, "--model", f"{two}=1")
    assert code == 2 and f"models.0.weight: found no value; required the weight of {one}" in said


@pytest.mark.parametrize("by", ["options", "a YAML"])
def test_a_result_never_overwrites_a_models_file(prism: Prism, models: tuple[Path, Path], tmp_path: Path, by: str) -> None:
    one, two = models
    config = two / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=2))  # begins as a result does
    before = config.read_bytes()
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump({"out": str(tmp_path / "x"), "models": [{"path": str(one), "weight": 0.5}, {"path": str(two), "weight": 0.5}]})
    )
    options = ("--model", f"{one}=0.5", "--model", f"{two}=0.5", "--out", tmp_path / "x")
    code, said = prism("merge", *(options if by == "options" else [tmp_path / "a.yaml"]), "--json", config)
    assert code == 2 and "--json: found" in said and config.read_bytes() == before and not (tmp_path / "x").exists()


def test_it_can_be_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline, folder = read_pipeline(["merge", "--model", "a=0.5", "--model", "b=0.5", "--out", "c"], read_command)
    assert [stage.command[0] for stage in pipeline.stages] == ["merge"] and folder == Path("c.slurm")
    shutil.copyfile(Path(__file__).parents[3] / "configs/base/merge.yaml", "merge.yaml")
    assert read_pipeline(["merge", "merge.yaml", "out=d"], read_command)[1] == Path("d.slurm")
