"""SIGKILL at three moments of a run (tiny: at one), each time the same command again: the bits of the run that nobody killed.

python -m tests.gpu.kills FIXTURES WORK
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_prism.parallel import host
from tests.gpu import options, runs
from tests.gpu.fixtures import HYBRID
from tests.gpu.options import Options
from tests.gpu.report import check
from tests.gpu.resume import other_tensors

CASES: dict[str, tuple[str, dict[str, Any]]] = {"dense FP8 delayed": ("llama", {"fp8": {"recipe": "delayed"}}), "hybrid bf16": (HYBRID, {})}
WAIT_S = 90.0


def main(given: Options) -> None:
    """Run each case; tiny: one, and in bf16 without a device."""
    names = list(CASES) if host.has_cuda() else ["hybrid bf16"]
    runs.at_once(given, killed, names)


def killed(given: Options, name: str) -> None:
    """Train a run whole and one with kills, and compare them."""
    family, keys = CASES[name]
    steps, kills = (12, 1) if given.tiny else (60, 3)
    keys = {**keys, "steps": steps, "save": {"interval": 3, "keep_last": 2}}
    with check("kills", name) as result:
        whole, broken = (given.work / f"{name.replace(' ', '_')}_{end}" for end in ("whole", "killed"))
        runs.must(runs.prism("train", runs.config(given, whole, family, **keys)))
        path = runs.config(given, broken, family, **keys)
        at = [kill_after(path, broken, (number + 1) * steps // (kills + 1)) for number in range(kills)]
        runs.must(runs.prism("train", path))
        first, second = runs.losses(whole), runs.losses(broken)
        tensors = other_tensors(whole, broken)
        result.figures = {"killed_after_steps": at, "steps": len(second), "bit_equal": first == second and tensors == 0}
        result.figures |= {"largest_difference": runs.largest_difference(first, second), "other_tensors": tensors}
        result.ok = result.figures["bit_equal"] and len(second) == steps and None not in at


def kill_after(config: Path, run_dir: Path, step: int) -> int | None:
    """Start a run and SIGKILL it and its children once it has logged a step. Return the last one logged; None: it ended before."""
    with (run_dir.with_suffix(".log")).open("a") as log:
        child = subprocess.Popen(
            [*runs.PRISM, "train", str(config)],
            env=runs.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        ends = time.monotonic() + WAIT_S
        while child.poll() is None and time.monotonic() < ends and max(runs.losses(run_dir), default=0) < step:
            time.sleep(0.01)
        if child.poll() is not None:
            return None
        runs.kill(child)
    return max(runs.losses(run_dir))


if __name__ == "__main__":
    main(options.read())
