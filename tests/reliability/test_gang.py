"""Promises of docs/RELIABILITY.md on real torchrun gangs: `prism train --nproc 2`, killed, stopped, signalled and started again.

The sizes are the continuous ones; tools/soak.py asks for more and prints the seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_prism.checkpoint import integrity, run_folder

from .conftest import Gang, losses, samples, send, wait_for

pytestmark = pytest.mark.slow

LONG = {"steps": 4000, "save": {"interval": 5, "keep_last": 3}}  # never reached: the tests stop it
Start = Callable[..., Gang]


def last_step(run_dir: Path) -> int:
    """Return the step that was written last: looked for from the end, because waiting looks often."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("}") and '"loss": ' in line), 0)


def wait_for_a_step(gang: Gang, run_dir: Path, beyond: int) -> None:
    wait_for(lambda: last_step(run_dir) > beyond, gang)


def check_checkpoints(run_dir: Path) -> int:
    """Every checkpoint that stands is whole; return the newest one's step."""
    found = run_folder.checkpoints(run_dir)
    assert {step: integrity.check(path) for step, path in found.items()} == {step: [] for step in found}
    return max(found, default=0)


def stop(gang: Gang) -> None:
    send(gang.launcher, "SIGTERM")
    assert gang.wait() == 3, gang.output()[-4000:]


def reference(start_gang: Start, tmp_path: Path, steps: int) -> dict[int, float]:
    """Return the losses of an unbroken run of at least so many steps."""
    run_dir = tmp_path / "unbroken"
    gang = start_gang(run_dir=str(run_dir), **LONG)
    wait_for_a_step(gang, run_dir, steps)
    stop(gang)
    return losses(run_dir)


def kill_a_rank(gang: Gang, chance: random.Random) -> None:
    send(chance.choice(gang.ranks()), "SIGKILL")
    assert gang.wait() == 4, "the launcher did not notice that a rank was killed"


def kill_the_launcher(gang: Gang, chance: random.Random) -> None:
    everyone = gang.launcher.children(recursive=True)
    send(gang.launcher, "SIGKILL")
    _, alive = psutil.wait_procs([gang.launcher, *everyone], timeout=30)
    assert not alive and "its launcher is gone" in gang.output()


KILLS: list[Callable[[Gang, random.Random], None]] = [lambda gang, chance: gang.kill_all(), kill_a_rank, kill_the_launcher]


def test_random_kills_lose_nothing(start_gang: Start, tmp_path: Path, soak: int | None, seed: int, figures: Callable[..., None]) -> None:
    """The whole gang, one rank, or the launcher alone is killed at a random moment of training and saving, and the run goes on."""
    chance, run_dir, num_kills = random.Random(seed), tmp_path / "run", soak or 2 * len(KILLS)
    newest, begun, restart_s, ends_s = 0, 0, [], []
    for kill in range(num_kills):
        started = time.monotonic()
        gang = start_gang(**LONG)
        wait_for_a_step(gang, run_dir, begun)
        restart_s.append(time.monotonic() - started)
        time.sleep(chance.uniform(0.0, 0.5))
        at = time.monotonic()
        KILLS[kill % len(KILLS)](gang, chance)
        ends_s.append(time.monotonic() - at)
        found = check_checkpoints(run_dir)
        assert found >= newest, f"kill {kill} (seed {seed}): step {newest} was saved, and is lost"
        newest, begun = found, last_step(run_dir)
    gang = start_gang(**LONG)
    wait_for_a_step(gang, run_dir, begun)
    stop(gang)
    ours, theirs = losses(run_dir), reference(start_gang, tmp_path, last_step(run_dir))
    assert sorted(ours) == list(range(1, len(ours) + 1)) and len(ours) > num_kills
    assert ours == {step: theirs[step] for step in ours}
    assert samples(run_dir) == list(range(4 * len(ours)))
    figures(kills=num_kills, seed=seed, steps=len(ours), start_to_step_s=max(restart_s), kill_to_exit_s=max(ends_s))


def test_no_sequence_is_skipped_or_repeated_on_other_ranks(start_gang: Start, tmp_path: Path) -> None:
    """Three kills, on data-parallel 2, 1, 2 and 2 again; a second gang in the folder of the last is refused, and costs it nothing."""
    run_dir, begun = tmp_path / "run", 0
    for nproc in (2, 1, 2):
        gang = start_gang(nproc, **LONG)
        wait_for_a_step(gang, run_dir, begun + 7)
        gang.kill_all()
        begun = last_step(run_dir)
    gang = start_gang(2, **LONG)
    wait_for_a_step(gang, run_dir, begun)
    other = start_gang(1, **LONG)
    assert other.wait() == 4 and "one prism train at a time" in other.output()
    stop(gang)
    assert sorted(losses(run_dir)) == list(range(1, last_step(run_dir) + 1))
    found = samples(run_dir)
    assert sorted(found) == list(range(4 * last_step(run_dir))) and len(found) > 4 * 21


