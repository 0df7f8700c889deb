"""Training under a real Slurm of two virtual nodes (tools/slurm_cluster.sh), all through `prism submit`: a gang over two nodes, gloo.

Six submissions share the cluster: a pipeline prepare -> train -> export; the same run again, preempted and told that its time is up;
a run whose ranks are killed and one that meets a defect of ours, each with a stage that waits for it; and, before them, a mixture that a
job array prepares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_prism.core.config import ClusterConfig
from megatron_prism.launch.slurm import Job, render, submit
from tests.distributed.toy_rl import write_prompts
from tests.e2e.slurm_scene import STEPS, Scene, Submission, losses, starts
from tests.slurm import CLUSTER, ROOT, prism, running, slurm_command, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    yield from running()


@pytest.fixture(scope="module")
def scene(slurm: None, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_tokenizer: Path) -> Iterator[Scene]:
    """Return the scene when all of it has been played; what is left of it in the queue is cancelled."""
    root = tmp_path_factory.mktemp("slurm")
    scene = Scene(root, tiny_checkpoint, tiny_tokenizer)
    try:
        scene.play()
        yield scene
    finally:
        jobs = [
            job
            for path in root.glob("*/slurm/submitted.json")
            for job in (stage["job"] for stage in json.loads(path.read_text())["stages"])
        ]
        slurm_command("scancel", *jobs)


def test_a_run_over_two_nodes_finishes(scene: Scene) -> None:
    assert list(losses(scene.root / "run")) == list(range(1, STEPS + 1))
    assert [what.split(" on ")[0] for what in scene.pipeline.events("train")] == ["start 0", "done"]
    assert json.loads((scene.root / "run" / "manifest.json").read_text())["starts"][0]["plan"]["world_size"] == 2


def test_a_preempted_run_is_requeued_and_computes_the_same(scene: Scene) -> None:
    events, (_, resumed_at, _) = scene.disturbed.events("train"), starts(scene.root / "disturbed")
    assert events[1] == "TERM: the tasks save if they can"
    assert events[2].startswith("ended by TERM with exit code 3")
    assert 2 < resumed_at < STEPS, "the preemption came too late to compare what follows it"
    ours, theirs = losses(scene.root / "disturbed"), losses(scene.root / "run")
    assert {step: ours[step] for step in theirs} == theirs


def test_a_run_near_its_time_limit_saves_and_goes_on(scene: Scene) -> None:
    events, (_, preempted_at, saved_at) = scene.disturbed.events("train"), starts(scene.root / "disturbed")
    assert events[3].startswith("start 1")
    assert events[4:6] == ["USR1: the tasks are told to save", "saved: to be started again"]
    assert events[6].startswith("start 2") and events[7:] == ["done"]
    assert saved_at > preempted_at
    ours = losses(scene.root / "disturbed")
    assert list(ours) == list(range(1, len(ours) + 1)) and len(ours) > saved_at


def test_a_hangup_of_the_tasks_and_an_interrupt_of_the_script_save_the_run(scene: Scene) -> None:
    run_dir = scene.root / "hung_up"
    run = Submission(run_dir / "slurm", "train", scene.root / "train.yaml", f"run_dir={run_dir}", "steps=100000")
    try:
        wait_for(lambda: len(losses(run_dir)) > 2, "3 steps", run.folder)
        slurm_command("scancel", "--signal=HUP", run.jobs["train"])
        run.wait("train", "saved")
        first = max(losses(run_dir))
        run.start_again("train", 2)
        wait_for(lambda: max(losses(run_dir)) > first + 2, "steps of the second start", run.folder)
        slurm_command("scancel", "--signal=INT", "--batch", run.jobs["train"])
        run.wait("train", "saved", 2)
    finally:
        slurm_command("scancel", run.jobs["train"])
    events = run.events("train")
    assert [what.split(" on ")[0] for what in events] == [
        "start 0",
        "saved: to be started again",
        "start 1",
        "INT: the tasks are told to save",
        "saved: to be started again",
    ]
    (log,) = run.folder.glob("train.*.out")
    assert f"stopped by SIGHUP after step {first}, which is saved" in log.read_text() and "Traceback" not in log.read_text()
    assert starts(run_dir) == [0, first]


def test_reinforcement_learning_saves_at_a_notice_and_goes_on(slurm: None, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The signal that Slurm gives near a time limit, sent by hand; the responses of the second start follow those of the first."""
    run_dir, root = tmp_path / "rl", tmp_path / "set"
    config = {
        "run_dir": str(run_dir),
        "world_size": 2,
        "steps": 100_000,
        "prompts": str(write_prompts(root)),
        "precision": "fp32",
        "init": {"checkpoint": str(tiny_checkpoint)},
        "rollout": {"num_prompts": 4, "num_samples": 4, "max_tokens": 8, "keep": True},
        "batch": {"seq_length": 64},
        "algorithm": {"keep_zero_variance": True},  # the real grader finds nothing right here
    }
    (tmp_path / "rl.yaml").write_text(json.dumps(config))
    run = Submission(run_dir / "slurm", "rl", tmp_path / "rl.yaml")
    try:
        wait_for(lambda: len(losses(run_dir)) > 2, "3 steps", run.folder)
        slurm_command("scancel", "--signal=USR1", "--batch", run.jobs["rl"])
        run.wait("rl", "saved")
        first = max(losses(run_dir))
        run.start_again("rl", 2)
        wait_for(lambda: max(losses(run_dir)) > first + 2, "steps of the second start", run.folder)
        shown = prism("status", run_dir)
    finally:
        slurm_command("scancel", run.jobs["rl"])
    assert [what.split(" on ")[0] for what in run.events("rl")][:4] == [
        "start 0",
        "USR1: the tasks are told to save",
        "saved: to be started again",
        "start 1",
    ]
    assert starts(run_dir) == [0, first] and "reward" in shown
    ours = losses(run_dir)
    assert list(ours) == list(range(1, len(ours) + 1))
    responses = [(run_dir / "rollouts" / f"step_{step:08d}.jsonl").read_text() for step in (first, first + 1)]
    assert responses[0] != responses[1]
    prism("convert", "export", "--ckpt", run_dir, "--out", tmp_path / "hf")  # what a reference is beside does not hinder it
    assert (tmp_path / "hf" / "model.safetensors").is_file()


