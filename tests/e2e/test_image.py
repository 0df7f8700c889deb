"""The images, as far as they can be shown without an engine: a Dockerfile without faults, and the smoke test that they run as they are built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("hadolint"), path], capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    found = hadolint(ROOT / "Dockerfile")
    assert found.returncode == 0, found.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && pip install x\n")
    assert "DL3006" in hadolint(tmp_path / "Dockerfile").stdout


@pytest.mark.slow
def test_the_smoke_test_passes_here() -> None:
    import torch

    run = [sys.executable, "tools/smoke.py", "--torch"]
    trains = torch.version.cuda is None or torch.cuda.is_available()  # else it says what it did not do, as in the build of the GPU image
    done = subprocess.run([*run, torch.__version__], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("prism generate" in done.stdout, "not trained" in done.stdout) == (trains, not trains), done.stdout
    done = subprocess.run([*run, "0.1"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1 and "required 0.1" in done.stderr
    done = subprocess.run([*run, torch.__version__, "--vllm", "0.1"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1 and "required 0.1" in done.stderr


def test_a_build_without_a_target_gives_the_gpu_image() -> None:
    """BuildKit builds the last stage: the ones for RL and NeMo-Aligner stand before it, and every stage is named in the file's head."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    stages = [line.split() for line in lines if line.startswith("FROM ")]
    assert stages[-1] == ["FROM", "gpu"]
    named = {words[3] for words in stages if len(words) == 4}
    head = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    assert named == {"cpu", "gpu", "rl", "aligner"} and all(f"--target {name} " in head for name in named - {"gpu"})
