"""What `prism status` says of a run and of a submission."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError
from megatron_prism.jobs import status
from tests.unit.jobs.submissions import RL, TRAIN, submitted, write


def test_status_of_reinforcement_learning(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted("rl", "rl.yaml")
    write("rl/config.yaml", RL)
    line = {"step": 4, "loss": 0.5, "reward": 0.25, "reward/math": 0.5, "step_s": 30.0, "tokens_per_s": 1000.0}
    Path("rl/metrics.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = status.run(Path("rl"))["rows"]
    assert (row["stage"], row["step"], row["steps"], row["reward"], row["left_s"]) == ("rl", 4, 10, 0.25, 180.0)
    status.show(status.run(Path("rl")))
    shown = capsys.readouterr().out
    assert "reward" in shown and "0.250" in shown and "0:03:00" in shown
    Path("run").mkdir()
    write("run/config.yaml", TRAIN)
    status.show(status.run(Path("run")))
    assert "reward" not in capsys.readouterr().out


def test_status_of_a_run_and_of_its_jobs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="neither a run nor a submission"):
        status.run(Path("run"))
    submitted("train", "train.yaml")
    Path("squeue.says").write_text("101|PENDING|BeginTime\n")
    (row,) = status.run(Path("run"))["rows"]
    assert (row["stage"], row["job"], row["state"], row["step"], row["last_event"]) == ("train", "101", "PENDING (BeginTime)", 0, None)
    write("run/config.yaml", TRAIN)
    write("run/manifest.json", {"starts": [{"from_step": 0}, {"from_step": 4}, {"from_step": 10}]})  # of 10: the last had nothing to do
    line = {"step": 4, "loss": 2.5, "step_s": 3.0, "tokens_per_s": 1000.0}
    Path("run/metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "valid_loss/a": 2.0}\n{"step": 5, "los')
    Path("run/slurm/train.events").write_text("T1 101 fault: exit code 4 on a\nT2 101 start 1 on [a]\n")
    Path("run/checkpoints/step_00000003").mkdir(parents=True)
    found = status.run(Path("run"))
    assert found["rows"] == [
        {
            "stage": "train",
            "job": "101",
            "state": "PENDING (BeginTime)",
            "last_event": "T2 start 1 on [a]",
            "faults": 1,
            "run_dir": "run",
            "step": 4,
            "steps": 10,
            "loss": 2.5,
            "tokens_per_s": 1000.0,
            "left_s": 18.0,
            "restarts": 1,
            "checkpoint_step": 3,
        }
    ]
    status.show(found)
    Path("squeue.says").unlink()
    assert status.run(Path("run"))["rows"][0]["state"] == "not in the queue"
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    (row,) = status.run(home / "run")["rows"]
    assert (row["run_dir"], row["step"], row["checkpoint_step"], row["last_event"]) == (str(home / "run"), 4, 3, "T2 start 1 on [a]")


def test_status_of_a_run_without_a_scheduler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()
    write("run/config.yaml", TRAIN)
    monkeypatch.setenv("PATH", str(home / "nothing"))
    (row,) = status.run(Path("run"))["rows"]
    assert (row["state"], row["job"], row["step"], row["loss"]) == ("not training", None, 0, None)
    status.show(status.run(Path("run")))


def test_status_of_a_run_that_has_its_last_checkpoint(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, state in ((9, "not training"), (10, "done")):
        Path(f"run/checkpoints/step_{step:08d}").mkdir(parents=True)
        write("run/config.yaml", TRAIN)
        Path("run/metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n')
        assert status.run(Path("run"))["rows"][0]["state"] == state
    monkeypatch.setattr(disk, "is_held", lambda path: True)
    assert status.run(Path("run"))["rows"][0]["state"] == "training"


def test_status_of_a_study_names_its_command(home: Path) -> None:
    Path("tiny/study").mkdir(parents=True)
    write("tiny/study/study.json", {})
    with pytest.raises(InputError, match="tiny: found a study; required .*; prism study CONFIG --status, with the study's overrides"):
        status.run(Path("tiny"))


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "run", "starts": []}'])
def test_status_of_a_run_whose_manifest_is_damaged(home: Path, text: str) -> None:
    """It was a defect, exit code 70."""
    Path("run").mkdir()
    write("run/config.yaml", TRAIN)
    Path("run/manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"run/manifest.json: found .*; required the manifest of a run, with its starts"):
        status.run(Path("run"))
