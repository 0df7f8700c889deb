"""Gangs told from the environment: torchrun's, srun's, or none."""

from __future__ import annotations

import os

import pytest

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.parallel import launch

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take this process out of any gang, and put the environment back afterwards."""
    for name in [*TORCHRUN, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what adopt_slurm sets is undone too
        monkeypatch.delenv(name)
    return monkeypatch


def srun(environment: pytest.MonkeyPatch, **more: str) -> None:
    task = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "40017", "SLURM_STEP_NODELIST": "gpu[007-008]"}
    for name, value in (task | more).items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu7", "gpu7"), ("gpu[007-009,12],login", "gpu007"), ("gpu[12,14]", "gpu12"), ("a1,b2", "a1"), ("rack-1-n[3-4]", "rack-1-n3"),
     ("n1.cluster.org,n2", "n1.cluster.org"), ("127.0.0.1", "127.0.0.1"), ("r[1-2]n[3-4]", "r1n3"), ("n[1-2]-ib", "n1-ib")],
)  # fmt: skip
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert launch.first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "[1-2]", ",a"])
def test_a_node_list_without_a_host_is_refused(nodelist: str) -> None:
    with pytest.raises(EnvironmentFault, match="node list"):
        launch.first_host(nodelist)


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4", "RANK": "2"}, 4),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "8"}, None),  # an allocation's shell, not a task
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
)
def test_gang_and_its_size(environment: pytest.MonkeyPatch, variables: dict[str, str], size: int | None) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert (launch.in_gang(), launch.world_size()) == (size is not None, size or 1)


def test_a_slurm_task_gets_torchruns_variables(environment: pytest.MonkeyPatch) -> None:
    srun(environment)
    launch.adopt_slurm()
    assert {name: os.environ[name] for name in TORCHRUN} == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007", "MASTER_PORT": "20017",
    }  # fmt: skip
    assert (launch.in_gang(), launch.world_size()) == (True, 16)


def test_what_is_set_already_stays(environment: pytest.MonkeyPatch) -> None:
    srun(environment, MASTER_ADDR="head", MASTER_PORT="5")
    launch.adopt_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]) == ("head", "5", "9")
    environment.setenv("RANK", "3")
    launch.adopt_slurm()
    assert os.environ["RANK"] == "3"  # now a torchrun task


def test_without_slurm_nothing_is_set(environment: pytest.MonkeyPatch) -> None:
    launch.adopt_slurm()
    assert not [name for name in TORCHRUN if name in os.environ]
