"""The script of a job: run with an srun and a scontrol that only note what they are given."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prism.core.config import ClusterConfig, CpuConfig
from megatron_prism.launch import slurm
from tests.unit.launch.job_script import CPU, Start, ended, given, job, stub


@pytest.mark.parametrize(
    ("code", "exits", "requeued", "event"),
    [
        (0, 0, False, "done"),
        (1, 4, True, "fault: exit code 1 that no task noted, on node[1-2]: srun could not start one"),
        (2, 2, False, "stopped: exit code 2, the input is wrong"),
        (70, 70, False, "stopped: exit code 70, a defect in megatron_prism; the log has its traceback"),
        (3, 4, True, "saved: to be started again"),
        (4, 4, True, "fault: exit code 4 on node[1-2]"),
        (137, 4, True, "fault: exit code 137 on node[1-2]"),
    ],
)
def test_what_becomes_of_an_exit_code(run: Start, tmp_path: Path, code: int, exits: int, requeued: bool, event: str) -> None:
    assert ended(run(job(), CPU, STUB_CODE=str(code)))[0] == exits
    assert (tmp_path / "scontrol.argv").exists() == requeued
    assert not requeued or (tmp_path / "scontrol.argv").read_text() == "requeue 40017\n"
    start, last = (line.split(" ", 2)[2] for line in (tmp_path / "run/slurm/train.events").read_text().splitlines())
    assert (start, last) == ("start 0 on node[1-2]", event)


TASKS = {  # srun as it is: every task in turn, and the highest exit code of all; prism: notes as cli/entry does, unless it is killed, and elsewhere, as in a container
    "srun": 'while [ "$1" != prism ]; do shift; done; for task in 0 1; do SLURM_PROCID=$task "$@"; code=$?; [ $code -le "${high:-0}" ] || high=$code; done; exit $high',
    "prism": f"""cd /; codes=($STUB_CODES); code=${{codes[$SLURM_PROCID]}}
        [ $code -gt 128 ] || {sys.executable} -c "from megatron_prism.launch import slurm; slurm.note_exit_code($code)"; exit $code""",
}


@pytest.mark.parametrize(
    ("codes", "exits", "event"),
    [
        ("70 137", 70, "stopped: exit code 70, a defect in megatron_prism; the log has its traceback"),
        ("4 2", 2, "stopped: exit code 2, the input is wrong"),
        ("1 0", 1, "stopped: exit code 1, the result is a failure"),
        ("1 137", 1, "stopped: exit code 1, the result is a failure"),
        ("2 70", 70, "stopped: exit code 70, a defect in megatron_prism; the log has its traceback"),
        ("3 4", 4, "fault: exit code 4 on node[1-2]"),
        ("0 137", 4, "fault: exit code 137 on node[1-2]"),
    ],
)
def test_a_nodes_own_exit_code_outweighs_what_srun_tells(run: Start, tmp_path: Path, codes: str, exits: int, event: str) -> None:
    for name, text in TASKS.items():
        stub(tmp_path, name, text)
    stage = job(Path("a run's/slurm"))
    (tmp_path / stage.folder).mkdir(parents=True)
    (tmp_path / stage.folder / "train.40017.7.0").write_text("70\n")  # of an earlier start
    code, output = ended(run(stage, CPU, STUB_CODES=codes, SLURM_RESTART_COUNT="8"))
    assert code == exits, output
    assert (tmp_path / stage.folder / "train.events").read_text().splitlines()[-1].split(" ", 2)[2] == event
    assert not list((tmp_path / stage.folder).glob("train.40017.8.*"))


def test_a_rank_notes_no_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {slurm.EXIT_CODES: str(tmp_path / "codes"), "SLURM_PROCID": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    slurm.note_exit_code(4)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("RANK")
    slurm.note_exit_code(2)
    assert (tmp_path / "codes.1").read_text() == "2\n"
    monkeypatch.setenv(slurm.EXIT_CODES, str(tmp_path / "absent" / "codes"))
    slurm.note_exit_code(2)


def test_an_element_of_an_array_requeues_itself_alone(run: Start, tmp_path: Path) -> None:
    """Slurm takes the job id of one element, which is the array's own too, for all of it."""
    array = dataclasses.replace(job(), array={0: ("seed=1",), 1: ("seed=2",)})
    found = run(array, CPU, STUB_CODE="3", SLURM_ARRAY_JOB_ID="40017", SLURM_ARRAY_TASK_ID="1")
    assert ended(found)[0] == 4 and (tmp_path / "scontrol.argv").read_text() == "requeue 40017_1\n"


def test_faults_are_counted_and_saves_are_not(run: Start, tmp_path: Path) -> None:
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/train.events").write_text("2026-01-01T00:00:00Z 39 fault: of another job\n")
    for code in (4, 3, 3, 3, 3, 137, 3, 9):
        assert ended(run(job(), CPU, STUB_CODE=str(code)))[0] == 4
    assert (tmp_path / "scontrol.argv").read_text().count("requeue") == 8
    code, output = ended(run(job(), CPU, STUB_CODE="4"))
    assert code == 4 and "stopped: all 3 restarts after faults are used up (max_restarts)" in output
    assert (tmp_path / "scontrol.argv").read_text().count("requeue") == 8


