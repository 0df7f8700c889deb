"""Gangs told from the environment: torchrun's, srun's, or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megatron_prism.core.errors import EnvironmentFault, InputError, Stopped
from megatron_prism.parallel import launch

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take this process out of any gang, and put the environment back afterwards."""
    for name in [*TORCHRUN, "LOCAL_WORLD_SIZE", launch.TORCHRUN, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what adopt_slurm sets is undone too
        monkeypatch.delenv(name)
    return monkeypatch


def srun(environment: pytest.MonkeyPatch, **more: str) -> None:
    task = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "40017",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
    }
    for name, value in (task | more).items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[12,14]", "gpu12"),
        ("a1,b2", "a1"),
        ("rack-1-n[3-4]", "rack-1-n3"),
        ("n1.cluster.org,n2", "n1.cluster.org"),
        ("127.0.0.1", "127.0.0.1"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("n[1-2]-ib", "n1-ib"),
    ],
)
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
        ({"SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": "0"}, None),  # cleared, not unset
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": ""}, None),
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
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "24017",
    }
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


def test_an_srun_of_one_task_a_node_spans_its_nodes(environment: pytest.MonkeyPatch) -> None:
    assert launch.slurm_span() == launch.ALONE
    srun(environment, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="2", SLURM_PROCID="1")
    assert launch.slurm_span() == launch.Span(2, 1, "gpu007", 24017)
    environment.setenv("MASTER_ADDR", "10.0.0.7")
    environment.setenv("MASTER_PORT", "4000")
    assert launch.slurm_span() == launch.Span(2, 1, "10.0.0.7", 4000)
    environment.setenv("WORLD_SIZE", "16")  # a rank that a launcher has started
    assert launch.slurm_span() == launch.ALONE


def test_never_both_a_task_a_rank_and_ranks_of_each_task(environment: pytest.MonkeyPatch) -> None:
    srun(environment, SLURM_STEP_NUM_NODES="2")
    with pytest.raises(EnvironmentFault, match="16 tasks on 2 nodes"):
        launch.slurm_span()


