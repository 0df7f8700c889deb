"""A second objective trains on every layout as in one process, and forward-only finds each label's log-probability and each entropy.

The objective is GRPO's to come: a clipped ratio to old log-probabilities, with an advantage and a fractional weight for each token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TOLERANCE, SCORE_TOLERANCE = 1e-5, 5e-6  # the least log-probability is -8.7
PROGRAM = Path(__file__).with_name("objectives.py")
TP2, SP, PP2 = {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}
MASKED = {"data": {"document_mask": True}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": TP2},
    "tp2_sp": {"parallel": SP},
    "pp2": {"parallel": PP2},
    "pp2_interleaved": {"parallel": {"pp": 2, "vpp": 2}},
    "dp2": {},
    "dp2_plain": {"parallel": {"distributed_optimizer": False}},
    "dp2_overlap": {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "cp2": {"parallel": {"cp": 2}},
    "tp2_sp packed": {"parallel": SP, **MASKED},
    "pp2 packed": {"parallel": PP2, **MASKED},
    "dp2 packed": MASKED,
}
# name: (model, layout, length): 31 tokens divide by nothing, and five microbatches not by pp
SCORES: dict[str, tuple[str, dict[str, Any], int]] = {
    "tiny one": ("tiny", {}, 31),
    "tiny one packed": ("tiny", MASKED, 31),
    "tiny tp2": ("tiny", {"parallel": TP2}, 31),
    "tiny tp2_sp": ("tiny", {"parallel": SP}, 31),
    "tiny tp2_sp packed": ("tiny", {"parallel": SP, **MASKED}, 31),
    "tiny pp2": ("tiny", {"parallel": PP2}, 32),
    "tiny pp2_interleaved": ("tiny", {"parallel": {"pp": 2, "vpp": 2}, "batch": {"global_size": 5, "micro_size": 1}}, 31),
    "tiny cp2": ("tiny", {"parallel": {"cp": 2}}, 31),
    "granite pp2": ("granite", {"parallel": PP2}, 32),
    "nemotron tp2_sp": ("nemotron", {"parallel": SP}, 31),
    "nemotron tp2_sp packed": ("nemotron", {"parallel": SP, **MASKED}, 31),
    "nemotron pp2 packed": ("nemotron", {"parallel": PP2, **MASKED}, 32),
    "nemotron cp2": ("nemotron", {"parallel": {"cp": 2}}, 32),
    "granite_h pp2 packed": ("granite_h", {"parallel": PP2, **MASKED}, 31),
}
BESIDE = {
    "fp32": {},
    "fp32 plain": {"parallel": {"distributed_optimizer": False}},
    "bf16": {"precision": "bf16"},
    "bf16 plain": {"precision": "bf16", "parallel": {"distributed_optimizer": False}},
    "bf16 overlap": {"precision": "bf16", "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "bf16 tp2_sp": {"precision": "bf16", "parallel": SP},
    "fp32 pp2_interleaved": {"parallel": {"pp": 2, "vpp": 2}},
}


def case(name: str, function: str, config: dict[str, Any], control: str | None = None, **arguments: Any) -> dict[str, Any]:
    batch = {"global_size": 8, "micro_size": 2}
    settings = {"steps": 1, "batch": batch, "optimizer": {"lr": 3e-4, "clip_grad": 0.1}, **config}
    return {"name": name, "config": settings, "control": control, "call": {"file": str(PROGRAM), "function": function, **arguments}}


def train(name: str, config: dict[str, Any], objective: str = "clipped", shift: int = 0, control: str | None = None) -> dict[str, Any]:
    return case(name, "train", config, control, kind=objective, shift=shift)


@pytest.fixture(scope="module")
def results(gang: Any, request: pytest.FixtureRequest) -> dict[str, Any]:
    one = [train("single", {}), train("single packed", MASKED), train("shifted", {}, shift=1)]
    one += [train("unclipped", {}, "unclipped"), train("whole weights", {}, "whole weights")]
    two = [train(name, config) for name, config in LAYOUTS.items()]
    two += [train("unmarked norm", {"parallel": SP}, control="unmarked_norm")]
    two += [case(f"beside {name}", "beside_megatron", config) for name, config in BESIDE.items()]
    for name, (model, layout, length) in SCORES.items():
        config = {**layout, "init": {"checkpoint": str(request.getfixturevalue(f"{model}_checkpoint"))}}
        (two if layout.get("parallel") else one).append(case(name, "scores", config, length=length))
        if (oracle := case(oracle_of(name), "oracle", {**config, "parallel": {}}, length=length)) not in one:
            one.append(oracle)
    two.append(case("unmasked", "scores", {"parallel": TP2}, "unmasked_vocabulary", length=31))
    return gang(1, one) | gang(2, two)


def oracle_of(name: str) -> str:
    model, layout, length = SCORES[name]
    return f"oracle {model} {length} {layout.get('batch')} {layout.get('data')}"


def worst(run: list[dict[str, float]], reference: list[dict[str, float]], metric: str) -> float:
    return max(abs(a[metric] - b[metric]) for a, b in zip(run, reference, strict=True))


def apart(scores: dict[str, Any], reference: dict[str, Any], score: str) -> float:
    """Return the largest difference of two (B, S) of scores."""
    pairs = [pair for rows in zip(scores[score], reference[score], strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_a_single_process(results: dict[str, Any], layout: str) -> None:
    run, single = results[layout], results["single packed" if "packed" in layout else "single"]
    for metric in ("loss", "grad_norm", "weight", "num_tokens", "off_policy"):
        assert worst(run, single, metric) <= TOLERANCE, metric
    assert single[0]["num_tokens"] == 8 * 32, "the rates count tokens, whatever the weights"
    assert single[0]["weight"] % 1 > 0.1 and single[-1]["loss"] < single[0]["loss"] - 0.05
    assert single[-1]["clipped"] > 0.1, "nothing was clipped"


@pytest.mark.parametrize("run", ["single", "single packed", *LAYOUTS])
def test_on_policy_the_ratio_is_exactly_one(results: dict[str, Any], run: str) -> None:
    """Old log-probabilities come from forward-only on the same layout: the same kernels, the same bits."""
    assert results[run][0]["off_policy"] == results[run][0]["clipped"] == 0.0 < results[run][1]["off_policy"]


def test_controls_are_seen(results: dict[str, Any]) -> None:
    """A gradient not summed over tensor parallelism, weights cut to whole numbers, no clipping, log-probabilities of other tokens."""
    single = results["single"]
    assert worst(results["unmarked norm"], single, "grad_norm") > 100 * TOLERANCE
    assert worst(results["whole weights"], single, "loss") > 100 * TOLERANCE
    assert worst(results["unclipped"], single, "loss") > 100 * TOLERANCE
    assert worst(results["single packed"], single, "grad_norm") > 100 * TOLERANCE
    assert results["shifted"][0]["off_policy"] > 0.1


@pytest.mark.parametrize("name", SCORES)
def test_forward_only_is_log_softmax_over_the_whole_vocabulary(results: dict[str, Any], name: str) -> None:
    scores, oracle = results[name], results[oracle_of(name)]
    assert apart(scores, oracle, "log_probs") <= SCORE_TOLERANCE and apart(scores, oracle, "entropies") <= SCORE_TOLERANCE
    assert scores["is_equal"] and scores["ranks_agree"]


def test_forward_only_controls_are_seen(results: dict[str, Any]) -> None:
    """Rows that pad the vocabulary counted; documents that see each other."""
    for score in ("log_probs", "entropies"):
        assert apart(results["unmasked"], results[oracle_of("tiny tp2")], score) > 100 * SCORE_TOLERANCE
        assert apart(results["tiny one packed"], results[oracle_of("tiny tp2")], score) > 100 * SCORE_TOLERANCE


@pytest.mark.parametrize("name", BESIDE)
def test_measure_and_apply_are_megatrons_step_bit_for_bit(results: dict[str, Any], name: str) -> None:
    """Under clipping, and after a step that was measured and not taken."""
    both = results[f"beside {name}"]
    assert both["are_equal"] and both["have_moved"]
    assert both["norms"][::2] == both["norms"][1::2] and min(both["norms"]) > 0.1
