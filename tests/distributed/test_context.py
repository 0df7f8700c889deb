"""Context parallelism trains as a single process does: loss and gradient norm within 1e-5, dense and hybrid, alone and beside TP, PP and DP."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

TOLERANCE, STEPS = 1e-5, 4
CP: dict[str, Any] = {"cp": 2}
TWO: dict[str, dict[str, Any]] = {
    "cp2": {"parallel": CP},
    "cp2_plain": {"parallel": {"cp": 2, "distributed_optimizer": False}},
    "cp2_overlap": {"parallel": {"cp": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    "cp2_recompute_full": {"parallel": CP, "recompute": {"granularity": "full"}},
    "cp2_recompute_selective": {"parallel": CP, "recompute": {"granularity": "selective"}},
}
FOUR: dict[str, dict[str, Any]] = {
    "tp2_cp2_sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "pp2_cp2": {"pp": 2, "cp": 2},
    "pp2_cp2_interleaved": {"pp": 2, "vpp": 2, "cp": 2},
    "dp2_cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "cp4_hierarchical": {"cp": 4, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 2},
}
WINDOWED = {"cp": 2, "cp_comm_type": "all_gather"}
YARN = {"max_position_embeddings": 256, "window_size": 256, "yarn": {"factor": 16.0, "original_max_position_embeddings": 16}}
MODELS = ("mistral", "granite", "nemotron", "granite_h")
CONTROLS = ("contiguous", "unreduced")


def case(name: str, control: str | None = None, **config: Any) -> dict[str, Any]:
    return {"name": name, "config": {"steps": STEPS, **config}, "control": control}


@pytest.fixture(scope="module")
def starts(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Return where each model begins, as keys of the config."""
    found = {name: request.getfixturevalue(f"{name}_checkpoint") for name in MODELS}
    begins = {name: {"init": {"checkpoint": str(path)}, "optimizer": {"lr": 1e-3}} for name, path in found.items()}
    extended = {"checkpoint": str(found["mistral"]), **YARN}
    return {**begins, "yarn": {"init": extended, "optimizer": {"lr": 1e-3}}}


@pytest.fixture(scope="module")
def results(gang: Any, starts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    one = [case("single"), *(case(name, **starts[name]) for name in MODELS)]
    two = [case(name, **config) for name, config in TWO.items()]
    two += [case(f"{name}_cp2", parallel=WINDOWED if name == "mistral" else CP, **starts[name]) for name in MODELS]
    two += [case("cp2_bf16", parallel=CP, precision="bf16"), *(case(name, name, parallel=CP) for name in CONTROLS)]
    one.append(case("yarn", **starts["yarn"]))
    two.append(case("yarn_cp2", parallel=CP, **starts["yarn"]))
    four = [case(name, parallel=parallel) for name, parallel in FOUR.items()]
    four += [
        case("nemotron_four", parallel=FOUR["tp2_cp2_sp"], **starts["nemotron"]),
        case("granite_h_four", parallel=FOUR["pp2_cp2"], **starts["granite_h"]),
    ]
    return gang(1, one) | gang(2, two) | gang(4, four)


def worst(found: dict[str, Any], reference: dict[str, Any], metric: str) -> float:
    return max(abs(a - b) for a, b in zip(found[metric], reference[metric], strict=True))


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_layout_equals_a_single_process(results: dict[str, Any], layout: str) -> None:
    found, single = results[layout], results["single"]
    assert len(found["loss"]) == STEPS and single["loss"][-1] < single["loss"][0] - 0.5
    assert worst(found, single, "loss") <= TOLERANCE and worst(found, single, "grad_norm") <= TOLERANCE
    for ours, theirs in zip(found["valid_loss"], single["valid_loss"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("model", "layout"),
    [*((name, f"{name}_cp2") for name in (*MODELS, "yarn")), ("nemotron", "nemotron_four"), ("granite_h", "granite_h_four")],
)
def test_model_equals_a_single_process(results: dict[str, Any], model: str, layout: str) -> None:
    """A window, yarn in its place, Granite's multipliers and tied embeddings, and Mamba layers, whose heads Megatron-Core splits over cp."""
    found, single = results[layout], results[model]
    assert worst(found, single, "loss") <= TOLERANCE
    assert worst(found, single, "grad_norm") <= TOLERANCE * max(single["grad_norm"])


def test_bf16_stays_near_fp32(results: dict[str, Any]) -> None:
    assert 0 < worst(results["cp2_bf16"], results["single"], "loss") < 0.1


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_seen(results: dict[str, Any], control: str) -> None:
    """Positions as if a rank held neighbours; keys' and values' gradients of a rank's own queries only."""
    found, single = results[control], results["single"]
    assert max(worst(found, single, "loss"), worst(found, single, "grad_norm")) > 100 * TOLERANCE