def test_two_starts_in_a_row_without_a_checkpoint_end_the_job(run: Start, tmp_path: Path) -> None:
    """A start that is told to stop before its first step saves nothing, and the next one is too."""
    stage = job(checkpoints=((tmp_path / "a run/checkpoints",),))
    for step in (3, 6):
        (tmp_path / "a run/checkpoints").mkdir(parents=True, exist_ok=True)
        stub(tmp_path, "srun", f"mkdir 'a run/checkpoints/step_{step:08d}'; exit 3")
        assert ended(run(stage, CPU))[0] == 4
    stub(tmp_path, "srun", "mkdir -p 'a run/checkpoints/.step_00000009' 'a run/checkpoints/damaged_step_00000009_1'; exit 3")
    assert ended(run(stage, CPU))[0] == 4
    stub(tmp_path, "srun", "exit 137")
    assert ended(run(stage, CPU))[0] == 4
    stub(tmp_path, "srun", "mkdir 'a run/checkpoints/step_00000009'; exit 3")
    assert ended(run(stage, CPU))[0] == 4
    stub(tmp_path, "srun", "exit 3")
    assert [ended(run(stage, CPU))[0] for _ in range(2)] == [4, 4]
    events = [line.split(" ", 2)[2] for line in (tmp_path / "run/slurm/train.events").read_text().splitlines()]
    assert [event for event in events if not event.startswith("start")] == [
        "saved: to be started again",
        "saved: to be started again",
        "no progress: exit code 3, and the newest checkpoint is still step_00000006",
        "fault: exit code 137 on node[1-2]",
        "saved: to be started again",
        "no progress: exit code 3, and the newest checkpoint is still step_00000009",
        "stopped: no progress in two starts; raise time_limit, or lower signal_before_s, and submit again",
    ]
    assert (tmp_path / "scontrol.argv").read_text().count("requeue") == 6
    assert ended(run(stage, CPU, SLURM_JOB_ID="40018"))[0] == 4  # submitted again by hand, it has its two starts
    assert (tmp_path / "scontrol.argv").read_text().count("requeue") == 7


def test_each_element_of_an_array_has_its_own_progress(run: Start, tmp_path: Path) -> None:
    array = job(array={0: ("a",), 1: ("b",)}, checkpoints=((tmp_path / "a",), (tmp_path / "b",)))
    stub(tmp_path, "srun", f"mkdir -p {tmp_path}/b/step_0000000$SLURM_RESTART_COUNT; exit 3")
    for index, count in ((0, 1), (1, 3)):
        for start in range(3):
            ended(run(array, CPU, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(index), SLURM_RESTART_COUNT=str(3 * index + start)))
        assert (tmp_path / "scontrol.argv").read_text().count(f"requeue 7_{index}") == count


