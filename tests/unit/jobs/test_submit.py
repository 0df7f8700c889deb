"""What is submitted: a job or a pipeline, with resources from its own config, once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism.cli.submit import read_command
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.jobs import status, submit
from megatron_prism.launch import slurm
from tests.unit.eval import two_evaluations as evaluations
from tests.unit.jobs.submissions import ROOT, TRAIN, chain, refused, scripts, stub, submitted, write


def test_resources_follow_from_the_config(home: Path) -> None:
    (script,) = scripts("train", "train.yaml")
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gres=gpu:8\n" in script
    assert "    prism train train.yaml --nproc 8 &\n" in script
    (script,) = scripts("train", "train.yaml", "world_size=4", "steps=20")
    assert "#SBATCH --nodes=1\n" in script and "#SBATCH --gres=gpu:4\n" in script
    assert "    prism train train.yaml world_size=4 steps=20 --nproc 4 &\n" in script
    assert not (home / "run").exists()


def test_the_config_says_more_than_the_cluster_and_the_cluster_more_than_what_follows(home: Path) -> None:
    (script,) = scripts("train", "train.yaml")
    assert (
        "export NCCL_DEBUG=INFO\n" in script
        and "export NCCL_NVLS_ENABLE=1\n" in script
        and "export CUDA_DEVICE_MAX_CONNECTIONS=1\n" in script
    )


def test_a_layout_of_the_recipe_is_taken(home: Path) -> None:
    write("train.yaml", {**TRAIN, "layouts": {8: {"parallel": {"tp": 1}}, 16: {"parallel": {"tp": 4, "pp": 2}}}})
    assert "NCCL_P2P_NET_CHUNKSIZE" in scripts("train", "train.yaml")[0]
    assert "NCCL_P2P_NET_CHUNKSIZE" not in scripts("train", "train.yaml", "world_size=8")[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.time_limit=5"], "time_limit: found '5', 300 s; required more than signal_before_s, 300 s; raise it, or lower"),
        (["world_size=null"], "world_size: found no value; required how many GPUs"),
        (["world_size=12"], "world_size: found 12; required a multiple of the 8 ranks of a node"),
        (["world_size=0"], "world_size: found 0"),
        (["parallel.tp=3"], "found tp 3 x pp 1 x cp 1 = 3; required a divisor of the world size 16"),
        (["cluster.gpus_per_node=0"], "gpus_per_node: found gpus_per_node 0"),
        (["cluster.partitoin=a"], "did you mean 'partition'?"),
        (['environment={"NCCL_A B": c}'], "environment.NCCL_A B: found a name of another kind"),
    ],
)
def test_a_config_without_a_place_on_the_cluster_is_refused(home: Path, overrides: list[str], said: str) -> None:
    assert (
        said in refused(*overrides, "train", "train.yaml")
        if overrides[0].startswith("cluster.")
        else refused("train", "train.yaml", *overrides)
    )


def test_a_cluster_of_cpus_has_a_rank_a_process(home: Path) -> None:
    (script,) = scripts("cluster.gpus_per_node=0", "cluster.processes_per_node=4", "train", "train.yaml")
    assert "#SBATCH --nodes=4\n" in script and "--nproc 4 &\n" in script and "--gres" not in script


def test_a_mixture_is_prepared_without_a_gang(home: Path) -> None:
    (script,) = scripts("prepare", "mixture.yaml", "seed=2")
    assert (
        "    prism prepare mixture.yaml seed=2 &\n" in script and "gres" not in script and "--output=data.slurm/prepare.%j.out\n" in script
    )


def test_a_mixture_in_tasks_is_an_array_and_the_job_that_finishes_it(home: Path) -> None:
    array, last = scripts("cluster.cpu.prepare_tasks=3", "prepare", "mixture.yaml", "seed=2")
    assert (
        "#SBATCH --array=0,1,2\n" in array
        and "2) words=(--task 2/3) ;;" in array
        and 'prism prepare mixture.yaml seed=2 "${words[@]}" &' in array
    )
    assert "--array" not in last and "    prism prepare mixture.yaml seed=2 &\n" in last
    words = ["prepare", "mixture.yaml", "seed=2"]
    assert submit.run(words, Path("cluster.yaml"), True, read_command, num_tasks=3)["texts"] == [array, last]
    assert len(submit.run(["cluster.cpu.prepare_tasks=3", *words], Path("cluster.yaml"), True, read_command, num_tasks=1)["texts"]) == 1
    assert len(scripts("cluster.cpu.prepare_tasks=3", *words, "--task", "0/9")) == 1, "one task, by hand"
    told = submitted("cluster.cpu.prepare_tasks=3", *words)
    assert [(stage["name"], stage["job"]) for stage in told["stages"]] == [("prepare-tasks", "101"), ("prepare", "102")]
    assert Path("sbatch.calls").read_text().splitlines()[1].startswith("--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes")


JOBS = [  # what the command is, the stage's name, and where the submission is kept
    (["train", "train.yaml", "steps=20", "--json", "later/plan.json"], "train", "run/slurm"),
    (["prepare", "mixture.yaml", "--report"], "prepare", "data.slurm"),
    (["convert", "import", "--hf", "hf/a", "--out", "ckpt/a"], "convert-import", "ckpt/a.slurm"),
    (["convert", "export", "--ckpt", "run", "--out", "."], "convert-export", ".slurm"),
    (["convert", "verify", "--hf", "hf/a", "--ckpt", "run", "--tp", "2"], "convert-verify", "convert-verify.slurm"),
    (["generate", "--ckpt", "run", "--prompt", "cluster.a=b --x"], "generate", "generate.slurm"),
    (["doctor"], "doctor", "doctor.slurm"),
]


@pytest.mark.parametrize(("words", "name", "folder"), JOBS, ids=[name for _, name, _ in JOBS])
def test_a_job_is_read_as_the_command_of_a_stage(home: Path, words: list[str], name: str, folder: str) -> None:
    (alone,) = scripts("cluster.partition=long", *words)
    assert f"    prism {shlex.join(words)}" in alone and f"#SBATCH --output={folder}/{name}.%j.out\n" in alone
    assert "#SBATCH --partition=long\n" in alone and ("--nproc 8" in alone) == (name == "train")
    title = alone.split("--job-name=")[1].split("\n")[0]
    write("chain.yaml", {"name": title, "run_dir": "a", "stages": [{"name": name, "command": words}]})
    assert scripts("chain.yaml", "cluster.partition=long") == [alone.replace(f"{folder}/", "a/slurm/")]
    assert submitted(*words)["folder"] == folder and Path(folder, f"{name}.sbatch").is_file()


@pytest.mark.parametrize("key", ["venv", "container.image"])
def test_an_environment_that_is_not_there_is_warned_of(key: str, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = home / "env"
    assert scripts(f"cluster.{key}={place}", "train", "train.yaml")
    assert f"{key}: {place}" in caplog.text and "is not on this machine" in caplog.text
    caplog.clear()
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "activate").touch()
    assert scripts(f"cluster.{key}={place}", "train", "train.yaml") and not caplog.text
    assert scripts("cluster.container.image=nvcr.io#nvidia/pytorch:26.06-py3", "train", "train.yaml") and not caplog.text


def test_a_config_alone_stands_for_the_job_that_it_loads_as(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "prism"):
        assert scripts("train.yaml", "cluster.partition=long", "steps=20") == scripts(
            "cluster.partition=long", "train", "train.yaml", "steps=20"
        )
    assert "train.yaml is no pipeline; in full: prism submit --cluster cluster.yaml -- train train.yaml steps=20" in caplog.text
    assert scripts("mixture.yaml") == scripts("prepare", "mixture.yaml")
    assert "override:stepz: found an unknown key" in refused("train.yaml", "stepz=1")
    assert "override:worker: found an unknown key" in refused("mixture.yaml", "worker=1")
    assert "override:rundir: found an unknown key" in refused(str(write("chain.yaml", chain())), "rundir=a")
    study = write("study.yaml", {"name": "a", "run_dir": "a", "num_parallel": 2, "stages": [{"name": "one", "command": ["doctor"]}]})
    assert "study.yaml: found a config of prism study" in refused(str(study))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "train.yaml"], "trian: found no such file, and no job of prism"),
        (["cluster.partition=long"], "command: found cluster.partition=long; required a pipeline's YAML, or -- and a job"),
        (["convert", "exprt"], "convert with one of import, export, verify"),
        (["convert", "export", "--ckpt", "run"], "Missing option '--out'"),
        (["train", "train.yaml", "--lr", "1"], "No such option: --lr"),
        (["train", "train.yaml", "--nproc", "4"], "required neither --nproc nor --"),
        (["train", "train.yaml", "--", "steps=20"], "required neither --nproc nor --"),
        (["train", "absent.yaml"], "absent.yaml: found no such file"),
    ],
    ids=" ".join,
)
def test_a_command_that_the_job_would_refuse_is_refused(home: Path, words: list[str], said: str) -> None:
    assert said in refused(*words)


def test_a_pipeline_is_submitted_in_order_once(home: Path) -> None:
    path = write("chain.yaml", chain())
    told = submitted(path)
    assert [(stage["name"], stage["job"], stage["nodes"]) for stage in told["stages"]] == [
        ("prepare", "101", 1),
        ("train", "102", 2),
        ("export", "103", 1),
    ]
    wait = "--kill-on-invalid-dep=yes --"
    assert Path("sbatch.calls").read_text().splitlines() == [
        "--parsable -- pipeline/slurm/prepare.sbatch",
        f"--parsable --dependency=afterok:101 {wait} pipeline/slurm/train.sbatch",
        f"--parsable --dependency=afterok:102 {wait} pipeline/slurm/export.sbatch",
    ]
    Path("squeue.says").write_text("103|PENDING|Dependency\n")
    with pytest.raises(InputError, match="job 103 \\(export\\); required no job of this run"):
        submitted(path)
    Path("squeue.says").unlink()
    Path("pipeline/slurm/prepare.events").write_text("2026-01-01T00:00:00Z 101 start 0 on a\n2026-01-01T00:00:01Z 101 done\n")
    Path("pipeline/slurm/train.events").write_text("2026-01-01T00:00:00Z 102 stopped: exit code 2, the input is wrong\n")
    told = submitted(path)
    assert [(stage["name"], stage["job"], stage["done_before"]) for stage in told["stages"]] == [
        ("prepare", "101", True),
        ("train", "104", False),
        ("export", "105", False),
    ]
    assert Path("sbatch.calls").read_text().splitlines()[3:] == [
        "--parsable -- pipeline/slurm/train.sbatch",
        f"--parsable --dependency=afterok:104 {wait} pipeline/slurm/export.sbatch",
    ]
    Path("pipeline/slurm/train.events").write_text("2026-01-01T00:00:00Z 104 done\n")
    values = chain()
    values["stages"][1]["command"].append("seed=3")
    told = submitted(write("chain.yaml", values))
    assert [stage["done_before"] for stage in told["stages"]] == [False] * 3, "training is behind data that is prepared anew"


def test_a_retention_gate_stops_what_waits_for_it(home: Path) -> None:
    """The gate's script runs the real command; an srun that only strips its options stands in for Slurm's."""
    evaluations.write(home / "base", evaluations.scores("math500", [1.0] * 60))
    evaluations.write(home / "same", evaluations.scores("math500", [1.0] * 60))
    evaluations.write(home / "worse", evaluations.scores("math500", [1.0] * 30 + [0.0] * 30))
    write("policy.yaml", {"max_drop": {"math500": 0.1}})
    values = chain()
    gate = ["evaluate", "compare", "evaluation", "--against", "base", "--policy", "policy.yaml", "--out", "verdict"]
    values["stages"][2]["after"] = ["gate"]
    values["stages"].append({"name": "gate", "after": ["train"], "command": gate})
    told = submitted(write("chain.yaml", values))
    assert [(stage["name"], stage["job"]) for stage in told["stages"]] == [
        ("prepare", "101"),
        ("train", "102"),
        ("gate", "103"),
        ("export", "104"),
    ]
    wait = "--kill-on-invalid-dep=yes --"
    assert Path("sbatch.calls").read_text().splitlines()[2:] == [
        f"--parsable --dependency=afterok:102 {wait} pipeline/slurm/gate.sbatch",
        f"--parsable --dependency=afterok:103 {wait} pipeline/slurm/export.sbatch",
    ]
    stub(home, "srun", f'while [ "$1" != prism ]; do shift; done; shift; SLURM_PROCID=0 exec {sys.executable} -m megatron_prism.cli "$@"')
    environment = {**os.environ, "SLURM_JOB_ID": "103", "SLURM_JOB_NODELIST": "a", "PYTHONPATH": str(ROOT)}
    for folder, code, event in (("worse", 1, "stopped: exit code 1, the result is a failure"), ("same", 0, "done")):
        Path("evaluation").unlink(missing_ok=True)
        Path("evaluation").symlink_to(folder)
        done = subprocess.run(["bash", "pipeline/slurm/gate.sbatch"], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert Path("pipeline/slurm/gate.events").read_text().splitlines()[-1].endswith(event)
        assert json.loads(Path("verdict/verdict.json").read_text())["decision"] == ("NO-GO" if code else "GO")


def test_an_array_of_runs(home: Path) -> None:
    path = write("chain.yaml", chain(array=[["seed=1", "run_dir=a"], ["seed=2", "run_dir=b c"]]))
    script = scripts(str(path))[1]
    assert (
        "#SBATCH --array=0,1\n" in script
        and "1) words=(seed=2 'run_dir=b c') ;;\n" in script
        and 'train train.yaml "${words[@]}" --nproc 8' in script
    )
    for wrong, said in (
        (["seed=2"], "share a run_dir"),
        (["run_dir=b", "world_size=8"], "differ in world_size"),
        (["run_dir=b", "--x"], "No such option: --x"),
    ):
        write("chain.yaml", chain(array=[["run_dir=a", "seed=1"], wrong] if wrong[0] != "seed=2" else [["seed=1"], wrong]))
        assert said in refused("chain.yaml")


def test_of_an_array_only_what_is_not_done_is_submitted_again(home: Path) -> None:
    path = write("chain.yaml", chain(array=[["seed=1", "run_dir=a"], ["seed=2", "run_dir=b"]]))
    submitted(path)
    Path("pipeline/slurm/prepare.events").write_text("2026-01-01T00:00:01Z 101 done\n")
    Path("pipeline/slurm/train_0.events").write_text("2026-01-01T00:00:01Z 110 done\n")
    Path("pipeline/slurm/train_1.events").write_text("2026-01-01T00:00:01Z 111 stopped: exit code 1, the result is a failure\n")
    submitted(path)
    assert "#SBATCH --array=1\n" in Path("pipeline/slurm/train.sbatch").read_text()
    assert Path("pipeline/slurm/train_0.events").exists() and not Path("pipeline/slurm/train_1.events").exists()
    assert [row["stage"] for row in status.run(Path("pipeline"))["rows"]] == ["prepare", "train[0]", "train[1]", "export"]


def test_of_an_array_that_grew_or_changed_only_the_new_elements_are_submitted(home: Path) -> None:
    submitted(write("chain.yaml", chain(array=[["seed=1", "run_dir=a"], ["seed=2", "run_dir=b"]])))
    for name in ("prepare", "train_0", "train_1"):
        Path(f"pipeline/slurm/{name}.events").write_text("2026-01-01T00:00:01Z 110 done\n")
    submitted(write("chain.yaml", chain(array=[["seed=1", "run_dir=a"], ["seed=3", "run_dir=b"], ["seed=4", "run_dir=c"]])))
    assert "#SBATCH --array=1,2\n" in Path("pipeline/slurm/train.sbatch").read_text()
    assert Path("pipeline/slurm/train_0.events").exists() and not Path("pipeline/slurm/train_1.events").exists()


def test_a_stage_named_as_an_arrays_element_is_refused(home: Path) -> None:
    """Their scripts would write to one file of events."""
    values = chain(array=[["seed=1", "run_dir=a"], ["seed=2", "run_dir=b"]])
    values["stages"].append({"name": "train_1", "command": ["train", "train.yaml", "run_dir=c"]})
    assert "'train_1', as an element of train is named" in refused(str(write("chain.yaml", values)))
    values["stages"][-1]["name"] = "train_2"
    assert submitted(write("chain.yaml", values), dry_run=True)["stages"]


def test_the_problems_of_all_stages_are_said_at_once(home: Path) -> None:
    values = chain()
    values["stages"] += [
        {"name": "more", "command": ["train", "train.yaml", "world_size=12"]},
        {"name": "again", "command": ["train", "none.yaml"]},
    ]
    values["stages"][0]["command"] = ["train", "train.yaml", "stepz=2", "parallel.tp=x"]
    said = refused(str(write("chain.yaml", values)))
    assert "stage train: override:stepz" in said and "stage more: override:world_size" in said and "stage again: none.yaml" in said


def test_a_squeue_that_does_not_answer_lets_nothing_be_submitted_or_deleted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "PAUSES_S", (0.0,))
    submitted("train", "train.yaml")
    Path("run/slurm/train.events").write_text("T1 101 start 0 on a\n")
    stub(home, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(EnvironmentFault, match="squeue does not answer"):
        submitted("train", "train.yaml")
    assert len(Path("sbatch.calls").read_text().splitlines()) == 1 and Path("run/slurm/train.events").exists()
    (row,) = status.run(Path("run"))["rows"]
    assert (row["state"], row["last_event"]) == ("unknown", "T1 start 0 on a")


def test_without_slurm_nothing_is_submitted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home / "nothing"))
    with pytest.raises(EnvironmentFault, match="sbatch is not here"):
        submitted("train", "train.yaml")


def test_what_sbatch_refuses_is_said(home: Path) -> None:
    stub(home, "sbatch", "echo 'sbatch: error: invalid account' >&2; exit 1")
    with pytest.raises(EnvironmentFault, match="sbatch refuses run/slurm/train.sbatch: sbatch: error: invalid account"):
        submitted("train", "train.yaml")
