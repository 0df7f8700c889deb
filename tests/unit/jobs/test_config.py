"""`prism config`: what it prints, and that docs/CONFIG.md is of today."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from megatron_prism import cli
from megatron_prism.core.errors import InputError
from megatron_prism.jobs import config

ROOT = Path(__file__).resolve().parents[3]


def key(job: str, name: str) -> dict[str, Any]:
    (found,) = [key for section in config.run(job)["sections"] for key in section["keys"] if key["key"] == name]
    return found


def test_a_key_says_all_that_stands_in_its_file() -> None:
    lr, micro, sources = key("train", "optimizer.lr"), key("train", "batch.micro_size"), key("prepare", "sources")
    assert lr.pop("words").startswith("The learning rate")
    assert lr == {
        "key": "optimizer.lr",
        "type": "number",
        "bounds": "0 or more",
        "default": 5e-5,
        "is_required": False,
        "may_change": False,
    }
    assert micro["may_change"] and key("train", "save.interval")["may_change"] and not key("train", "data.seq_length")["may_change"]
    assert sources["is_required"] and "default" not in sources and sources["type"] == "list of section"
    assert key("train", "fp8")["default"] is None and "default" not in key("train", "optimizer")
    assert key("train", "data.weights")["type"] == "mapping to number (more than 0) or null"


def test_a_section_comes_once_with_all_its_places() -> None:
    sections = config.run("prepare")["sections"]
    assert ["sources.N.parts.N", "decontaminate.against.N"] in [section["places"] for section in sections]
    places = [place for section in sections for place in section["places"]]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("job", config.JOBS)
def test_the_command_prints_keys_and_schema(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    for more in ([], ["--schema"]):
        monkeypatch.setattr("sys.argv", ["prism", "config", job, *more, "--json", str(file)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr().out
        assert not end.value.code
        if more:
            assert json.loads(printed) == json.loads(file.read_text()) == config.schema(job)
        else:
            assert json.loads(file.read_text()) == config.run(job)
            names = [key["key"] for section in config.run(job)["sections"] for key in section["keys"]]
            assert all(f"\n    {name} " in printed for name in names)


def test_another_job_is_refused() -> None:
    with pytest.raises(InputError, match="JOB: found 'grade'; required one of train, "):
        config.run("grade")


def test_the_document_is_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    table = runpy.run_path(str(ROOT / "tools" / "config_table.py"))["table"]()
    assert f"\n{table}\n<!-- end -->" in (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8"), "run tools/config_table.py again"