NOTICE = """
from megatron_prism.parallel import launch
heed = launch.heed_signals_while_starting
def heed_and_be_told():
    import os, signal
    heed()
    os.kill(os.getpid(), signal.SIGUSR1)
launch.heed_signals_while_starting = heed_and_be_told
"""  # a sitecustomize.py: Slurm's notice comes before the first step


def test_a_run_whose_starts_make_no_step_is_not_requeued_for_ever(scene: Scene) -> None:
    (scene.root / "notice").mkdir()
    (scene.root / "notice" / "sitecustomize.py").write_text(NOTICE)
    run_dir, path = scene.root / "no_step", f"cluster.environment.PYTHONPATH={scene.root / 'notice'}{os.pathsep}{ROOT}"
    run = Submission(run_dir / "slurm", path, "train", scene.root / "train.yaml", f"run_dir={run_dir}")
    run.wait("train", "no progress")
    run.start_again("train", 2)
    run.wait("train", "stopped")
    assert [what.split(" on ")[0] for what in run.events("train")] == [
        "start 0",
        "no progress: exit code 3, and the newest checkpoint is still none",
        "start 1",
        "stopped: no progress in two starts; raise time_limit, or lower signal_before_s, and submit again",
    ]
    query = ("squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={run.jobs['train']}")
    wait_for(lambda: slurm_command(*query).strip() == "FAILED", "the job's end", run.folder)


