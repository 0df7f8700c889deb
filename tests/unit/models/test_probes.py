"""The probes of `prism doctor`: right kernels hold, a kernel with a fault does not; a broken or absent kernel is told with its reason."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_prism.jobs import doctor
from megatron_prism.models import probes
from megatron_prism.models.probes import Outcome, Probe


@pytest.mark.slow
def test_right_kernels_hold_and_each_fault_is_seen() -> None:
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("probe_worker.py"))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["right"]) == 10 and all(told["right"].values()), told["right"]
    assert len(told["faulty"]) == 8 and not any(told["faulty"].values()), told["faulty"]


def test_every_probe_stands_once_and_says_what_its_absence_costs() -> None:
    assert len({probe.name for probe in probes.PROBES}) == len(probes.PROBES) == 14
    assert all(probe.absence_costs for probe in probes.PROBES)


@pytest.mark.parametrize(
    ("program", "state", "detail"),
    [
        ('print(\'noise\'); print(\'{"error": 0.01, "ms": 1.5, "detail": "fused"}\')', "works", "fused"),
        ('print(\'{"error": 0.5, "ms": 1.5, "detail": "fused"}\')', "broken", "relative error 0.5, at most 0.02 fused"),
        ('print(\'{"error": Infinity, "ms": 1.5, "detail": "unfused"}\')', "broken", "relative error inf, at most 0.02 unfused"),
        ('print(\'{"error": NaN, "ms": 1.5, "detail": ""}\')', "broken", "relative error nan"),
        ("raise ImportError('libcudnn.so.9: no such file')", "broken", "ImportError: libcudnn.so.9: no such file"),
        ("import os; os.kill(os.getpid(), 11)", "broken", "exit code -11"),
        ("import time; time.sleep(60)", "broken", "no answer within 1 s"),
    ],
)
def test_a_kernel_is_told_by_what_its_process_does(monkeypatch: pytest.MonkeyPatch, program: str, state: str, detail: str) -> None:
    run = subprocess.run
    monkeypatch.setattr(doctor, "PROBE_LIMIT_S", 1)
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **options: run([sys.executable, "-c", program], **options))
    monkeypatch.setattr(probes, "PROBES", (Probe("one", partial(Outcome, 0.0, 0.0), ("json",), 0.02, "costs"),))
    kernels = list(doctor.run_kernels())
    assert [(kernel.name, kernel.state, kernel.absence_costs) for kernel in kernels] == [("one", state, "costs")]
    assert detail in kernels[0].detail


def test_a_kernel_without_its_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBES", (Probe("one", partial(Outcome, 0.0, 0.0), ("no_such_package",), 0.02, "costs"),))
    assert [(kernel.state, kernel.detail) for kernel in doctor.run_kernels()] == [("absent", "without no_such_package")]
