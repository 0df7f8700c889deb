"""A study that is killed anywhere goes on where it was, gives the same bytes in the end, and leaves no process behind.

Its stages are cheap: scripts that refuse an output which is there, as prism merge does, and prism prompts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_prism.cli.submit import read_command
from megatron_prism.core.config import StudyConfig
from megatron_prism.core.load import load
from megatron_prism.jobs import study as job
from megatron_prism.jobs import study_stages
from megatron_prism.study import child, record

pytestmark = pytest.mark.slow

SCRIPT = """
import os, subprocess, sys, time
from pathlib import Path

out, seconds, *sources = sys.argv[1:]
pause = float(os.environ.get("PAUSE", seconds))
out = Path(out)
if out.exists():
    sys.exit(f"{out} is there: refused")
# a process in a session of its own, as torchrun's ranks are
helper = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)", str(Path.cwd())], start_new_session=True)
texts = [Path(source).read_text() for source in sources]
out.mkdir(parents=True)
(out / "first").write_text("".join(texts))
time.sleep(pause)
(out / "text").write_text("".join(texts) + f"{out.name}\\n")
(out / "rows.jsonl").write_text('{"problem": "%s", "answer": "1"}\\n' % "".join(texts).split())
helper.kill()
if (marker := Path(f"{out}.fails")).exists():
    sys.exit("it fails")
"""
STOPS = """
import signal, sys, time
from pathlib import Path

out = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (out.with_suffix(".asked").touch(), sys.exit(3)))
out.with_suffix(".ready").touch()
time.sleep(float(sys.argv[2]) if not out.with_suffix(".asked").exists() else 0)
out.write_text("whole")
"""
PROMPTS = {
    "out": "run/set",
    "sources": [{"name": "a", "domain": "math", "kind": "math", "path": ["run/b/rows.jsonl"], "text": "{problem}", "gold": "answer"}],
}


def stage(name: str, *after: str, seconds: float = 0.2) -> dict[str, Any]:
    words = ["work.py", f"run/{name}", str(seconds), *(f"run/{before}/text" for before in after)]
    return {"name": name, "kind": "python", "command": words, "after": list(after), "output": f"run/{name}"}


STAGES = [
    stage("a"),
    stage("b", "a"),
    stage("c", "a"),
    {"name": "set", "command": ["prompts", "prompts.yaml"], "after": ["b"]},
    {
        "name": "d",
        "kind": "python",
        "command": ["work.py", "run/d", "0.2", "run/c/text", "run/set/prompts.jsonl"],
        "after": ["c", "set"],
        "output": "run/d",
    },
]
COMMAND = [sys.executable, "-m", "megatron_prism.cli", "study", "s.yaml"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    Path("work.py").write_text(SCRIPT)
    Path("stops.py").write_text(STOPS)
    Path("prompts.yaml").write_text(json.dumps(PROMPTS))
    write(STAGES)
    yield tmp_path
    left = left_behind(tmp_path)
    for process in left:
        process.kill()
    assert not left


def write(stages: list[dict[str, Any]]) -> None:
    Path("s.yaml").write_text(json.dumps({"name": "s", "run_dir": "run", "stages": stages}))


def left_behind(home: Path) -> list[psutil.Process]:
    """Return the processes of the stages: they work in the study's folder, or name it."""
    processes = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            mine = process.pid != os.getpid() and process.ppid() != os.getpid() and (process.cwd() == str(home) or str(home) in words)
            processes += [process] if mine and process.status() != psutil.STATUS_ZOMBIE else []
        except psutil.Error:
            continue
    return processes


def outputs(run_dir: Path = Path("run")) -> dict[str, bytes]:
    """Return what the stages gave, by path: not the records, and not the manifest, which has the time."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and "study" not in path.parts and path.name != "manifest.json"]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what a study that nobody disturbs gives."""
    home = tmp_path_factory.mktemp("undisturbed")
    before = os.getcwd()
    os.chdir(home)
    try:
        Path("work.py").write_text(SCRIPT)
        Path("prompts.yaml").write_text(json.dumps(PROMPTS))
        write(STAGES)
        subprocess.run(COMMAND, check=True, capture_output=True, env={**os.environ, "PAUSE": "0"})
        return outputs()
    finally:
        os.chdir(before)


def states() -> dict[str, str]:
    return {name: stage["state"] for name, stage in json.loads(Path("run/study/study.json").read_text())["stages"].items()}


