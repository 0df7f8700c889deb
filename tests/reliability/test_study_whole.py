"""The tiny study with fewer steps, killed with SIGKILL in each of its stages, or as a chain of Slurm jobs: it finds what an unbroken one finds.

About 15 CPU-minutes, and so not in the continuous tests: python tools/soak.py study
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prism.launch.pipeline import GANG_JOBS
from tests import slurm

pytestmark = [pytest.mark.slow, pytest.mark.skipif("not config.getoption('--soak')", reason="15 CPU-minutes: python tools/soak.py study")]
ROOT = Path(__file__).resolve().parents[2]
STUDY = Path("configs/studies/tiny.yaml")
# what makes a job short; a study that learns nothing has all stages too
SHORT = {
    "train": ["steps=40", "schedule.warmup_steps=5", "save.interval=15", "log.interval=10"],
    "rl": ["steps=3", "save.interval=1", "log.interval=1", "rollout.num_prompts=4", "rollout.num_samples=4"],
    "evaluate": ["tasks.math.limit=20", "tasks.code.limit=20", "tasks.science.limit=20"],
    "analyze landscape": ["plane_size=0", "keep_largest=[0.2]", "num_nulls=1"],
    "analyze cka": ["num_prompts=30", "num_subsamples=4", "subsample=15"],
}
TIMED = ("pipeline", "cost", "training_runs")  # tables of the report that say how long things took
MOST_DELAY_S = 4.0
MOST_S = 3600.0  # of the chain on Slurm: 65 jobs on two nodes


def write(root: Path, name: str, **variables: str) -> Path:
    """Write the tiny study with fewer steps of each job, and return its folder, which has the same name for all: the report shows it."""
    run_dir = root / name / "tiny"
    study = short(str(run_dir))
    study["variables"] |= variables
    (root / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return run_dir


def short(run_dir: str) -> dict[str, Any]:
    """Return the tiny study with fewer steps of each job. On Slurm a gang's config must say its size."""
    study = yaml.safe_load((ROOT / STUDY).read_text())
    for stage in study["stages"]:
        words = stage["command"]
        job = " ".join(words[:2]) if words[0] in ("analyze", "convert") or words[:2] == ["evaluate", "compare"] else words[0]
        changed = ["data.changes.0.step=20"] if "ordered" in stage["name"] and job == "train" else []
        size = ["world_size=1"] if job in GANG_JOBS else []
        stage["command"] = [*words, *SHORT.get(job, []), *size, *changed]
    return {**study, "run_dir": run_dir}


def command(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("ab") as stream:
        words = [sys.executable, "-m", "megatron_prism.cli", "study", str(config)]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True)


def stages(run_dir: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads((run_dir / "study" / "study.json").read_text())["stages"])
    except OSError:
        return {}


def kill_in_each_stage(
    start: Callable[[], subprocess.Popen[bytes]], run_dir: Path, draw: random.Random, num_kills: int, seconds: dict[str, float]
) -> dict[str, int]:
    """Run a study, and kill it that often in each stage, at a random moment. Return how often each stage was running at a kill.

    seconds: what each stage takes, so that the blow comes before a short one is over.
    """
    struck: dict[str, int] = {}
    child = start()
    while child.poll() is None:
        running = [name for name, stage in stages(run_dir).items() if stage["state"] == "running" and struck.get(name, 0) < num_kills]
        if not running:
            time.sleep(0.05)
            continue
        time.sleep(draw.uniform(0, min(MOST_DELAY_S, *(0.8 * seconds[name] for name in running))))
        hit = [name for name, stage in stages(run_dir).items() if stage["state"] == "running"]
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        for name in hit:
            struck[name] = struck.get(name, 0) + 1
        child = start()
    assert child.returncode == 0
    return struck


def findings(run_dir: Path, status: Path | None = None) -> dict[str, Any]:
    """Return what the study found: its claims, and the report's tables but those of times, without the name of its folder."""
    study = json.loads((status or run_dir / "study" / "study.json").read_text())
    tables = {path.name: path.read_text() for path in (run_dir / "report" / "tables").iterdir() if not path.name.startswith(TIMED)}
    assert len(tables) > 60
    return json.loads(json.dumps({"claims": study["claims"], **tables}).replace(str(run_dir), "RUN_DIR"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unbroken study."""
    root = tmp_path_factory.mktemp("whole")
    run_dir = write(root, "whole")
    assert command(root / "whole.yaml", root / "whole.log").wait() == 0, (root / "whole.log").read_text()[-4000:]
    return run_dir


def test_a_study_killed_in_each_stage_ends_as_one_that_nobody_killed(
    tmp_path: Path, soak: int, seed: int, figures: Callable[..., None], whole: Path
) -> None:
    killed, other = write(tmp_path, "killed"), write(tmp_path, "other", seed="2")

    def start(name: str) -> subprocess.Popen[bytes]:
        return command(tmp_path / f"{name}.yaml", tmp_path / f"{name}.log")

    seconds = {name: stage["seconds"] for name, stage in stages(whole).items()}
    struck = kill_in_each_stage(lambda: start("killed"), killed, random.Random(seed), soak, seconds)
    figures(kills=sum(struck.values()), stages_struck=len(struck), missed=[name for name in seconds if name not in struck])
    assert set(struck) == set(seconds)
    assert findings(killed) == findings(whole)
    assert start("other").wait() == 0
    assert findings(other) != findings(whole)  # the control: another seed


@pytest.fixture
def cluster() -> Iterator[None]:
    yield from slurm.running()


def test_a_study_as_a_chain_of_slurm_jobs_ends_as_one_at_home(
    tmp_path: Path, cluster: None, figures: Callable[..., None], whole: Path
) -> None:
    run_dir = write(tmp_path, "chain")
    study = ("study", tmp_path / "chain.yaml")
    began = time.monotonic()
    slurm.prism(*study, "--cluster", slurm.CLUSTER)
    folder = run_dir / "slurm"
    jobs = {entry["name"]: entry["job"] for entry in json.loads((folder / "submitted.json").read_text())["stages"]}
    try:
        slurm.wait_for(
            lambda: not slurm.slurm_command("squeue", "--noheader", "--jobs", ",".join(jobs.values())), "all jobs", folder, MOST_S
        )
    finally:
        slurm.slurm_command("scancel", *jobs.values())
    slurm.prism(*study, "--status", "--json", status := tmp_path / "status.json")
    states = {name: stage["state"] for name, stage in json.loads(status.read_text())["stages"].items()}
    figures(jobs=len(jobs), minutes=(time.monotonic() - began) / 60)
    assert set(states.values()) <= {"done", "no-go"} and len(states) == len(jobs) > 60, states
    assert findings(run_dir, status) == findings(whole)
