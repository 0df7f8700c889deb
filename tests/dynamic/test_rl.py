"""The toy of tests/distributed trained with Megatron-Core's dynamic engine as its sampler, on the stand-in."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.parallel.groups import Groups
from tests.distributed import toy_rl
from tests.distributed.test_rl import same

from . import standin

CORE = importlib.metadata.version("megatron-core")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CORE.startswith("0.16"), reason=f"megatron-core {CORE}: 0.19 by tools/setup_mcore019.sh"),
]
ROLLOUT = {**toy_rl.ROLLOUT, "num_rows": 7}
GRIDS: dict[str, dict[str, Any]] = {"1": {}, "tp2_sp": {"tp": 2, "sequence_parallel": True}}


def train(groups: Groups, **values: Any) -> dict[str, Any]:
    with standin.installed():
        return toy_rl.train(groups, **values)


@pytest.fixture
def toy(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains the toy in a run folder and returns the folder."""
    prompts = toy_rl.write_prompts(tmp_path / "prompts")

    def run(name: str, engine: str, grid: dict[str, Any], **values: Any) -> Path:
        own = {"run_dir": tmp_path / name, "prompts": prompts, "checkpoint": tiny_checkpoint, "rollout": {**ROLLOUT, "engine": engine}}
        run_distributed(train, grid.get("tp", 1), timeout_s=200.0, parallel=grid, grid=grid, **own, **values)
        return tmp_path / name

    return run


def tokens_of(run: Path) -> list[list[int]]:
    files = sorted((run / "rollouts").glob("step_*.jsonl"), key=lambda path: int(path.stem.partition("_")[2]))
    return [json.loads(line)["token_ids"] for path in files for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout", GRIDS)
def test_a_run_samples_what_it_does_with_the_cached_engine(toy: Callable[..., Path], layout: str) -> None:
    """Each step's weights are another's, so the engine reads those of the moment; and what it leaves behind changes no update."""
    mcore, cached = (toy(engine, engine, GRIDS[layout], steps=4) for engine in ("mcore", "cached"))
    assert tokens_of(mcore) == tokens_of(cached) and len(tokens_of(mcore)) == 4 * 24
    steps = [line for line in map(json.loads, (mcore / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(steps) == 4 and all(line["ratio"] == 1.0 for line in steps if line["kept_groups"])


def test_a_killed_run_goes_on_bit_for_bit(toy: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("killed", "mcore", {}, kill_at="sampled", kill_after=2)
    killed, unbroken = toy("killed", "mcore", {}), toy("unbroken", "mcore", {})
    assert same(killed, unbroken) and not same(toy("other", "mcore", {}, seed=5), unbroken)
