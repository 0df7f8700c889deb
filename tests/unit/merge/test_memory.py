"""A merge holds pieces of tensors, whatever the models' size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PEAK = Path(__file__).parents[1] / "checkpoint" / "peak.py"  # its control, a model held at once: tests/unit/checkpoint/test_convert.py


def test_a_merge_holds_less_than_two_shards(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Two models of two shards each. Held whole, one of them would be as much as the bound."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1280, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 500}
    for name, changes in (("large", sizes), ("tiny", {})):
        (tmp_path / name).mkdir()
        make_folder(tmp_path / name / "0", changes, 2)
        shutil.copytree(tmp_path / name / "0", tmp_path / name / "1")
    command = [sys.executable, str(PEAK), "merge", *(str(tmp_path / name) for name in ("large", "out", "tiny"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    shards = sorted(path.stat().st_size for path in (tmp_path / "large" / "0").glob("*.safetensors"))
    print(f"{int(done.stdout) / 1e6:.1f} MB of {sum(shards[-2:]) / 1e6:.1f} MB")
    assert int(done.stdout) < sum(shards[-2:])
