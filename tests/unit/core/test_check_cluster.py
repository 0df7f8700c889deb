"""What a cluster and a pipeline may not say: every problem at once, each with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.check.cluster import check_cluster, check_pipeline, order, seconds
from megatron_prism.core.config import ClusterConfig, ContainerConfig, CpuConfig, JobConfig, PipelineConfig
from megatron_prism.core.load import load

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_clusters_hold(path: Path) -> None:
    assert check_cluster(load(path, ClusterConfig)) == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"gpus_per_node": 0}, "gpus_per_node"),
        ({"processes_per_node": 2}, "gpus_per_node"),
        ({"gpus_per_node": -1, "processes_per_node": 1}, "gpus_per_node"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"signal_before_s": 0}, "signal_before_s"),
        ({"signal_before_s": 70000}, "signal_before_s"),
        ({"cpus_per_task": 0}, "cpus_per_task"),
        ({"cpu": CpuConfig(cpus_per_task=0)}, "cpu.cpus_per_task"),
        ({"time_limit": "1 day"}, "time_limit"),
        ({"cpu": CpuConfig(time_limit="")}, "cpu.time_limit"),
        ({"time_limit": "00:05:00"}, "time_limit"),
        ({"time_limit": "24:00:00", "signal_before_s": 300, "cpu": CpuConfig(time_limit="5")}, "cpu.time_limit"),
        ({"time_limit": "0-1", "signal_before_s": 3600}, "time_limit"),
        ({"sbatch": ("-C h100",)}, "sbatch.0"),
        ({"sbatch": ("--constraint=h100", "--nodes=4")}, "sbatch.1"),
        ({"sbatch": ("--no-requeue",)}, "sbatch.0"),
        ({"setup": ((),)}, "setup.0"),
        ({"venv": Path("a"), "container": ContainerConfig(image="b")}, "venv"),
        ({"container": ContainerConfig(image="b", mounts=("/a",))}, "container.mounts.0"),
        ({"container": ContainerConfig(image="b", mounts=("/a:/a,/b:/b",))}, "container.mounts.0"),
        ({"container": ContainerConfig(image="b", mounts=("/home/a/data:~/data",))}, "container.mounts.0"),
        ({"environment": {"A B": "1"}}, "environment"),
        ({"environment": {"A=$(b)": "1"}}, "environment"),
    ],
)
def test_a_wrong_cluster_is_named(changes: dict[str, Any], where: str) -> None:
    assert [problem.where for problem in check_cluster(ClusterConfig(**({"gpus_per_node": 8} | changes)))] == [where]


@pytest.mark.parametrize(
    ("limit", "limit_s"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("24:00:00", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_time_limits_as_slurm_reads_them(limit: str, limit_s: int | None) -> None:
    assert seconds(limit) == limit_s


def stage(name: str, *after: str, **more: Any) -> JobConfig:
    return JobConfig(**({"name": name, "command": ("prepare", "a.yaml"), "after": after} | more))


def pipeline(*stages: JobConfig, **more: Any) -> PipelineConfig:
    return PipelineConfig(**({"name": "p", "run_dir": Path("runs/p"), "stages": stages} | more))


def test_stages_come_behind_what_they_wait_for() -> None:
    made = pipeline(stage("export", "train"), stage("train", "prepare", "import"), stage("prepare"), stage("import"))
    assert check_pipeline(made) == []
    names = order(made)
    assert sorted(names) == ["export", "import", "prepare", "train"] and names[2:] == ["train", "export"]


def test_all_that_is_wrong_with_a_pipeline_is_said_at_once() -> None:
    made = pipeline(
        stage("a", "b"),
        stage("b", "a"),
        stage("a"),
        stage("c", "none"),
        stage("d e", command=()),
        stage("f", command=("x", "\0")),
        run_dir=Path("a\nb"),
    )
    assert [(problem.where, problem.found) for problem in check_pipeline(made)] == [
        ("stages.4.name", "'d e'"),
        ("run_dir", "'a\\nb'"),
        ("stages.2.name", "'a'"),
        ("stages.3.after", "'none'"),
        ("stages.4.command", "no words"),
        ("stages.5.command", "a text with a NUL or half a character"),
    ]


def test_a_cycle_is_named() -> None:
    (problem,) = check_pipeline(pipeline(stage("a", "c"), stage("b", "a"), stage("c", "b")))
    assert problem.where == "stages" and {"a", "b", "c"} <= set(problem.found.replace("<-", " ").split())


def test_no_stages_is_a_problem() -> None:
    assert [problem.where for problem in check_pipeline(pipeline(name="a b"))] == ["name", "stages"]
