"""The oracle's Mamba layers compute with torch on the host, also where the CUDA kernels that transformers prefers are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KERNELS = {
    "mamba_ssm/__init__.py": "",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/ssd_combined.py": "def mamba_chunk_scan_combined(*args, **more): raise RuntimeError('a CUDA kernel was called')\n",
    "causal_conv1d/__init__.py": "def causal_conv1d_fn(*args, **more): raise RuntimeError('a CUDA kernel was called')\n",
}
PROGRAM = """
import sys, torch
from pathlib import Path
from megatron_prism.checkpoint import reference
import mamba_ssm
if sys.argv[2] == "control":
    reference.KERNELS = ()
model = reference.load(Path(sys.argv[1]), torch.float32)
assert model(torch.arange(40)[None]).logits.isfinite().all()
import causal_conv1d
assert sys.modules["mamba_ssm"] is mamba_ssm
"""


@pytest.mark.parametrize(("family", "case"), [("nemotron_h", "mended"), ("nemotron_h", "control"), ("granite_h_micro", "mended")])
def test_no_kernel_is_called_on_the_host(folders: dict[str, Path], tmp_path: Path, family: str, case: str) -> None:
    """With the mend taken out, the control, transformers 5.24 calls them."""
    for name, text in KERNELS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-c", PROGRAM, str(folders[family] / "hf"), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode == 0) == (case != "control"), done.stderr[-2000:]
    assert ("a CUDA kernel was called" in done.stderr) == (case == "control"), done.stderr[-2000:]
