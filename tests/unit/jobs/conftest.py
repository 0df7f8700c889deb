"""A folder to submit from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prism.jobs import submit
from tests.unit.jobs.submissions import PREPARE, RL, TRAIN, stub, write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a training config, a mixture, a cluster of eight GPUs a node, and an sbatch that numbers its jobs."""
    monkeypatch.chdir(tmp_path)
    write("train.yaml", TRAIN)
    write("rl.yaml", RL)
    write("mixture.yaml", PREPARE)
    write("cluster.yaml", {"gpus_per_node": 8, "environment": {"NCCL_DEBUG": "WARN", "NCCL_NVLS_ENABLE": "1"}})
    (tmp_path / "bin").mkdir()
    stub(tmp_path, "sbatch", 'echo "$*" >>sbatch.calls; echo "$((100 + $(wc -l <sbatch.calls)))"')
    stub(tmp_path, "squeue", "[ ! -e squeue.says ] || cat squeue.says")
    stub(tmp_path, "sacct", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(submit, "_check_first", lambda planned: None)  # there is neither data nor a checkpoint
    return tmp_path
