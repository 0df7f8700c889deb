"""`prism plan` as a shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_prism.core.config import TrainConfig
from megatron_prism.core.load import load

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "configs" / "recipes" / "llama-3.1-8b" / "midtrain.yaml"
KEYS = {
    "flops_per_token_causal",
    "flops_per_token_full",
    "tokens_per_s_per_gpu",
    "memory_gib_per_gpu_max",
    "fits",
    "gpu_hours",
    "mfu_causal",
    "mfu_full",
    "step_s",
    "usd",
    "usd_per_gpu_hour_assumed",
    "checkpoint_gib",
    "checkpoint_save_s",
    "parameters_per_rank_max",
    "stages",
}


def plan(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_prism.cli", "plan", *map(str, arguments), "--json", "plan.json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


def test_a_plan_needs_no_checkpoint_and_writes_nothing_but_its_json(tmp_path: Path) -> None:
    done = plan(tmp_path, RECIPE, "--gpus", 8, "--usd-per-gpu-hour", 3)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found.keys() >= KEYS and found["fits"] is True and found["world_size"] == 8
    assert found["usd"] == pytest.approx(3 * found["gpu_hours"])
    assert found["parameters"] == 8_030_261_248 and found["layout"]["tp"] == 2
    lines = done.stdout.splitlines()
    assert (
        "parameters: 8,030,261,248" in lines
        and "fits: True" in lines
        and any(line.startswith("  stage 0  layers attention 32") for line in lines)
    )


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(tmp_path: Path) -> None:
    changes = ["parallel.tp=1", "parallel.sequence_parallel=false", "parallel.cp=2"]
    done = plan(tmp_path, RECIPE, "--gpus", 8, *changes)
    assert done.returncode == 2
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False
    problem = done.stderr.splitlines()[-1]  # Megatron-Core 0.19 has warnings of its own before it
    nearest = problem.partition("the nearest that fits: ")[2].split()
    assert "GiB on pipeline stage 0" in problem and nearest
    assert plan(tmp_path, RECIPE, "--gpus", 8, *changes, *nearest).returncode == 0
    larger = plan(tmp_path, RECIPE, "--gpus", 8, "--gpu", "h200", *changes)
    assert larger.returncode == 0 and "gpu: h200" in larger.stdout.splitlines(), larger.stderr


def test_a_sweep_ranks_what_fits_on_any_number_of_gpus(tmp_path: Path) -> None:
    done = plan(tmp_path, RECIPE, "--gpus", 16, "--sweep")  # no layout of the recipe is for 16
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    rates = [entry["tokens_per_s_per_gpu"] for entry in found["layouts"]]
    assert len(rates) > 20 and rates == sorted(rates, key=lambda rate: -round(rate))
    assert max(entry["memory_gib_per_gpu_max"] for entry in found["layouts"]) <= found["memory_gib_available"]
    assert all(entry["tp"] * entry["pp"] * entry["cp"] * entry["dp"] == 16 for entry in found["layouts"])


@pytest.mark.parametrize(("recipe", "gpus"), [("midtrain", 16), ("longctx", 8)])  # without a layout of that size, and with one unlike 64's
def test_a_sweeps_overrides_give_its_layouts_at_that_size(recipe: str, gpus: int, tmp_path: Path) -> None:
    path = RECIPE.with_name(f"{recipe}.yaml")
    assert plan(tmp_path, path, "--gpus", gpus, "--sweep").returncode == 0
    for entry in json.loads((tmp_path / "plan.json").read_text())["layouts"]:
        config = load(path, TrainConfig, [f"world_size={gpus}", f"layouts.{gpus}={{}}", *entry["overrides"]])
        grid = config.parallel
        assert (grid.tp, grid.pp, grid.cp, config.batch.micro_size) == (entry["tp"], entry["pp"], entry["cp"], entry["micro_size"])
        assert grid.sequence_parallel == (grid.tp > 1)


def test_a_model_too_large_for_the_gpus_is_said_to_be(tmp_path: Path) -> None:
    large = ROOT / "configs" / "recipes" / "mistral-small-24b" / "midtrain.yaml"
    one = plan(tmp_path, large, "--gpus", 1, "--sweep")
    assert one.returncode == 2 and "no valid layout of 1 GPUs fits" in one.stderr, one.stderr
    other = plan(tmp_path, large, "--gpus", 32)
    assert other.returncode == 2 and "one of the sizes that layouts has: 8, 64, 128" in other.stderr


def test_a_config_that_cannot_train_cannot_be_planned(tmp_path: Path) -> None:
    values = {"run_dir": "r", "steps": 1, "data": {"prepared": "d", "seq_length": 64}, "batch": {"global_size": 3}, "parallel": {"tp": 3}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    done = plan(tmp_path, tmp_path / "c.yaml")
    assert done.returncode == 2 and "neither model nor init.checkpoint" in done.stderr
    swept = plan(tmp_path, tmp_path / "c.yaml", "--sweep")
    assert swept.returncode == 2 and "neither model nor init.checkpoint" in swept.stderr


def test_a_config_of_another_job_is_told_and_not_taken_for_one_of_a_run(tmp_path: Path) -> None:
    for name, job in (("mixtures/math", "prepare"), ("studies/tiny", "study")):
        done = plan(tmp_path, ROOT / "configs" / f"{name}.yaml", "--gpus", 8)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"found a config of prism {job}; required one of train, rl, rl filter, evaluate" in done.stderr


def test_an_rl_config_is_planned_with_its_rollout(tmp_path: Path) -> None:
    recipe = RECIPE.with_name("rl.yaml")
    done = plan(tmp_path, recipe, "--gpus", 8, "--response-tokens", 2000)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["step_s"] == pytest.approx(found["rollout_s"] + found["log_probs_s"] + found["training_s"])
    assert found["response_tokens_assumed"] == 2000 and found["hours"] < found["hours_longest"]
    assert found["responses"] == 1_024_000 and found["layout"]["num_rows"] == 128
    assert {"reference_gib", "cache_gib"} <= found["stages"][0].keys() and any("cache_gib" in line for line in done.stdout.splitlines())
    large = plan(tmp_path, recipe, "--gpus", 8, "rollout.num_rows=512")
    assert large.returncode == 2 and "the nearest that fits: rollout.num_rows=" in large.stderr, large.stderr
    assert "parallel.cp: found 2" in plan(tmp_path, recipe, "--gpus", 8, "parallel.tp=4", "parallel.cp=2").stderr


def test_an_evaluation_is_planned_within_the_models_context(tmp_path: Path) -> None:
    """A context shorter than the assumed prompt made responses of fewer than no tokens, and hours below 0."""
    model = yaml.safe_load((ROOT / "configs" / "models" / "llama-3.1-8b.yaml").read_text())
    model["model"] |= {"max_position_embeddings": 1024, "rope_scaling": None}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    task = {"out": "out", "model": {"checkpoint": "none"}, "tasks": {"math500": {}, "ruler": {"ruler": {"lengths": [512]}}}}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(task))
    done = plan(tmp_path, "eval.yaml", "--model", "model.yaml")
    assert done.returncode == 0, done.stderr
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["parts"]["math500"]["response_tokens_assumed"] == 512 * 0.25 and 0 < planned["hours"] < planned["hours_longest"]
    refused = plan(tmp_path, "eval.yaml", "--model", "model.yaml", "tasks.ruler.ruler.lengths=[64, 512, 8192]")
    assert refused.returncode == 2 and "found 64; required over 100" in refused.stderr and "found 8192; required" in refused.stderr
    absent = plan(tmp_path, "eval.yaml").stderr
    assert (
        "none: found no such folder" in absent and "--model configs/models/NAME.yaml" in absent
    )  # the control: no recipe, and so no model of its own
    for name, file in (("recipes/toy", "eval.yaml"), ("models", "toy.yaml")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / ("eval.yaml" if name != "models" else "model.yaml")).rename(tmp_path / name / file)
    of_recipe = plan(tmp_path, "recipes/toy/eval.yaml")
    assert of_recipe.returncode == 0 and json.loads((tmp_path / "plan.json").read_text())["hours"] == planned["hours"], of_recipe.stderr
