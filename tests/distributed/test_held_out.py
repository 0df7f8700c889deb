"""Held-out loss by source is train's validation figure, on every layout, and its standard error does not depend on the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import BatchConfig, DataConfig, InitConfig, ParallelConfig, TrainConfig
from megatron_prism.data import loader, mixture
from megatron_prism.eval import held_out
from megatron_prism.parallel.groups import Groups
from megatron_prism.train.objective import CROSS_ENTROPY
from megatron_prism.train.step import evaluate
from tests.distributed.objectives import bare_model

pytestmark = pytest.mark.slow
SEQUENCES, SEQ_LENGTH, SEED = 7, 32, 1234  # 7: no multiple of a microbatch on two ranks
# name: (model, ranks, layout, whether documents are masked)
RUNS: dict[str, tuple[str, int, dict[str, Any], bool]] = {
    "tp2_sp": ("tiny", 2, {"tp": 2, "sequence_parallel": True}, False),
    "pp2": ("tiny", 2, {"pp": 2}, False),
    "dp2": ("tiny", 2, {}, False),
    "cp2 dp2": ("tiny", 4, {"cp": 2}, False),
    "masked": ("tiny", 1, {}, True),
    "masked dp2": ("tiny", 2, {}, True),
    "hybrid": ("nemotron", 1, {}, False),
    "hybrid tp2_sp": ("nemotron", 2, {"tp": 2, "sequence_parallel": True}, False),
}


def measured(groups: Groups, checkpoint: str, prepared: str, layout: dict[str, Any], masked: bool) -> dict[str, Any]:
    """Return held_out's losses, and those of train's validation on the same sequences and on others (seed + 1)."""
    config = TrainConfig(
        run_dir=Path("none"),
        steps=1,
        data=DataConfig(prepared=Path(prepared), seq_length=SEQ_LENGTH),
        batch=BatchConfig(global_size=8),
        init=InitConfig(checkpoint=Path(checkpoint)),
        parallel=ParallelConfig(**layout),
        precision="fp32",
    )
    chunks, read = bare_model(config, groups), mixture.read_prepared(Path(prepared))
    ours = held_out.losses(
        chunks, read, groups, num_sequences=SEQUENCES, seq_length=SEQ_LENGTH, micro_size=2, seed=SEED, document_mask=masked
    )

    def validation(seed: int) -> dict[str, float]:
        position = loader.Position(groups.dp_rank, groups.dp)
        of = loader.held_out(read, SEQ_LENGTH, seed, masked)
        batches = {name: loader.valid_batches(part, SEQUENCES, 2, position) for name, part in of.items()}
        return {name: evaluate(chunks, part, CROSS_ENTROPY, groups).loss for name, part in batches.items()}

    return {
        "losses": {name: asdict(loss) for name, loss in ours.items()},
        "validation": validation(SEED),
        "of other sequences": validation(SEED + 1),
    }


@pytest.fixture(scope="module")
def one(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tiny_mixture: Path) -> dict[str, Any]:
    return run_distributed(measured, 1, checkpoint=tiny_checkpoint, prepared=tiny_mixture, layout={}, masked=False)[0]


def test_it_is_the_validation_of_train(one: dict[str, Any], tiny_mixture: Path) -> None:
    losses, manifest = one["losses"], json.loads((tiny_mixture / "manifest.json").read_text())
    assert losses.keys() == {source["name"] for source in manifest["sources"] if source["valid_tokens"]} == {"math", "code"}
    for name, found in losses.items():
        assert found["loss"] == pytest.approx(one["validation"][name], abs=1e-5)
        assert found["loss"] != pytest.approx(one["of other sequences"][name], abs=1e-4)  # the control: other sequences are seen
        assert found["num_tokens"] == SEQUENCES * SEQ_LENGTH and found["num_sequences"] == SEQUENCES and 0 < found["standard_error"] < 1


@pytest.mark.parametrize("name", RUNS)
def test_on_any_layout(
    name: str, run_distributed: Callable[..., list[Any]], tiny_mixture: Path, request: pytest.FixtureRequest, one: dict[str, Any]
) -> None:
    model, num_ranks, layout, masked = RUNS[name]
    checkpoint = request.getfixturevalue(f"{model}_checkpoint")
    ranks = run_distributed(
        measured, num_ranks, checkpoint=checkpoint, prepared=tiny_mixture, layout=layout, masked=masked, parallel=layout
    )
    assert all(rank == ranks[0] for rank in ranks)
    found = ranks[0]
    for source, loss in found["losses"].items():
        assert loss["loss"] == pytest.approx(found["validation"][source], abs=1e-5)
        assert loss["num_sequences"] == SEQUENCES
        if model == "tiny" and not masked:
            assert loss["loss"] == pytest.approx(one["losses"][source]["loss"], abs=1e-5)
            assert loss["standard_error"] == pytest.approx(one["losses"][source]["standard_error"], abs=1e-5)
        if masked:
            assert loss["num_tokens"] < SEQUENCES * SEQ_LENGTH