def test_a_newer_file_in_any_of_its_folders_is_a_jobs_progress(run: Start, tmp_path: Path) -> None:
    """An evaluation grades and measures for hours after its last sample."""
    folders = [(tmp_path / name / "samples", tmp_path / name / "answers") for name in ("a", "b b")]
    array = job(array={0: ("a",), 1: ("b",)}, checkpoints=tuple(folders))
    for folder in (folder for both in folders for folder in both):
        folder.mkdir(parents=True)
    (folders[1][0] / "000007.jsonl").touch()
    for start in range(3):
        stub(tmp_path, "srun", f"touch '{folders[1][1]}/00000{start}.jsonl'; exit 3")
        ended(run(array, CPU, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1", SLURM_RESTART_COUNT=str(start)))
    stub(tmp_path, "srun", "exit 3")
    for start in (3, 4):
        ended(run(array, CPU, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1", SLURM_RESTART_COUNT=str(start)))
    events = [line.split(" ", 2)[2] for line in (tmp_path / "run/slurm/train_1.events").read_text().splitlines()]
    assert [event for event in events if not event.startswith("start")] == [
        *["saved: to be started again"] * 3,
        "no progress: exit code 3, and the newest checkpoint is still 000007.jsonl 000002.jsonl",
        "stopped: no progress in two starts; raise time_limit, or lower signal_before_s, and submit again",
    ]


def test_the_requeues_own_term_is_no_event(run: Start, tmp_path: Path) -> None:
    """Slurm tells a requeued job's script to end, and may do so before the script has: `timeout` stands between it and scontrol."""
    stub(tmp_path, "scontrol", "kill -TERM $(ps -o ppid= -p $PPID)")
    code, output = ended(run(job(), CPU, STUB_CODE="3"))
    assert code == 4 and "TERM" not in output and output.endswith("saved: to be started again\n"), output


def test_a_requeue_that_fails_in_passing_is_asked_again(run: Start, tmp_path: Path) -> None:
    stub(tmp_path, "sleep", "echo $1 >>sleep.argv")
    stub(tmp_path, "scontrol", "echo x >>scontrol.argv; [ $(wc -l <scontrol.argv) = 3 ]")
    code, output = ended(run(job(), CPU, STUB_CODE="3"))
    assert code == 4 and "stopped" not in output and (tmp_path / "scontrol.argv").read_text().count("x") == 3
    stub(tmp_path, "scontrol", "exit 1")
    code, output = ended(run(job(), CPU, STUB_CODE="3"))
    assert code == 4 and output.endswith("stopped: scontrol requeue does not work here\n")
    assert (tmp_path / "sleep.argv").read_text().split() == ["1", "2", *"1 2 4 8 16 0".split()]


def test_a_setup_that_fails_is_a_fault(run: Start, tmp_path: Path) -> None:
    _, output = ended(run(job(), ClusterConfig(gpus_per_node=8, setup=(("false",),))))
    assert "fault: setup of" in output
    assert not (tmp_path / "srun.argv").exists()


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT"])
def test_signals_of_the_script(run: Start, tmp_path: Path, name: str) -> None:
    process = run(job(), CPU, STUB_WAIT="yes")
    ends = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    if name == "SIGTERM":  # srun gets none: its tasks have been told by Slurm, and save
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.5)
        (tmp_path / "go").touch()
    code, output = ended(process)
    assert (code, (tmp_path / "scontrol.argv").exists()) == ((4, True) if name != "SIGTERM" else (3, False)), output
    last = (tmp_path / "run/slurm/train.events").read_text().splitlines()[-1]
    assert last.split(" ", 2)[2].startswith("saved" if name != "SIGTERM" else "ended by TERM with exit code 3")
    assert (f"{name[3:]}: the tasks are told to save" in output) == (name != "SIGTERM")


@pytest.mark.parametrize("has_saved", [True, False])
def test_a_job_that_its_time_limit_ends_is_started_again(run: Start, tmp_path: Path, has_saved: bool) -> None:
    """Slurm would not. Its tasks have not saved since the notice, and are killed with the script. Without progress it is a fault."""
    stage = job(checkpoints=((tmp_path / "run/checkpoints",),))
    stub(
        tmp_path,
        "srun",
        f"{'mkdir -p run/checkpoints/step_00000003; ' if has_saved else ''}trap : USR1; touch ready; while :; do sleep 0.02; done",
    )
    process = run(stage, CPU, STUB_REASON="TimeLimit")
    ends = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 4
    subprocess.run(["pkill", "-f", str(tmp_path / "bin" / "srun")], check=False)
    events = [line.split(" ", 2)[2] for line in (tmp_path / "run/slurm/train.events").read_text().splitlines()]
    assert (tmp_path / "scontrol.argv").read_text() == "requeue 40017\n"
    last = "beyond its last checkpoint: to be started again" if has_saved else "and the newest checkpoint is still none"
    assert events[1:] == [
        "USR1: the tasks are told to save",
        "TERM: the tasks save if they can",
        f"{'' if has_saved else 'fault: '}ended at the time limit, {last}",
    ]


def options(job: slurm.Job, cluster: ClusterConfig) -> set[str]:
    return set(re.findall("^#SBATCH (.*)", slurm.render(job, cluster), re.MULTILINE))


def test_resources_of_a_gang_and_of_a_stage_without_one() -> None:
    cluster = ClusterConfig(
        gpus_per_node=8,
        partition="gpu",
        cpus_per_task=96,
        mem="0",
        cpu=CpuConfig(partition="cpu", cpus_per_task=32, mem="64G", time_limit="60"),
    )
    gang, alone = options(job(), cluster), options(job(nodes=1, ranks_per_node=0), cluster)
    assert {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=gpu:8",
        "--partition=gpu",
        "--cpus-per-task=96",
        "--mem=0",
        "--exclusive",
        "--time=24:00:00",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
    } <= gang
    assert {"--nodes=1", "--partition=cpu", "--cpus-per-task=32", "--mem=64G", "--time=60"} <= alone
    assert not [option for option in alone if "gpu" in option or "exclusive" in option]
    assert "--gres=gpu:2" in options(job(nodes=1, ranks_per_node=2), cluster)
    assert "--gpus-per-node=8" in options(job(), ClusterConfig(gpus_per_node=8, gres=None))
    assert not [option for option in options(job(ranks_per_node=1), CPU) if "gpu" in option or "gres" in option]
    assert "MASTER_ADDR" in slurm.render(job(), cluster) and "MASTER_ADDR" not in slurm.render(job(ranks_per_node=0), cluster)


def test_an_array_takes_its_elements_words(run: Start, tmp_path: Path) -> None:
    stage = job(array={0: ("seed=1",), 2: ("seed=2", "run_dir=b c")})
    assert "--array=0,2" in options(stage, CPU)
    assert ended(run(stage, CPU, SLURM_ARRAY_TASK_ID="2"))[0] == 0
    assert given(tmp_path / "srun.argv")[-6:] == ["train", "mid.yaml", "seed=2", "run_dir=b c", "--nproc", "8"]
    assert (tmp_path / "run/slurm/train_2.events").is_file()