def test_a_span_is_a_static_rendezvous_and_one_machine_stays_on_loopback(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GLOO_SOCKET_IFNAME", "eth7")
    several = launch._rendezvous(launch.Span(2, 1, "gpu007", 24017))
    assert (several["rdzv_backend"], several["rdzv_endpoint"], several["rdzv_configs"]) == ("static", "gpu007:24017", {"rank": 1})
    environment.delenv("GLOO_SOCKET_IFNAME")
    alone = launch._rendezvous(launch.ALONE)
    assert (alone["rdzv_backend"], alone["rdzv_endpoint"], os.environ["GLOO_SOCKET_IFNAME"]) == ("c10d", "127.0.0.1:0", "lo")


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},  # a pod of one node
        {"RANK": "3"},
        {"WORLD_SIZE": "8"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "a", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ],
)
def test_variables_that_make_no_rank_are_dropped(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    launch.drop_leftovers()
    assert not {*TORCHRUN, "LOCAL_WORLD_SIZE"} & {*os.environ}
    assert not launch.in_gang()
    launch.check_nproc(2)
    srun(environment, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="2", SLURM_PROCID="1")
    assert launch.slurm_span().node == 1  # an srun is still seen


def test_a_rank_stays_one_and_nproc_does_not_contradict_its_launcher(environment: pytest.MonkeyPatch) -> None:
    rank = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    for name, value in rank.items():
        environment.setenv(name, value)
    launch.drop_leftovers()
    assert rank.items() <= os.environ.items()
    with pytest.raises(InputError, match="RANK=1 WORLD_SIZE=4 in the environment.*unset RANK and WORLD_SIZE"):
        launch.check_nproc(4)
    environment.setenv("TORCHELASTIC_RUN_ID", "none")
    environment.setenv("LOCAL_WORLD_SIZE", "4")
    launch.check_nproc(4)
    with pytest.raises(InputError, match="4 ranks of torchrun on this machine"):
        launch.check_nproc(2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        environment.setenv(name, value)
    launch.drop_leftovers()
    assert launch.in_gang()  # torchrun's gang of one


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM"])
def test_a_notice_before_there_are_ranks_is_a_stop(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(launch.psutil.Process, "children", lambda self: [])  # this process may have some, of other tests
    with pytest.raises(Stopped, match=f"{name} before the first step"):
        launch._HandOn()(signal.Signals[name], None)


def test_a_notice_during_an_import_that_swallows_errors_still_ends_the_process() -> None:
    """As torch's import of numpy does: it would go on with half of numpy."""
    text = (
        "import os, signal\nfrom megatron_prism.parallel import launch\nlaunch.heed_signals_while_starting()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGUSR1)\nexcept BaseException:\n    pass\nprint('went on')"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env={**os.environ, "RANK": "0"})
    assert (done.returncode, done.stdout) == (Stopped.exit_code, "")
    assert done.stderr == "prism: stopped by SIGUSR1 before the first step; the same command starts again\n"


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([(4, 10), (70, 11)], 70),  # rank 0 has lost its peer, and is seen first
        ([(70, 10), (4, 10)], 70),
        ([(4, 10), (-signal.SIGKILL, 11)], 4),
        ([(4, 10), (4, 11)], 4),
        ([(2, 10), (70, 11)], 2),
        ([(-signal.SIGUSR1, 10)], 3),
        ([(-signal.SIGHUP, 10)], 3),
        ([(-signal.SIGTERM, 10)], 4),
    ],
)
def test_a_gang_ends_as_the_rank_that_knows_why(failures: list[tuple[int, int]], code: int) -> None:
    by_rank = {rank: types.SimpleNamespace(exitcode=exits, timestamp=at, pid=1) for rank, (exits, at) in enumerate(failures)}
    assert launch._exit_code(by_rank) == code


def test_a_sigterm_that_was_forwarded_is_a_stop_and_one_that_torch_sent_is_not() -> None:
    killed = {0: types.SimpleNamespace(exitcode=-signal.SIGTERM, timestamp=10, pid=1)}
    assert launch._exit_code(killed, {signal.SIGTERM}) == Stopped.exit_code
    assert launch._exit_code(killed, {signal.SIGUSR1}) == launch.GANG_FAILED


def test_ranks_share_the_processors_that_this_process_may_use_and_no_others(tmp_path: Path) -> None:
    """A job of some of a node's processors, a container: threads beyond them would wait for one another."""
    script, gang = tmp_path / "rank.py", tmp_path / "gang.py"
    script.write_text("import os\nprint('threads', os.environ['OMP_NUM_THREADS'])\n")
    gang.write_text(
        "import os, sys\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nfrom megatron_prism.parallel import launch\n"
        f"sys.exit(launch.start_gang(1, [{str(script)!r}]))\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, str(gang)], capture_output=True, text=True, env=kept, timeout=120)
    assert done.stdout == "threads 1\n", done.stderr


def test_sigterm_while_the_ranks_start_is_a_stop(tmp_path: Path) -> None:
    """A real gang of two, whose ranks have no handler yet."""
    ready, script, gang = tmp_path / "ready", tmp_path / "rank.py", tmp_path / "gang.py"
    script.write_text(f"import pathlib, time\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)\n")
    gang.write_text(f"import sys\nfrom megatron_prism.parallel import launch\nsys.exit(launch.start_gang(2, [{str(script)!r}]))\n")
    with subprocess.Popen([sys.executable, str(gang)], stderr=subprocess.PIPE, text=True) as started:
        for _ in range(600):
            if ready.exists() or started.poll() is not None:
                break
            time.sleep(0.1)
        started.terminate()
        _, said = started.communicate(timeout=60)
    assert started.returncode == Stopped.exit_code, said
    assert "stopped by SIGTERM before the first step" in said
