"""Signals and the wall clock as reasons to stop, and a process that says where it hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_prism.core.errors import Stopped
from megatron_prism.parallel import launch, signals
from megatron_prism.train import stop


@pytest.mark.parametrize("name", signals.STOPPING)
def test_a_signal_is_remembered_and_a_second_one_changes_nothing(name: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in signals.STOPPING}
    with stop.StopRequest(None) as asked:
        assert asked.reason(0.0) == 0.0
        for each in (name, *signals.STOPPING):
            os.kill(os.getpid(), each)
        assert stop.name(asked.reason(0.0)) == name.name
    assert {each: signal.getsignal(each) for each in signals.STOPPING} == before


@pytest.mark.parametrize("name", signals.TERMINALS)
def test_a_signal_that_nohup_or_a_shell_made_the_process_ignore_stays_ignored(name: signal.Signals) -> None:
    before = signal.signal(name, signal.SIG_IGN)
    try:
        with stop.StopRequest(None) as asked:
            assert signal.getsignal(name) is signal.SIG_IGN
            os.kill(os.getpid(), name)
            assert asked.reason(0.0) == 0.0
            os.kill(os.getpid(), signal.SIGTERM)  # still heeded
            assert stop.name(asked.reason(0.0)) == "SIGTERM"
    finally:
        signal.signal(name, before)


def test_after_it_was_asked_to_stop_a_process_is_deaf_until_its_end() -> None:
    before = {each: signal.getsignal(each) for each in signals.STOPPING}
    try:
        with pytest.raises(Stopped), stop.StopRequest(None):
            raise Stopped("saved")
        assert all(signal.getsignal(each) is signal.SIG_IGN for each in signals.STOPPING)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_the_wall_clock_counts_from_the_start_of_the_process_and_leaves_room() -> None:
    assert stop.name(stop.StopRequest(0.001).reason(0.0)) == "limits.wall_clock_s"
    long = stop.StopRequest(1e6)
    assert long.reason(0.0) == 0.0 and stop.name(long.reason(1e6)) == "limits.wall_clock_s"


def test_the_wall_clock_is_no_clock_of_the_machine_that_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump forth would end a run, one back would let it run into Slurm's limit. Days: the process of the tests may be an hour old."""
    started, asked = time.time(), stop.StopRequest(1e6)
    for jump in (2e6, -2e6):
        monkeypatch.setattr(stop.time, "time", lambda jump=jump: started + jump)
        assert asked.reason(0.0) == 0.0 and stop.name(asked.reason(1e6)) == "limits.wall_clock_s"


HANGS = """
import time
from megatron_prism.train.watchdog import Watchdog
with Watchdog(0.5, 3) as dog:
    dog.doing("in step 7")
    for _ in range({steps}):
        time.sleep(0.2)
        {beat}
"""


@pytest.mark.parametrize(("beat", "code"), [("pass", 4), ("dog.doing('in step 8')", 0)])
def test_a_process_without_progress_ends_and_says_where(beat: str, code: int) -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS.format(steps=8, beat=beat)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("rank 3 on" in done.stderr and "in step 7 for" in done.stderr and "line 7" in done.stderr) == (code == 4)
    assert time.monotonic() - started < 50


def test_a_process_without_progress_ends_where_nobody_hears_why() -> None:
    """Its terminal is closed, or what read its words is gone."""
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([sys.executable, "-c", HANGS.format(steps=50, beat="pass")], stderr=write) as process:
        os.close(write)
    assert process.returncode == 4


ORPHANED = """
import sys, time
from megatron_prism.train.watchdog import Watchdog
with Watchdog(5.0, 0):
    print("ready", flush=True)
    time.sleep(2)
sys.stderr.write("went on")
"""
PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE).stdout.readline()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "went on"),
        ({"WORLD_SIZE": "1"}, "went on"),
        ({"WORLD_SIZE": "2"}, "launcher is gone"),
        ({launch.TORCHRUN: "1"}, "launcher is gone"),
    ],
)
def test_a_rank_ends_with_its_launcher_and_a_process_alone_outlives_its_shell(variables: dict[str, str], said: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", launch.TORCHRUN)}
    done = subprocess.run(
        [sys.executable, "-c", PARENT, ORPHANED], capture_output=True, text=True, timeout=60, env=kept | variables
    )  # its output ends with the orphan
    assert said in done.stderr and ("went on" in done.stderr) == (said == "went on")
