"""Runs of a tiny model that are killed, starved, damaged and asked to stop: as children forked from one warm process, or as real gangs."""

from __future__ import annotations

import io
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

import psutil
import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
MODEL = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 384,
    "max_position_embeddings": 64,
}
Cases = Callable[[list[dict[str, Any]]], dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def base_config(tiny_tokenizer: Path, tiny_mixture: Path) -> dict[str, Any]:
    """Return a training run from scratch, every key but its run_dir."""
    return {
        "steps": 6,
        "precision": "fp32",
        "init": {"tokenizer": str(tiny_tokenizer)},
        "model": MODEL,
        "data": {"prepared": str(tiny_mixture), "seq_length": 32},
        "batch": {"global_size": 4, "micro_size": 2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "validation": {"sequences": 4},
        "save": {"interval": 2, "keep_last": 2},
        "log": {"samples": True},
    }


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a config with some of its keys replaced."""
    return {**base, **{key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in more.items()}}


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any]) -> Cases:
    """Return a function that trains cases one after another, each in a child of one process, and returns {name: {code, stderr, run_dir}}.

    A case: {"name", "run_dir", "config": keys of the base config to replace, "fault": one of worker.py's, or None}.
    """

    def run(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("cases")
        for case in cases:
            case["config"] = merged(base_config, {**case.get("config", {}), "run_dir": str(case["run_dir"])})
            case["run_dir"] = str(case["run_dir"])
        (folder / "cases.json").write_text(json.dumps(cases))
        done = subprocess.run([sys.executable, str(WORKER), str(folder)], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "results.json").read_text())

    return run


def heed_every_signal() -> None:
    """Undo what a shell's `&` and nohup do: they start a process with these signals ignored."""
    for name in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(name, signal.SIG_DFL)


class Gang:
    """`prism train` with several processes, in a session of its own, its output in a file."""

    def __init__(self, config: Path, nproc: int, log: Path, command: list[str] | None = None):
        start = command or [sys.executable, "-m", "megatron_prism.cli", "train", str(config), "--nproc", str(nproc)]
        self.nproc, self.log, self._stream = nproc, log, log.open("w")
        process = subprocess.Popen(start, stdout=self._stream, stderr=self._stream, start_new_session=True, preexec_fn=heed_every_signal)
        self.launcher = psutil.Process(process.pid)

    def ranks(self) -> list[psutil.Process]:
        """Return the trainers: the launcher's children that are no resource trackers; itself where it is alone."""
        if self.nproc == 1:
            return [self.launcher]
        return [
            child
            for child in self.launcher.children()
            if "megatron_prism.cli" in " ".join(child.cmdline()) or "worker" in " ".join(child.cmdline())
        ]

    def kill_all(self) -> None:
        """SIGKILL the launcher, all ranks and their children."""
        everyone = [self.launcher, *self.launcher.children(recursive=True)]
        for process in everyone:
            with_suppressed(process.kill)
        psutil.wait_procs(everyone, timeout=20)
        self._stream.close()

    def wait(self, timeout_s: float = 120.0) -> int:
        """Return the exit code; fail the test, with the output, where it does not come."""
        try:
            return self.launcher.wait(timeout_s)
        except psutil.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output()[-4000:]}") from None
        finally:
            self._stream.close()

    def output(self) -> str:
        return self.log.read_text()


def with_suppressed(action: Callable[[], Any]) -> None:
    """Do something to a process that may be gone."""
    try:
        action()
    except (psutil.NoSuchProcess, ProcessLookupError):
        return


@pytest.fixture
def start_gang(tmp_path: Path, base_config: dict[str, Any]) -> Iterator[Callable[..., Gang]]:
    """Return a function that starts a gang on a run folder; whatever still runs at the end is killed."""
    started: list[Gang] = []

    def start(nproc: int = 2, fault: dict[str, Any] | None = None, **config: Any) -> Gang:
        number = len(started)
        path = tmp_path / f"config{number}.yaml"
        path.write_text(json.dumps(merged(base_config, {"run_dir": str(tmp_path / "run"), **config})))  # JSON is YAML
        command = [sys.executable, str(WORKER), "--gang", str(nproc), str(path), json.dumps(fault)] if fault else None
        started.append(Gang(path, nproc, tmp_path / f"log{number}.txt", command))
        return started[-1]

    yield start
    for gang in started:
        if gang.launcher.is_running() and gang.launcher.status() != psutil.STATUS_ZOMBIE:
            gang.kill_all()


def losses(run_dir: Path) -> dict[int, float]:
    """Return a run's training losses by step."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def samples(run_dir: Path) -> list[int]:
    """Return the sequences that a run has read, of all ranks, in order of step."""
    lines = [json.loads(line) for path in (run_dir / "samples").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [sample["sequence"] for line in sorted(lines, key=lambda line: line["step"]) for sample in line["samples"]]


def wait_for(condition: Callable[[], bool], gang: Gang, timeout_s: float = 90.0) -> None:
    """Wait until a condition holds, looking often; fail where the gang ends or the time passes first."""
    ends = time.monotonic() + timeout_s
    while not condition():
        assert gang.launcher.is_running() and gang.launcher.status() != psutil.STATUS_ZOMBIE, f"the gang ended:\n{gang.output()[-4000:]}"
        assert time.monotonic() < ends, f"not in {timeout_s} s:\n{gang.output()[-4000:]}"
        time.sleep(0.02)


def send(process: psutil.Process, name: str) -> None:
    """Send a signal by name."""
    with_suppressed(lambda: process.send_signal(getattr(signal, name)))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of random moments; it is printed with what fails."""
    given = request.config.getoption("--soak-seed")
    return random.SystemRandom().randrange(2**32) if given is None else given


@pytest.fixture
def figures() -> Callable[..., None]:
    """Return a function that prints what was counted and timed, for tools/soak.py (pytest -s)."""
    return lambda **values: print("figures:", json.dumps(values))


class Payload:
    """Becomes, when it is unpickled, the command that leaves the marker."""

    def __init__(self, marker: Path):
        self.command = f"echo ran > {marker}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def saved(value: Any) -> bytes:
    """Return what torch.save makes of a value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"