def wait_for(what: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (answer := what()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)
    return answer


@pytest.mark.parametrize("victim", ["the study", "anything of it"])
def test_killed_at_random_it_goes_on_and_gives_the_same(home: Path, expected: dict[str, bytes], victim: str) -> None:
    lots, num_kills = random.Random(victim), 0
    for _ in range(30):
        with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            if num_kills < 6:
                wait_for(lambda: Path("run/study/.lock").exists() or process.poll() is not None)
                time.sleep(lots.uniform(0, 0.5))
                everyone = (
                    [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
                )
                if everyone:
                    chosen = everyone[0] if victim == "the study" else lots.choice(everyone)
                    chosen.kill()
                    num_kills += 1
            told = process.communicate()[0]
        wait_for(lambda: not left_behind(home))
        if process.returncode == 0:
            break
    assert process.returncode == 0 and num_kills >= 1, told
    assert set(states().values()) == {"done"} and outputs() == expected


def in_child(act: Callable[[], None]) -> int | None:
    """Run the study in a forked child of this process, after `act` has changed something in it, and return its exit code."""

    def run() -> None:
        os.environ["PAUSE"] = "0"
        act()
        result = job.run(job.read(load(Path("s.yaml"), StudyConfig), read_command))
        sys.exit(0 if all(stage["state"] == "done" for stage in result["stages"].values()) else 1)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    return process.exitcode


def killed_at(number: int, when: str) -> Callable[[], None]:
    """Return what makes the study die at the n-th record that it writes: before it, after it, or between an output's removal and it."""

    def act() -> None:
        written, count = record.write, [0]

        def write_or_die(folder: Path, kept: record.Record) -> None:
            count[0] += 1
            if when == "before" and count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            written(folder, kept)
            if when == "after" and count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        record.write = write_or_die  # type: ignore[assignment]  # in a child that is about to die

    return act


def until_done(act_of: Callable[[int], Callable[[], None]], limit: int = 30) -> int | None:
    """Start the study until it ends, and let the n-th start die at its n-th record."""
    code: int | None = None
    for number in range(1, limit):
        code = in_child(act_of(number))
        if code != -signal.SIGKILL:
            return code
    return code


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_record_it_goes_on_and_gives_the_same(home: Path, expected: dict[str, bytes], when: str) -> None:
    assert until_done(lambda number: killed_at(number, when)) == 0
    assert outputs() == expected


@pytest.mark.parametrize("lies", [False, True])
def test_half_an_output_is_not_taken_for_a_whole_one(home: Path, expected: dict[str, bytes], lies: bool) -> None:
    """lies: the negative control, a study whose record says at a stage's start that it is done."""
    written = record.write

    def at_once(folder: Path, kept: record.Record) -> None:
        written(folder, replace(kept, state="done", output_sum="x") if lies else kept)

    def act() -> None:
        record.write = at_once
        os.environ["PAUSE"] = "60"

    process = multiprocessing.get_context("fork").Process(target=lambda: (act(), in_this_process()))
    process.start()
    wait_for(lambda: Path("run/a/first").exists())
    process.kill()
    process.join()
    wait_for(lambda: not left_behind(home))
    assert (in_child(lambda: None) == 0 and outputs() == expected) is not lies


def test_the_test_sees_a_study_that_leaves_half_an_output_in_the_way(home: Path) -> None:
    def act(number: int) -> Callable[[], None]:
        def both() -> None:
            study_stages.clear = lambda *_: None  # type: ignore[assignment]
            killed_at(number, "before")()

        return both

    assert until_done(act) == 1, "the script refuses what is there"


def test_nothing_outlives_a_killed_study_or_a_killed_stage(home: Path) -> None:
    write([stage("a", seconds=60.0)])
    for victim in ("study", "keeper", "stage"):
        with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            wait_for(lambda: Path("run/a/first").exists())
            keeper = psutil.Process(process.pid).children()[0]
            work = keeper.children()[0]
            helper = work.children()[0]
            {"study": psutil.Process(process.pid), "keeper": keeper, "stage": work}[victim].kill()
            process.wait(20)
        _, alive = psutil.wait_procs([keeper, work, *([helper] if victim != "keeper" else [])], timeout=5)
        assert not alive and (process.returncode == -signal.SIGKILL or states() == {"a": "failed"})
        if victim == "keeper":  # nobody is left to find a process in a session of its own: a stage's own concern, as the ranks' watchdog is
            helper.kill()
        for path in Path("run/a").iterdir():
            path.unlink()


def test_the_test_sees_a_stage_without_a_keeper(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write([stage("a", seconds=60.0)])

    def act() -> None:
        child.start = lambda command, log, environment: child.Child(  # type: ignore[assignment]
            subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, "PAUSE": "60"})
        )

    process = multiprocessing.get_context("fork").Process(target=lambda: (act(), in_this_process()))
    process.start()
    wait_for(lambda: Path("run/a/first").exists())
    process.kill()
    process.join()
    time.sleep(0.5)
    left = left_behind(home)
    assert len(left) == 2
    for each in left:
        each.kill()
    psutil.wait_procs(left, timeout=5)


def in_this_process() -> None:
    job.run(job.read(load(Path("s.yaml"), StudyConfig), read_command))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_asks_its_stages_and_the_next_start_goes_on(home: Path, name: signal.Signals) -> None:
    stops = {"name": "a", "kind": "python", "command": ["stops.py", "run/a.txt", "60"], "output": "run/a.txt"}
    write([stops, stage("b"), {**stage("c"), "after": ["a", "b"]}])
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: Path("run/a.ready").exists() and states()["b"] == "done")
        process.send_signal(name)
        told = process.communicate(timeout=30)[0]
    assert process.returncode == 3 and "the same command goes on" in told
    assert states() == {"a": "stopped", "b": "done", "c": "to run"}
    assert subprocess.run(COMMAND, capture_output=True).returncode == 0
    assert Path("run/a.txt").read_text() == "whole" and set(states().values()) == {"done"}


def test_two_signals_end_a_stage_that_does_not_stop(home: Path) -> None:
    Path("stops.py").write_text(
        STOPS.replace("sys.exit(3)", "None").replace("time.sleep(", "[time.sleep(0.1) for _ in range(999)], time.sleep(")
    )
    write([{"name": "a", "kind": "python", "command": ["stops.py", "run/a.txt", "60"], "output": "run/a.txt"}])
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: Path("run/a.ready").exists())
        process.terminate()
        wait_for(lambda: Path("run/a.asked").exists())
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 3 and states() == {"a": "stopped"}