SIGNALS: dict[str, Callable[[Gang], None]] = {
    "SIGTERM to the launcher": lambda gang: send(gang.launcher, "SIGTERM"),
    "SIGUSR1 to the launcher": lambda gang: send(gang.launcher, "SIGUSR1"),
    "SIGHUP to the launcher": lambda gang: send(gang.launcher, "SIGHUP"),
    "SIGQUIT to the launcher": lambda gang: send(gang.launcher, "SIGQUIT"),
    "Ctrl-C, twice": lambda gang: [(os.killpg(gang.launcher.pid, signal.SIGINT), time.sleep(0.05)) for _ in range(2)] and None,
    "Ctrl-C where the run is one process": lambda gang: os.killpg(gang.launcher.pid, signal.SIGINT),
    "SIGTERM to one rank": lambda gang: send(gang.ranks()[1], "SIGTERM"),
    "both, to everyone, again and again": lambda gang: (
        [
            (send(process, name), time.sleep(0.02))
            for name in ("SIGUSR1", "SIGTERM", "SIGTERM")
            for process in [gang.launcher, *gang.launcher.children(recursive=True)]
        ]
        and None
    ),
}


def test_a_signal_saves_and_ends(start_gang: Start, tmp_path: Path, soak: int | None, seed: int, figures: Callable[..., None]) -> None:
    """Exit code 3, the step that ran is the newest checkpoint, whichever process is told, and however often."""
    chance, run_dir, begun, seconds = random.Random(seed), tmp_path / "run", 0, []
    config = {**LONG, "save": {"interval": 7, "keep_last": 2}, "data": {"num_workers": 1}}
    num_signals = soak or len(SIGNALS)
    for number in range(num_signals):
        how = list(SIGNALS)[number % len(SIGNALS)]
        gang = start_gang(1 if "one process" in how else 2, **config)
        wait_for_a_step(gang, run_dir, begun)
        time.sleep(chance.uniform(0.0, 0.3))
        at = time.monotonic()
        SIGNALS[how](gang)
        assert gang.wait() == 3, f"{how}:\n{gang.output()[-4000:]}"
        seconds.append(time.monotonic() - at)
        begun = last_step(run_dir)
        assert check_checkpoints(run_dir) == begun, how
        assert gang.output().count("prism: stopped by SIG") == 1 and "Traceback" not in gang.output()
        assert not list((run_dir / "checkpoints").glob(".*"))
    figures(signals=num_signals, seed=seed, signal_to_exit_s=max(seconds))


def test_the_wall_clock_saves_and_ends(start_gang: Start, tmp_path: Path) -> None:
    """The checkpoint tells topology, tokens, data position, generators, config hash and versions in prism.json."""
    gang = start_gang(**LONG, limits={"wall_clock_s": 15.0})
    assert gang.wait() == 3 and "stopped by limits.wall_clock_s" in gang.output()
    step = last_step(tmp_path / "run")
    assert check_checkpoints(tmp_path / "run") == step
    facts = json.loads((run_folder.step_folder(tmp_path / "run", step) / "prism.json").read_text())
    assert (facts["step"], facts["tokens"], facts["world_size"], facts["data"]["sequences"]) == (step, 128 * step, 2, 4 * step)
    assert facts["parallel"]["tp"] == 1 and facts["generators"] == "of 2 ranks, in state"
    assert {"versions", "git_commit", "inputs", "config_sha256"} <= set(facts["manifest"]) and "torch" in facts["manifest"]["versions"]
    assert facts["guard"]["losses"] == list(losses(tmp_path / "run").values())[-len(facts["guard"]["losses"]) :]


SILENT_S = 8.0
LIMITS = {
    "limits": {"collective_timeout_s": SILENT_S, "hang_timeout_s": SILENT_S + 4.0},
    "save": {"interval": 5, "keep_last": 3, "timeout_s": SILENT_S / 2},
}
GONE = "another rank is gone or silent"
# what befalls rank 1: (the fault that is built into it, at which exit code the gang ends, and what it says)
SILENT: dict[str, tuple[dict[str, Any] | str, int, str]] = {
    "it stands still": ("SIGSTOP", 4, GONE),
    "its device fails": ({"kind": "device"}, 4, "uncorrectable ECC error"),
    "its loader hangs": ({"kind": "hang"}, 4, GONE),
    "its writer is killed": ({"kind": "writer", "how": "killed"}, 4, "killed by SIGKILL"),
    "its writer stands still": ({"kind": "writer", "how": "stopped"}, 4, "not written after"),
    "its gradients are no numbers": ({"kind": "nonfinite", "site": "gradient nan"}, 1, "not a number; the weights did not take it"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "how" in metafunc.fixturenames:
        count = metafunc.config.getoption("--soak") or len(SILENT)
        metafunc.parametrize("how", [list(SILENT)[number % len(SILENT)] for number in range(count)])


def test_what_befalls_one_rank_ends_the_gang(
    start_gang: Start, tmp_path: Path, how: str, seed: int, figures: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    """No rank waits for ever for another, and the exit code is not 0."""
    (fault, wanted, words), run_dir = SILENT[how], tmp_path / "run"
    step = random.Random(f"{seed} {request.node.name}").randint(2, 12)
    gang = start_gang(fault=None if fault == "SIGSTOP" else {**fault, "rank": 1, "step": step}, **{**LONG, **LIMITS})
    if fault == "SIGSTOP":
        wait_for_a_step(gang, run_dir, step)
        send(gang.ranks()[1], fault)
    code, ended = gang.wait(), time.time()
    assert code == wanted and words in gang.output(), f"{how}, step {step}:\n{gang.output()[-4000:]}"
    check_checkpoints(run_dir)
    figures(how=how, step=step, last_step_to_exit_s=round(ended - (run_dir / "metrics.jsonl").stat().st_mtime, 1))
