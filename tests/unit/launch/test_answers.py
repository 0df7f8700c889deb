"""What Slurm's commands answer, or do not: stubs of sbatch, squeue and sacct that fail, forget, are slow or print more than the answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.launch import slurm
from tests.unit.launch.job_script import stub


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder at the head of PATH, for stubs of Slurm's commands, which are asked again at once."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(slurm, "PAUSES_S", (0.0, 0.0))
    return tmp_path


FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
TIMED_OUT = "echo 'Socket timed out on send/recv operation' >&2; exit 1"
NO_CONTACT = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"


def test_only_an_answer_says_that_a_job_is_gone(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(commands, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    stub(commands, "squeue", FORGOTTEN)
    assert slurm.states(["7"]) == {}
    stub(commands, "squeue", "echo '7|RUNNING|None'")
    assert slurm.states(["7", "8"]) == {"7": "RUNNING"}
    stub(commands, "squeue", "echo 'Maintenance on Friday | read the news'; echo; echo 'CLUSTER: two'; echo '7|RUNNING|None'; echo '8|R'")
    assert slurm.states(["7"]) == {"7": "RUNNING"}
    stub(commands, "squeue", f"echo x >>asked; [ $(wc -l <asked) = 3 ] || {{ {TIMED_OUT}; }}; echo '7|PENDING|Priority'")
    assert slurm.states(["7"]) == {"7": "PENDING (Priority)"}
    for text in (TIMED_OUT, NO_CONTACT, "exit 1", "echo '7|RUNN'; exit 1"):
        stub(commands, "squeue", text)
        with pytest.raises(EnvironmentFault, match="squeue does not answer, asked 3 times"):
            slurm.states(["7"])
    monkeypatch.setattr(slurm, "ANSWER_S", 0.2)
    stub(commands, "squeue", "exec sleep 5")
    with pytest.raises(EnvironmentFault, match="timed out after 0.2 s"):
        slurm.states(["7"])
    stub(commands, "squeue", FORGOTTEN)
    assert slurm.states([]) == {}


@pytest.mark.parametrize(
    ("failure", "queue", "outcome", "num_asked"),
    [
        (NO_CONTACT, "exit 1", "102", 2),  # squeue need not be asked: the job was not taken
        (TIMED_OUT, "echo '5|/else/where.sbatch'", "102", 2),
        (TIMED_OUT, 'echo "5|$PWD/a.sbatch"', "5", 1),  # it was taken, and only the answer was lost
        (TIMED_OUT, "exit 1", "squeue does not answer", 1),
        ("echo 'sbatch: error: invalid account' >&2; exit 1", "exit 1", "sbatch refuses a.sbatch: sbatch: error: invalid account", 1),
    ],
)
def test_sbatch_is_asked_again_and_no_job_is_submitted_twice(
    commands: Path, failure: str, queue: str, outcome: str, num_asked: int
) -> None:
    stub(commands, "sbatch", f"echo x >>asked; [ $(wc -l <asked) = 2 ] || {{ {failure}; }}; echo 102")
    stub(commands, "squeue", queue)
    if outcome.isdecimal():
        assert slurm.submit(Path("a.sbatch")) == outcome
    else:
        with pytest.raises(EnvironmentFault, match=outcome):
            slurm.submit(Path("a.sbatch"))
    assert (commands / "asked").read_text().count("x") == num_asked


@pytest.mark.parametrize("output", ["102", "102;two", "Maintenance on Friday\n102", "Submitted batch job 102"])
def test_a_job_id_stands_anywhere_in_what_sbatch_prints(commands: Path, output: str) -> None:
    stub(commands, "sbatch", f"echo '{output}'")
    assert slurm.submit(Path("a.sbatch")) == "102"


def test_a_job_without_an_id_is_looked_for(commands: Path) -> None:
    stub(commands, "sbatch", "echo queued")
    stub(commands, "squeue", 'echo "5|$PWD/a.sbatch"')
    assert slurm.submit(Path("a.sbatch")) == "5"
    stub(commands, "squeue", "exit 0")
    with pytest.raises(EnvironmentFault, match="sbatch prints no job id, but 'queued"):
        slurm.submit(Path("a.sbatch"))


@pytest.mark.parametrize("state", ["PENDING (Dependency)", "STOPPED", "STAGE_OUT", "SPECIAL_EXIT", "COMPLETED, RUNNING", "REQUEUE_HOLD"])
def test_a_job_is_over_only_in_a_state_that_says_so(state: str) -> None:
    assert slurm.is_active(state)
    assert not slurm.is_active("COMPLETED, CANCELLED") and not slurm.is_active("")


def test_sbatch_is_asked_a_bounded_number_of_times(commands: Path) -> None:
    stub(commands, "sbatch", f"echo x >>asked; {NO_CONTACT}")
    with pytest.raises(EnvironmentFault, match="asked 3 times: Unable to contact"):
        slurm.submit(Path("a.sbatch"))
    assert (commands / "asked").read_text().count("x") == 3


def test_options_in_the_submitters_shell_reach_neither_slurm_nor_the_job(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "SBATCH_TIMELIMIT",
        "SLURM_CPU_BIND",
        "SLURM_MEM_PER_CPU",
        "SLURM_JOB_ID",
        "SRUN_EXPORT_ENV",
        "SQUEUE_USERS",
        "WORLD_SIZE",
        "RANK",
    }
    kept = {"SLURM_CONF", "PRISM_TEST_OTHER"}
    for name in theirs | kept:
        monkeypatch.setenv(name, "1")
    stub(commands, "sbatch", "env >sbatch.env; echo 7")
    stub(commands, "squeue", "env >squeue.env")
    stub(commands, "sacct", "exit 1")
    slurm.submit(Path("a.sbatch"))
    slurm.states(["7"])
    for path in (commands / "sbatch.env", commands / "squeue.env"):
        names = {line.partition("=")[0] for line in path.read_text().splitlines()}
        assert kept <= names and not theirs & names
