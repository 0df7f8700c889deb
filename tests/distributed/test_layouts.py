"""Every layout trains as a single process does: 6 fp32 steps from one checkpoint, loss and gradient norm within 1e-5.

Each trap of Megatron-Core that the trainer closes is opened once, as a negative control that must be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import folder, torch_dist

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
TWO: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2_interleaved": {"pp": 2, "vpp": 2},
    "dp2_plain": {"distributed_optimizer": False},
    "dp2": {},
    "dp2_overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
GRANITE = {name: TWO[name] for name in ("tp2_sp", "pp2", "pp2_interleaved", "dp2_overlap")}  # tied embeddings, hooks on both ends
HYBRID = {
    "nemotron": {name: TWO[name] for name in ("tp2", "tp2_sp", "pp2", "dp2_plain", "dp2_overlap")},
    "granite_h": {name: TWO[name] for name in ("pp2", "dp2_plain", "dp2_overlap")},
}
STEPS, HYBRID_STEPS, HYBRID_TOLERANCE = 6, 5, 1e-6  # of the loss; of the gradient norm, relative
FOUR = {"tp2_pp2": {"tp": 2, "pp": 2}, "tp2_pp2_sp_interleaved": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}}
MODEL = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 384,
    "max_position_embeddings": 64,
}
CONTROLS = {
    "batched_p2p": {"pp": 2, "vpp": 2},
    "unmarked_norm": {"tp": 2, "sequence_parallel": True},
    "unmasked_vocabulary": {"tp": 2},
}


MLP = {"recompute": {"granularity": "selective", "modules": ["mlp"]}}


def case(name: str, parallel: dict[str, Any], control: str | None = None, **config: Any) -> dict[str, Any]:
    return {"name": name, "config": {"parallel": parallel, "steps": STEPS, **config}, "control": control}


@pytest.fixture(scope="module")
def results(gang: Any, tiny_tokenizer: Path, granite_checkpoint: Path) -> dict[str, Any]:
    recompute = {"recompute": {"granularity": "full"}}
    one = [
        case("single", {}),
        case("recompute", {}, **recompute),
        case("recompute_mlp", {}, **MLP),
        case("workers", {}, data={"num_workers": 1}),
    ]
    two = [case(name, parallel) for name, parallel in TWO.items()]
    two += [case(name, parallel, control=name, steps=3) for name, parallel in CONTROLS.items()]
    scratch = {"init": {"checkpoint": None, "tokenizer": str(tiny_tokenizer)}, "model": MODEL, "steps": 2}
    two += [case("scratch_pp2", {"pp": 2}, **scratch)]
    granite = {"init": {"checkpoint": str(granite_checkpoint)}}
    one += [case("granite", {}, **granite)]
    two += [case(f"granite_{name}", parallel, **granite) for name, parallel in GRANITE.items()]
    two += [case("dp2_bf16", {}, precision="bf16")]
    return gang(1, one) | gang(2, two) | gang(4, [case(name, parallel) for name, parallel in FOUR.items()])


@pytest.fixture(scope="module")
def hybrids(gang: Any, nemotron_checkpoint: Path, granite_h_checkpoint: Path) -> dict[str, Any]:
    starts = {"nemotron": nemotron_checkpoint, "granite_h": granite_h_checkpoint}

    def hybrid(name: str, model: str, parallel: dict[str, Any], control: str | None = None, **more: Any) -> dict[str, Any]:
        return case(name, parallel, control, init={"checkpoint": str(starts[model])}, steps=HYBRID_STEPS, optimizer={"lr": 1e-3}, **more)

    two = [hybrid(f"{model}_{name}", model, parallel) for model, layouts in HYBRID.items() for name, parallel in layouts.items()]
    two.append(hybrid("control", "nemotron", TWO["tp2_sp"], "unmarked_norm"))
    one = [*(hybrid(model, model, {}) for model in HYBRID), hybrid("recompute_mlp", "nemotron", {}, **MLP)]
    return gang(1, one) | gang(2, two)


def worst(found: dict[str, Any], reference: dict[str, Any], metric: str, steps: int = STEPS) -> float:
    pairs = list(zip(found[metric], reference[metric], strict=False))[:steps]
    assert len(pairs) == min(steps, len(found[metric])) > 0
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_layout_equals_a_single_process(results: dict[str, Any], layout: str) -> None:
    found, single = results[layout], results["single"]
    assert len(found["loss"]) == STEPS
    assert worst(found, single, "loss") <= TOLERANCE
    assert worst(found, single, "grad_norm") <= TOLERANCE
    for ours, theirs in zip(found["valid_loss"], single["valid_loss"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("layout", GRANITE)
def test_granite_layout_equals_a_single_process(results: dict[str, Any], layout: str) -> None:
    for metric in ("loss", "grad_norm"):
        assert worst(results[f"granite_{layout}"], results["granite"], metric) <= TOLERANCE


@pytest.mark.parametrize(("model", "layout"), [(model, layout) for model, layouts in HYBRID.items() for layout in layouts])
def test_hybrid_layout_equals_a_single_process(hybrids: dict[str, Any], model: str, layout: str) -> None:
    """Mamba layers split head by head, stage by stage, or held by each rank: the same five steps."""
    found, single = hybrids[f"{model}_{layout}"], hybrids[model]
    assert len(found["loss"]) == HYBRID_STEPS and single["loss"][-1] < single["loss"][0]
    assert worst(found, single, "loss") <= HYBRID_TOLERANCE
    assert worst(found, single, "grad_norm") <= HYBRID_TOLERANCE * max(single["grad_norm"])


def test_a_hybrids_recomputed_mlps_are_bit_equal(hybrids: dict[str, Any]) -> None:
    found, single = hybrids["recompute_mlp"], hybrids["nemotron"]
    assert (found["loss"], found["grad_norm"]) == (single["loss"], single["grad_norm"])


def test_a_hybrids_unmarked_norm_is_seen(hybrids: dict[str, Any]) -> None:
    assert worst(hybrids["control"], hybrids["nemotron"], "grad_norm") > 100 * HYBRID_TOLERANCE


def test_the_single_process_learns(results: dict[str, Any]) -> None:
    loss = results["single"]["loss"]
    assert loss[-1] < loss[0] - 1.0


@pytest.mark.parametrize("variant", ["recompute", "recompute_mlp", "workers"])
def test_variant_is_bit_equal(results: dict[str, Any], variant: str) -> None:
    """Recomputed activations and a loader of its own processes change nothing."""
    assert results[variant]["loss"] == results["single"]["loss"]
    assert results[variant]["grad_norm"] == results["single"]["grad_norm"]


def test_pipeline_stages_begin_with_different_weights(results: dict[str, Any]) -> None:
    """From scratch, each stage draws from a generator of its own."""
    reader = torch_dist.TensorReader(folder.read(Path(results["scratch_pp2"]["run_dir"])).state)
    shape = reader.shapes()["decoder.layers.0.self_attention.linear_proj.weight"]
    first, second = (reader.read(f"decoder.layers.{layer}.self_attention.linear_proj.weight", shape) for layer in (0, 2))
    assert (first - second).abs().mean() > 0.5 * first.abs().mean()


def test_bf16_stays_near_fp32(results: dict[str, Any]) -> None:
    assert 0 < worst(results["dp2_bf16"], results["single"], "loss") < 0.1


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_seen(results: dict[str, Any], control: str) -> None:
    """The fault moves the loss or the gradient norm by far more than the tolerance."""
    found, single = results[control], results["single"]
    assert max(worst(found, single, "loss", 3), worst(found, single, "grad_norm", 3)) > 100 * TOLERANCE
