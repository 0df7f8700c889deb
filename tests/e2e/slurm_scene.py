"""What tests/e2e/test_slurm.py submits to a real Slurm, and what befalls it."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from tests.slurm import CLUSTER, ROOT, prism, slurm_command, wait_for

STEPS = 200
BUSY_S = 55  # how long the run that is disturbed has work for: Slurm looks at time limits each 30 s

DEFECT = """
import os
if os.environ.get("RANK") == "1":
    from megatron_prism.train import schedule
    schedule.lr_at.__code__ = (lambda step, steps, lr, schedule: {}["planted"]).__code__
"""  # a sitecustomize.py: on one rank of two, our code looks up what is not there


def losses(run_dir: Path) -> dict[int, float]:
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def starts(run_dir: Path) -> list[int]:
    """Return after which step each start of a run went on."""
    return [start["plan"]["resumes_at_step"] for start in json.loads((run_dir / "manifest.json").read_text())["starts"]]


def step_s(run_dir: Path) -> float:
    """Return the seconds of a step of the run where nothing is in its way: nine of ten steps are slower."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.quantiles([line["step_s"] for line in lines if "step_s" in line], n=10)[0]


class Submission:
    """Something that was submitted, and what its scripts note."""

    def __init__(self, folder: Path, *arguments: object):
        self.folder = folder
        result = folder.parents[1] / f"{folder.parent.name}-submitted.json"
        prism("submit", "--cluster", CLUSTER, "--json", result, "--", *arguments)
        self.jobs = {stage["name"]: stage["job"] for stage in json.loads(result.read_text())["stages"]}

    def events(self, stage: str) -> list[str]:
        path = self.folder / f"{stage}.events"
        return [line.split(" ", 2)[2] for line in path.read_text().splitlines()] if path.is_file() else []

    def wait(self, stage: str, event: str, count: int = 1) -> None:
        wait_for(lambda: sum(what.startswith(event) for what in self.events(stage)) >= count, f"{stage}: {count} x {event}", self.folder)

    def start_again(self, stage: str, count: int, *changes: str) -> None:
        """Let a job start that was requeued (it would wait two minutes), and wait until it has."""
        job = self.jobs[stage]
        wait_for(lambda: "JobState=PENDING" in slurm_command("scontrol", "show", "job", job), f"{stage} is requeued", self.folder)
        time.sleep(2)  # a node kills a job that starts in the second in which its last start was revoked
        slurm_command("scontrol", "update", f"JobId={job}", "StartTime=now", *changes)
        self.wait(stage, "start", count)


class Scene:
    """All of it: what was submitted where, and what befell it."""

    def __init__(self, root: Path, checkpoint: Path, tokenizer: Path):
        self.root = root
        (root / "text.txt").write_text("\n\n".join(f"The sum of {a} and {b} is {a + b}." for a in range(60) for b in range(30)))
        source = {"name": "math", "weight": 100, "path": [str(root / "text.txt")], "split": "paragraph", "valid_percent": 10}
        train = {
            "run_dir": str(root / "run"),
            "world_size": 2,
            "init": {"checkpoint": str(checkpoint)},
            "data": {"prepared": str(root / "data"), "seq_length": 64},
            "batch": {"global_size": 16, "micro_size": 4},
            "steps": STEPS,
            "precision": "fp32",
            "schedule": {"kind": "constant"},  # so that the first steps of a longer run are those of a shorter one
            "validation": {"sequences": 4},
        }
        pipeline = {
            "name": "three",
            "run_dir": str(root / "pipeline"),
            "stages": [
                {
                    "name": "export",
                    "after": ["train"],
                    "command": ["convert", "export", "--ckpt", str(root / "run"), "--out", str(root / "hf")],
                },
                {"name": "prepare", "command": ["prepare", str(root / "mixture.yaml")]},
                {"name": "train", "after": ["prepare"], "command": ["train", str(root / "train.yaml")]},
            ],
        }
        failing, defective = (
            {
                "name": name,
                "run_dir": str(root / name),
                "stages": [
                    {"name": "train", "command": ["train", str(root / "train.yaml"), f"run_dir={root / run}"]},
                    {
                        "name": "next",
                        "after": ["train"],
                        "command": ["convert", "export", "--ckpt", str(root / run), "--out", str(root / "never")],
                    },
                ],
            }
            for name, run in (("failing", "killed"), ("defective", "wrong"))
        )
        (root / "defect").mkdir()
        (root / "defect" / "sitecustomize.py").write_text(DEFECT)
        configs: dict[str, Any] = {"train": train, "pipeline": pipeline, "failing": failing, "defective": defective}
        configs["mixture"] = {"out": str(root / "data"), "tokenizer": str(tokenizer), "sources": [source], "num_workers": 1}
        for name, config in configs.items():
            (root / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML

    def play(self) -> None:
        self.pipeline = Submission(self.root / "pipeline" / "slurm", self.root / "pipeline.yaml")
        self.pipeline.wait("prepare", "done")
        self.failing = Submission(self.root / "failing" / "slurm", self.root / "failing.yaml")
        wait_for(lambda: losses(self.root / "killed"), "a step", self.failing.folder)
        self.kill_ranks("1")
        self.failing.start_again("train", 2)
        self.kill_ranks("0", "1")
        self.failing.wait("train", "stopped")
        self.pipeline.wait("export", "done")
        self.defective = Submission(
            self.root / "defective" / "slurm",
            self.root / "defective.yaml",
            f"cluster.environment.PYTHONPATH={self.root / 'defect'}{os.pathsep}{ROOT}",
        )
        self.defective.wait("train", "stopped")
        self.disturb(max(STEPS, round(BUSY_S / step_s(self.root / "run"))))
        self.disturbed.wait("train", "done")

    def kill_ranks(self, *ranks: str) -> None:
        """Kill ranks of the run that fails, as soon as all of them are there."""

        def alive() -> list[psutil.Process]:
            found = []
            for process in psutil.process_iter():
                try:
                    if f"run_dir={self.root / 'killed'}" in process.cmdline() and process.environ().get("RANK") in ranks:
                        found.append(process)
                except (psutil.Error, OSError):
                    continue
            return found if len(found) == len(ranks) else []

        for process in wait_for(alive, f"ranks {ranks}", self.failing.folder):
            process.kill()

    def disturb(self, steps: int) -> None:
        """Preempt the run, let it go on; tell it that its time is nearly up, let it go on once more."""
        run_dir = self.root / "disturbed"
        job = ["train", self.root / "train.yaml", f"run_dir={run_dir}", f"steps={steps}"]
        self.disturbed = Submission(run_dir / "slurm", "cluster.signal_before_s=110", *job)
        wait_for(lambda: len(losses(run_dir)) > 2, "3 steps", self.disturbed.folder)
        slurm_command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        self.disturbed.wait("train", "ended by TERM")
        saved = max(losses(run_dir))
        self.disturbed.start_again("train", 2)
        wait_for(lambda: max(losses(run_dir)) > saved + 2, "steps of the second start", self.disturbed.folder)
        # a time limit of 2 minutes with a notice 110 s before it: Slurm gives it the next time it looks
        slurm_command("scontrol", "update", f"JobId={self.disturbed.jobs['train']}", "TimeLimit=2")
        self.disturbed.wait("train", "saved")
        self.disturbed.start_again("train", 3, "TimeLimit=10")
