"""A study as a chain of Slurm jobs: the scripts, what is recorded when a job's script says that it is done, and a second submission."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.cli.submit import read_command
from megatron_prism.core.config import StudyConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import load
from megatron_prism.jobs import study as job
from megatron_prism.jobs import study_slurm
from tests.unit.jobs.submissions import TRAIN, stub, write

SCRIPT = "import os, sys; from pathlib import Path; Path(sys.argv[1]).write_text('made')"
STAGES = [
    {"name": "data", "kind": "python", "command": ["make.py", "study/data"], "output": "study/data"},
    {"name": "mid", "after": ["data"], "command": ["train", "mid.yaml"]},
    {"name": "page", "kind": "python", "after": ["mid"], "command": ["make.py", "study/page"], "output": "study/page"},
]


@pytest.fixture
def study(home: Path) -> Path:
    Path("make.py").write_text(SCRIPT)
    write("mid.yaml", {**TRAIN, "run_dir": "study/mid", "data": {"prepared": "study/data", "seq_length": 64}})
    write("s.yaml", {"name": "s", "run_dir": "study", "environment": {"A": "1 2"}, "stages": STAGES})
    return home


def read(**more: Any) -> job.Study:
    return job.read(load(Path("s.yaml"), StudyConfig), read_command, **more)


def submit(dry_run: bool = False) -> dict[str, Any]:
    return study_slurm.run(read(), ["s.yaml"], Path("cluster.yaml"), dry_run, read_command)


def say(name: str, *events: str) -> None:
    lines = [f"2026-01-01T00:0{minute}:00Z 7 {event}\n" for minute, event in enumerate(events)]
    Path(f"study/slurm/{name}.events").write_text("".join(lines))


def train(step: str, name: str = "mid", run_dir: str = "study/mid") -> None:
    """Leave what a training run would."""
    folder = Path(run_dir, "checkpoints", "step_00000010")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SHA256SUMS").write_text(f"{step}  a\n")
    write(f"study/study/{name}/result.json", {"loss": 1.0})


def test_the_scripts_run_a_gangs_own_command_and_other_stages_through_the_study(study: Path) -> None:
    scripts = submit(dry_run=True)["texts"]
    ends = [next(line.strip() for line in script.splitlines() if line.strip().startswith("prism ")) for script in scripts]
    assert ends == [
        "prism study s.yaml --stage data &",
        "prism train mid.yaml --json study/study/mid/result.json --nproc 8 &",
        "prism study s.yaml --stage page &",
    ]
    assert "#SBATCH --nodes=2" in scripts[1] and "export A='1 2'" in scripts[1]
    assert not Path("study").exists()


def test_a_chain_is_recorded_as_it_goes_and_submitted_again_only_where_it_is_to_run(study: Path) -> None:
    assert [stage["job"] for stage in submit()["stages"]] == ["101", "102", "103"]
    assert [line.split()[0] for line in Path("sbatch.calls").read_text().splitlines()] == ["--parsable"] * 3
    assert job.standing(read())["stages"]["mid"]["state"] == "submitted"
    assert job.run(read(only=["data"]), alone="data")["stages"]["data"]["state"] == "done"
    assert job.run(read(only=["page"]), alone="page")["stages"]["page"]["reason"] == "needs mid"  # which is not done
    train("1")
    say("mid", "start 0 on n1", "saved: to be started again", "start 1 on n1", "done")
    result = job.run(read(only=["page"]), alone="page")
    mid = result["stages"]["mid"]
    assert {name: stage["state"] for name, stage in result["stages"].items()} == dict.fromkeys(("data", "mid", "page"), "done")
    assert (mid["num_starts"], mid["seconds"], mid["started"]) == (2, 120.0, "2026-01-01T00:00:00Z")
    assert submit()["stages"] == []
    write("mid.yaml", {**json.loads(Path("mid.yaml").read_text()), "steps": 11})
    submitted = submit()["stages"]
    assert [(stage["name"], stage["job"]) for stage in submitted[:2]] == [("mid", "104"), ("page", "105")]
    assert Path("study/mid.old/checkpoints").is_dir() and not Path("study/mid").exists()  # never resumed with another config


def test_an_interrupted_gang_goes_on_in_what_it_has(study: Path) -> None:
    submit()
    job.run(read(only=["data"]), alone="data")
    train("1")
    say("mid", "start 0 on n1", "stopped: exit code 1, the result is a failure")
    assert job.standing(read())["stages"]["mid"]["failure"] == "stopped: exit code 1, the result is a failure"
    assert [stage["name"] for stage in submit()["stages"]][:2] == ["mid", "page"]
    assert Path("study/mid/checkpoints").is_dir() and not Path("study/mid.old").exists()


def test_a_study_whose_jobs_are_at_work_is_not_submitted_again(study: Path) -> None:
    submit()
    say("mid", "start 0 on n1")
    stub(study, "squeue", 'echo "102|RUNNING|"')
    with pytest.raises(InputError, match=r"job 102 \(mid\)"):
        submit()
    assert Path("study/slurm/mid.events").exists()


def test_a_refused_submission_moves_nothing(study: Path) -> None:
    late = {"name": "late", "after": ["mid"], "command": ["train", "late.yaml"]}
    write("late.yaml", {**TRAIN, "run_dir": "elsewhere/late", "data": {"prepared": "study/data", "seq_length": 64}})
    write("s.yaml", {"name": "s", "run_dir": "study", "stages": [*STAGES, late]})
    submit()
    job.run(read(only=["data"]), alone="data")
    for name, run_dir in (("mid", "study/mid"), ("late", "elsewhere/late")):
        train("1", name, run_dir)
        say(name, "start 0 on n1", "done")
    write("mid.yaml", {**json.loads(Path("mid.yaml").read_text()), "steps": 11})
    with pytest.raises(InputError, match="stage late: output: found elsewhere/late") as caught:
        submit()
    assert len(caught.value.problems) == 1
    assert Path("study/mid/checkpoints").is_dir() and not Path("study/mid.old").exists()


def test_a_part_of_a_gangs_array_is_submitted_under_its_elements_names(study: Path) -> None:
    """As an array its elements would be counted from 0, and what one of them did would stand for another."""
    seeds = {
        "name": "seeds",
        "after": ["data"],
        "command": ["train", "mid.yaml"],
        "array": [["run_dir=study/a"], ["run_dir=study/b", "seed=2"]],
    }
    last = {"name": "last", "kind": "python", "after": ["seeds"], "command": ["make.py", "study/last"], "output": "study/last"}
    write("s.yaml", {"name": "s", "run_dir": "study", "stages": [STAGES[0], seeds, last]})
    assert [stage["name"] for stage in submit()["stages"]] == ["data", "seeds", "last"]
    job.run(read(only=["data"]), alone="data")
    for index, run_dir in enumerate(("study/a", "study/b")):
        train("1", f"seeds/{index}", run_dir)
        say(f"seeds_{index}", "start 0 on n1", "done")
    assert job.run(read(only=["last"]), alone="last")["stages"]["last"]["state"] == "done"
    shutil.rmtree("study/b")
    stages = submit()["stages"]
    assert [(stage["name"], stage["after"]) for stage in stages[:2]] == [("seeds_1", []), ("last", ["seeds_1"])]
    script = Path("study/slurm/seeds_1.sbatch").read_text()
    assert "prism train mid.yaml run_dir=study/b seed=2 --json study/study/seeds/1/result.json --nproc 8" in script
    train("2", "seeds/1", "study/b")
    say("seeds_1", "start 0 on n1", "done")
    assert job.run(read(only=["last"]), alone="last")["stages"]["last"]["state"] == "done"
    assert submit()["stages"] == []