def test_while_squeue_does_not_answer_nothing_is_submitted(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = scene.root / "asked"
    job = ("cluster.sbatch=[--hold]", "train", scene.root / "train.yaml", f"run_dir={run_dir}")
    run = Submission(run_dir / "slurm", *job)
    again = ("submit", "--cluster", CLUSTER, "--", *job)
    try:
        (tmp_path / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2\nexit 1\n")
        (tmp_path / "squeue").chmod(0o755)
        with monkeypatch.context() as shadowed:
            shadowed.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            assert "squeue does not answer, asked 5 times" in prism(*again, code=4)
            assert "unknown" in prism("status", run_dir)
        monkeypatch.setenv("SQUEUE_USERS", "nobody")  # an option that would hide the job
        assert f"job {run.jobs['train']} (train)" in prism(*again, code=2)
        assert slurm_command("squeue", "--noheader", "--user=root", "--format=%o").split() == [str(run.folder / "train.sbatch")]
    finally:
        slurm_command("scancel", run.jobs["train"])
    wait_for(lambda: "PENDING" not in prism("status", run_dir), "the job's end", run.folder)


def test_a_failing_rank_stops_the_job_after_its_restarts(scene: Scene) -> None:
    events = scene.failing.events("train")
    assert [what.split(" on ")[0] for what in events[:4]] == ["start 0", "fault: exit code 4", "start 1", "fault: exit code 4"], events
    assert events[4].startswith("stopped: all 1 restarts after faults are used up (max_restarts)") and len(events) == 5


def test_a_defect_ends_the_job_at_its_first_start(scene: Scene) -> None:
    start, end = scene.defective.events("train")
    assert start.startswith("start 0") and end.startswith("stopped: exit code 70, a defect in megatron_prism")
    (log,) = (scene.root / "defective" / "slurm").glob("train.*.out")
    assert "KeyError: 'planted'" in log.read_text() and "please report it" in log.read_text()


@pytest.mark.parametrize("which", ["failing", "defective"])
def test_what_waits_for_a_job_that_failed_never_starts(scene: Scene, which: str) -> None:
    submission = getattr(scene, which)
    state = wait_for(
        lambda: slurm_command("squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={submission.jobs['next']}").strip(),
        "a state",
        scene.root,
    )
    assert state == "CANCELLED"
    assert submission.events("next") == []


def test_a_pipeline_of_three_stages_runs_through(scene: Scene) -> None:
    for stage in ("prepare", "train", "export"):
        assert scene.pipeline.events(stage)[-1] == "done"
    assert (scene.root / "hf" / "config.json").is_file() and list((scene.root / "hf").glob("*.safetensors"))


def test_submitted_again_nothing_is_done_twice(scene: Scene) -> None:
    again = prism("submit", scene.root / "pipeline.yaml", "--cluster", CLUSTER)
    assert again.count("done_before True") == 3
    assert "done" in scene.pipeline.events("train")


def test_status_tells_all_that(scene: Scene, tmp_path: Path) -> None:
    shown = prism("status", scene.root / "disturbed", "--json", tmp_path / "one.json")
    (row,) = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert row["step"] == row["steps"] == row["checkpoint_step"] == len(losses(scene.root / "disturbed"))
    assert (row["restarts"], row["faults"], row["left_s"]) == (2, 0, 0)
    assert row["last_event"].endswith(" done") and row["job"] in shown
    prism("status", scene.root / "failing", "--json", tmp_path / "failing.json")
    first, second = json.loads((tmp_path / "failing.json").read_text())["rows"]
    assert (first["stage"], first["state"], first["faults"]) == ("train", "FAILED", 2)
    assert (second["stage"], second["state"], second["last_event"]) == ("next", "CANCELLED", None)


TEXTS = [
    "it's",
    'a "b" c',
    "a\\b",
    "a\\",
    "\\",
    "#a",
    "a # b",
    "$(x) `y` ${z}",
    "a;b|c&d>e<f",
    "caf\u00e9 \u4e2d\u6587 \U0001f600",
    "%j %%",
    "--x=y",
    "'",
    '"',
    '\\"',
    "a  b",
    "*?[a]{b,c}~!",
]


def test_sbatch_reads_an_option_as_it_was_written(slurm: None, tmp_path: Path) -> None:
    def comment(text: str) -> str:
        cluster = ClusterConfig(gpus_per_node=0, processes_per_node=1, sbatch=("--hold", f"--comment={text}"))
        script = tmp_path / "a.sbatch"
        script.write_text(render(Job("a", "a", tmp_path, ("doctor",)), cluster))
        job = submit(script)
        found = slurm_command("squeue", "--noheader", f"--jobs={job}", "--format=%k").removesuffix("\n")
        slurm_command("scancel", job)
        return found

    assert [comment(text) for text in TEXTS] == TEXTS


def test_a_mixture_is_prepared_by_a_job_array_of_which_a_task_is_killed(slurm: None, tmp_path: Path, tiny_tokenizer: Path) -> None:
    """The task alone is made again, the job that finishes the mixture waits for it, and the bytes are those of one process."""
    (tmp_path / "text").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": f"The sum of {a} and {b} is {a + b}, in file {number}. " * 4}) for a in range(90) for b in range(100)]
        (tmp_path / "text" / f"{number}.jsonl").write_text("\n".join(lines))
    source = {"name": "math", "weight": 100, "path": [str(tmp_path / "text" / "*.jsonl")], "valid_percent": 5, "dedup": "exact"}
    config = {"tokenizer": str(tiny_tokenizer), "sources": [source], "num_workers": 1, "tokens": 1_200_000}
    for name in ("alone", "array"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config | {"out": str(tmp_path / name)}))
    array = Submission(tmp_path / "array.slurm", "cluster.cpu.prepare_tasks=4", "prepare", tmp_path / "array.yaml")
    assert list(array.jobs) == ["prepare-tasks", "prepare"]
    kill_when(lambda words: "1/4" in words and str(tmp_path / "array.yaml") in words, array.folder)
    array.wait("prepare-tasks_1", "fault: exit code 137")
    assert not (tmp_path / "array").exists() and not array.events("prepare")
    array.jobs["prepare-tasks_1"] = f"{array.jobs['prepare-tasks']}_1"
    array.start_again("prepare-tasks_1", 2)
    array.wait("prepare", "done")
    starts_of = [sum(event.startswith("start") for event in array.events(f"prepare-tasks_{task}")) for task in range(4)]
    assert starts_of == [1, 2, 1, 1] and [event.split(" on ")[0] for event in array.events("prepare")] == ["start 0", "done"]
    prism("prepare", tmp_path / "alone.yaml")
    alone, made = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"}
        for folder in (tmp_path / "alone", tmp_path / "array")
    )
    assert made == alone and len(made) > 100


def kill_when(is_wanted: Callable[[list[str]], bool], folder: Path) -> None:
    """Kill the process of these words once it has made a shard."""

    def alive() -> list[psutil.Process]:
        wanted = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if "python" in process.exe() and is_wanted(words):
                    wanted.append(process)
            except (psutil.Error, OSError):
                continue
        return wanted if any(folder.with_suffix(".partial").glob("*/*.json")) else []

    for process in wait_for(alive, "a task at work", folder):
        process.kill()
