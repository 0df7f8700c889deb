"""What is submitted of the configs and examples that come with the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism.core.config import MixConfig, PromptsConfig, RLConfig
from megatron_prism.core.load import load
from tests.unit.jobs.submissions import ROOT, submitted


def test_the_examples_are_what_submit_makes_today() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "tools/make_examples.py", "--check"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pipeline_of_configs_is_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = Path("configs/pipelines/llama-3.1-8b.yaml")
    found = submitted(path, dry_run=True, cluster="configs/clusters/h100_pyxis.yaml")["stages"]
    assert [(stage["name"], stage["nodes"], stage["ranks"]) for stage in found] == [
        ("import", 1, 1),
        ("prepare", 1, 1),
        ("midtrain", 8, 64),
        ("export", 1, 1),
    ]
    assert "\n".join(path.read_text().splitlines()[5:]) in Path("docs/CLUSTER.md").read_text()


def test_the_pipeline_of_reinforcement_learning_reads_what_the_stage_before_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = submitted("configs/pipelines/llama-3.1-8b-rl.yaml", dry_run=True, cluster="configs/clusters/h100_pyxis.yaml")["stages"]
    assert [(stage["name"], stage["nodes"], stage["ranks"]) for stage in found] == [
        ("prompts", 1, 1),
        ("filter", 8, 64),
        ("mix", 1, 1),
        ("rl", 8, 64),
        ("export", 1, 1),
    ]
    prompts, filtered, mix, _, _ = found
    made = [load(Path(words[0]), PromptsConfig).out for words in prompts["array"]]
    read = [Path(words[0].removeprefix("prompts=")) for words in filtered["array"]]
    mixed = load(Path(mix["command"][-1]), MixConfig)
    assert made == read == [one.prompts for one in mixed.sets]
    assert [Path(words[1].removeprefix("out=")) for words in filtered["array"]] == [one.passes for one in mixed.sets]
    assert load(Path("configs/recipes/llama-3.1-8b/rl.yaml"), RLConfig).prompts == mixed.out


def test_a_notice_shorter_than_a_planned_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    recipe, cluster = "configs/recipes/mistral-small-24b/rl.yaml", "configs/clusters/h100_venv.yaml"
    submitted("rl", recipe, dry_run=True, cluster=cluster)
    assert "notice" not in caplog.text
    submitted("cluster.signal_before_s=300", "rl", recipe, dry_run=True, cluster=cluster)
    assert "stage rl: a step whose responses are full" in caplog.text and "cluster.signal_before_s=600 is enough" in caplog.text
    caplog.clear()
    small = recipe.replace("mistral-small-24b", "granite-4.0-micro")
    stages = [{"name": name, "command": ["rl", path]} for name, path in (("large", recipe), ("small", small))]
    (tmp_path / "two.yaml").write_text(json.dumps({"name": "two", "run_dir": str(tmp_path / "two"), "stages": stages}))
    submitted(str(tmp_path / "two.yaml"), "cluster.signal_before_s=300", dry_run=True, cluster=cluster)
    assert "stage large: a step" in caplog.text and "stage small" not in caplog.text
