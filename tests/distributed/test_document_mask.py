"""`data.document_mask: true` trains the same on every layout, resumes bit for bit, and is not what is trained without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TOLERANCE, STEPS = 1e-5, 4
MASKED = {"data": {"document_mask": True}, "steps": STEPS}
TWO: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2_interleaved": {"pp": 2, "vpp": 2},
    "dp2_overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
HYBRID = {"nemotron": ("tp2_sp", "pp2"), "granite_h": ("pp2", "dp2_overlap")}
VARIANTS: dict[str, dict[str, Any]] = {
    "recompute_full": {"recompute": {"granularity": "full"}},
    "recompute_selective": {"recompute": {"granularity": "selective"}},
    "workers": {"data": {"document_mask": True, "num_workers": 1}},
}
ROWS = {"micro_size_1": 1, "micro_size_4": 4}  # sequences folded into a row


def case(name: str, parallel: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "config": {"parallel": parallel, **MASKED, **more}}


@pytest.fixture(scope="module")
def results(gang: Any, nemotron_checkpoint: Path, granite_h_checkpoint: Path) -> dict[str, Any]:
    hybrids = {"nemotron": nemotron_checkpoint, "granite_h": granite_h_checkpoint}
    own = {model: {"init": {"checkpoint": str(path)}, "optimizer": {"lr": 1e-3}} for model, path in hybrids.items()}
    save = {"save": {"interval": 3, "keep_last": 9}}
    one = [case("single", {}, **save), case("unmasked", {}, data={}), *(case(name, {}, **own[name]) for name in HYBRID)]
    one += [case(name, {}, **config) for name, config in VARIANTS.items()]
    one += [case(name, {}, batch={"global_size": 8, "micro_size": size}) for name, size in ROWS.items()]
    two = [case(name, parallel) for name, parallel in TWO.items()]
    two += [case(f"{model}_{name}", TWO[name], **own[model]) for model, names in HYBRID.items() for name in names]
    found = gang(1, one) | gang(2, two)
    start = {"run_dir": found["single"]["run_dir"], "step": 3}
    return found | gang(1, [{**case("resumed", {}, **save), "start_from": start}])


def worst(found: dict[str, Any], reference: dict[str, Any], metric: str) -> float:
    return max(abs(a - b) for a, b in zip(found[metric], reference[metric], strict=True))


@pytest.mark.parametrize("layout", [*TWO, *ROWS])
def test_layout_equals_a_single_process(results: dict[str, Any], layout: str) -> None:
    found, single = results[layout], results["single"]
    assert len(found["loss"]) == STEPS and single["loss"][-1] < single["loss"][0] - 0.5
    assert worst(found, single, "loss") <= TOLERANCE and worst(found, single, "grad_norm") <= TOLERANCE
    for ours, theirs in zip(found["valid_loss"], single["valid_loss"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize(("model", "layout"), [(model, layout) for model, layouts in HYBRID.items() for layout in layouts])
def test_hybrid_layout_equals_a_single_process(results: dict[str, Any], model: str, layout: str) -> None:
    found, single = results[f"{model}_{layout}"], results[model]
    assert worst(found, single, "loss") <= TOLERANCE
    assert worst(found, single, "grad_norm") <= TOLERANCE * max(single["grad_norm"])


@pytest.mark.parametrize("variant", [*VARIANTS, "resumed"])
def test_variant_is_bit_equal(results: dict[str, Any], variant: str) -> None:
    found, single = results[variant], results["single"]
    assert found["loss"] == single["loss"] and found["grad_norm"] == single["grad_norm"]


def test_without_the_mask_other_losses_are_trained_and_validated(results: dict[str, Any]) -> None:
    found, single = results["unmasked"], results["single"]
    assert min(abs(a - b) for a, b in zip(found["loss"], single["loss"], strict=True)) > 100 * TOLERANCE
    first, other = (run["valid_loss"][0]["valid_loss/math"] for run in (single, found))
    assert abs(first - other) > 100 * TOLERANCE
