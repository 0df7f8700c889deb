"""The jobs of a gang as `prism submit` sees them: each one's script, its folder, and the files by which the script knows its progress."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from megatron_prism.analysis.states import Kept
from megatron_prism.jobs import status
from tests.unit.jobs.submissions import FILTER, chain, refused, scripts, submitted, write


def newest(script: str, folder: str) -> str:
    """Return what a script takes for the newest sign of progress in a folder."""
    function = next(line for line in script.splitlines() if line.startswith("newest()"))
    done = subprocess.run(["bash", "-c", f"checkpoints=({folder})\n{function}\nnewest"], capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n")


def test_the_script_of_a_run_knows_its_checkpoints(home: Path) -> None:
    assert "checkpoints=(run/checkpoints)\n" in scripts("train", "train.yaml")[0]
    path = write("chain.yaml", chain(array=[["seed=1", "run_dir=a"], ["seed=2", "run_dir=b c"]]))
    prepare, train, _ = scripts(str(path))
    assert "checkpoints=(a/checkpoints 'b c/checkpoints')\n" in train and "checkpoints=" not in prepare


def test_reinforcement_learning_is_a_gang_as_training_is(home: Path) -> None:
    (alone,) = scripts("rl", "rl.yaml")
    assert "prism rl rl.yaml --nproc 8" in alone and "#SBATCH --nodes=2\n" in alone and "checkpoints=(rl/checkpoints)\n" in alone
    assert scripts("rl.yaml") == [alone]  # a config alone stands for the job that it loads as
    stages = [
        {"name": "train", "command": ["train", "train.yaml"]},
        {"name": "rl", "after": ["train"], "command": ["rl", "rl.yaml"]},
    ]
    found = submitted(write("chain.yaml", {"name": "all", "run_dir": "pipeline", "stages": stages}), dry_run=True)
    assert [(stage["nodes"], stage["ranks"], stage["run_dirs"]) for stage in found["stages"]] == [(2, 16, ["run"]), (2, 16, ["rl"])]
    assert "prism rl rl.yaml --nproc 8" in found["texts"][1]
    assert "rollout.temperature: found 0.5" in refused("rl", "rl.yaml", "rollout.temperature=0.5")
    assert "world_size" in refused("rl", "rl.yaml", "world_size=null")
    assert "required neither --nproc nor --" in refused("rl", "rl.yaml", "--nproc", "4")


def test_a_filter_is_a_gang_whose_progress_is_its_shards(home: Path) -> None:
    write("filter.yaml", FILTER)
    (alone,) = scripts("rl", "filter", "filter.yaml")
    assert "prism rl filter filter.yaml --nproc 8" in alone and "#SBATCH --nodes=2\n" in alone and "checkpoints=(passes/shards)\n" in alone
    assert scripts("filter.yaml") == [alone]  # a config alone stands for the job that it loads as
    found = submitted("rl", "filter", "filter.yaml")
    assert found["folder"] == "passes.slurm" and found["stages"][0]["run_dirs"] == []  # beside: a filter refuses a folder with other files
    (row,) = status.run(Path("passes"))["rows"]
    assert (row["stage"], row["job"]) == ("rl-filter", "101")
    assert "rollout.max_tokens: found 0" in refused("rl", "filter", "filter.yaml", "rollout.max_tokens=0")
    assert "world_size" in refused("rl", "filter", "filter.yaml", "world_size=null")
    Path("passes/shards").mkdir(parents=True)
    for name in ("000000.jsonl", "000001.jsonl", ".000002.jsonl.7.tmp"):
        Path(f"passes/shards/{name}").touch()
    assert newest(alone, "passes/shards") == "000001.jsonl"


def test_an_evaluation_is_a_gang_whose_progress_is_all_that_it_keeps(home: Path) -> None:
    write(
        "eval.yaml",
        {"world_size": 16, "out": "scores", "model": {"checkpoint": "ckpt"}, "tasks": {"math500": {"path": "math500.jsonl"}}},
    )
    (alone,) = scripts("evaluate", "eval.yaml")
    assert "prism evaluate eval.yaml --nproc 8" in alone and "#SBATCH --nodes=2\n" in alone
    kept = "scores/samples scores/grades scores/tasks scores/answers"  # what is graded and measured has no new samples
    assert f"checkpoints=({kept})\n" in alone
    assert scripts("eval.yaml") == [alone]
    assert submitted("evaluate", "eval.yaml")["folder"] == "scores.slurm"
    assert "model: found none" in refused("evaluate", "eval.yaml", "model.checkpoint=null")
    assert "num_rows: found 0" in refused("evaluate", "eval.yaml", "num_rows=0")
    assert "required a YAML" in refused("evaluate", "--hf", "a", "--tasks", "b")
    assert "world_size" in refused("evaluate", "eval.yaml", "world_size=null")


def test_a_run_that_only_samples_has_its_responses_as_progress(home: Path) -> None:
    """It keeps no checkpoint: two starts without a new one would have ended it."""
    (alone,) = scripts("rl", "rl.yaml", "--only", "rollout")
    assert "checkpoints=(rl/rollouts)\n" in alone and "checkpoints=(rl/rollouts)\n" in scripts("rl", "rl.yaml", "mode=rollout")[0]
    Path("rl/rollouts").mkdir(parents=True)
    for name in ("step_00000001.jsonl", "step_00000002.jsonl", "step_00000002.html", "progress.json"):
        Path(f"rl/rollouts/{name}").touch()
    assert newest(alone, "rl/rollouts") == "step_00000002.jsonl"


def test_the_options_of_a_run_are_keys_of_its_config(home: Path) -> None:
    assert "train_from" in refused("rl", "rl.yaml", "mode=train") and "train_from" in refused("rl", "rl.yaml", "--only", "train")


def test_an_analysis_of_representations_is_a_gang_whose_progress_is_its_states(home: Path) -> None:
    models = [{"name": name, "hf": name} for name in ("base", "mid")]
    write("cka.yaml", {"world_size": 16, "out": "cka", "models": models, "distributions": {"a": {"path": ["a.jsonl"]}}})
    (alone,) = scripts("analyze", "cka", "cka.yaml")
    assert "prism analyze cka cka.yaml --nproc 8" in alone and "#SBATCH --nodes=2\n" in alone and "checkpoints=(cka/states)\n" in alone
    assert submitted("analyze", "cka", "cka.yaml")["folder"] == "cka.slurm"
    assert "num_prompts: found 0" in refused("analyze", "cka", "cka.yaml", "num_prompts=0")
    kept = Kept(Path("cka"))
    for key in ("ff" * 16, "00" * 16):  # the newest by its number, whatever its key
        kept.write(key, torch.zeros(3, 2, 2), {})
    assert newest(alone, "cka/states") == f"000001_{'00' * 16}.safetensors"


def test_a_landscape_is_submitted_and_its_points_are_its_progress(home: Path) -> None:
    models = {f"{name}_model": {"hf": name} for name in ("base", "mid", "rl")}
    write("landscape.yaml", {"out": "land", "world_size": 16, "tasks": {"a": {"set": "file", "path": "a.jsonl"}}, **models})
    (alone,) = scripts("analyze", "landscape", "landscape.yaml")
    assert "prism analyze landscape landscape.yaml --nproc 8" in alone and "checkpoints=(land/scores)\n" in alone
    assert "rl_model: found none" in refused("analyze", "landscape", "landscape.yaml", "rl_model.hf=null")
