"""`trainable`: what no pattern names stays bit for bit, on every layout, and the rest trains as it does in one process."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.checkpoint import folder, torch_dist
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build
from megatron_prism.families import registry
from megatron_prism.jobs import train

pytestmark = pytest.mark.slow

TOLERANCE, STEPS = 1e-5, 6
ATTENTION = ["*.self_attention.*"]  # the paper's 128k step
REST = ["embedding.*", "*.mlp.*", "decoder.final_layernorm.weight", "output_layer.weight"]
# name: (model, patterns, layouts)
CASES: dict[str, tuple[str, list[str], dict[str, dict[str, Any]]]] = {
    "attention": (
        "tiny",
        ATTENTION,
        {
            "tp2_sp": {"tp": 2, "sequence_parallel": True},
            "pp2_interleaved": {"pp": 2, "vpp": 2},
            "dp2_overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
            "dp2_plain": {"distributed_optimizer": False},
            "cp2": {"cp": 2},
        },
    ),
    "two_layers": ("tiny", ["decoder.layers.2.mlp.*", "decoder.layers.4.*"], {"pp2": {"pp": 2}}),  # the second is number 1 of its stage
    "tied_frozen": ("granite", ATTENTION, {"pp2": {"pp": 2}}),
    "tied": ("granite", ["embedding.*"], {"pp2": {"pp": 2}}),
    "mixers": ("nemotron", ["*.mixer.*"], {"pp2": {"pp": 2}, "tp2_sp": {"tp": 2, "sequence_parallel": True}}),
}
# Of checkpoints in fp32: what does not train stays so.
BF16: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "bf16": ("tiny", ATTENTION, {}),
    "bf16 mixers": ("nemotron", ["*.mlp.*"], {"tp": 2, "sequence_parallel": True}),
    "bf16 one stage": ("tiny", ["decoder.layers.0.*", "output_layer.weight"], {"pp": 2}),
}
LAYOUTS = [(name, layout) for name, (_, _, layouts) in CASES.items() for layout in layouts]


def case(name: str, start: Path, patterns: list[str], **more: Any) -> dict[str, Any]:
    config = {
        "steps": STEPS,
        "trainable": patterns,
        "init": {"checkpoint": str(start)},
        "optimizer": {"lr": 1e-3},
        "save": {"interval": 3, "keep_last": 9},
    }
    fault = {"control": more.pop("control", None), "start_from": more.pop("start_from", None)}
    return {"name": name, "config": config | more, **fault}


@pytest.fixture(scope="module")
def starts(request: pytest.FixtureRequest) -> dict[str, Path]:
    return {model: request.getfixturevalue(f"{model}_checkpoint") for model in ("tiny", "granite", "nemotron")}


@pytest.fixture(scope="module")
def results(gang: Any, starts: dict[str, Path]) -> dict[str, Any]:
    full, tiny = {"recompute": {"granularity": "full"}}, starts["tiny"]
    one = [case(name, starts[model], patterns) for name, (model, patterns, _) in CASES.items()]
    one += [case("all", tiny, ["*"]), case("rest", tiny, REST), case("recompute", tiny, ATTENTION, **full)]
    one += [case("lost", tiny, ATTENTION, control="lost_gradient", **full)]
    two = [case(f"{name} {layout}", starts[CASES[name][0]], CASES[name][1], parallel=CASES[name][2][layout]) for name, layout in LAYOUTS]
    two += [case(name, starts[model], patterns, precision="bf16", parallel=layout) for name, (model, patterns, layout) in BF16.items()]
    found = gang(1, one) | gang(2, two)
    again = [("attention", "dp2_overlap"), ("tied", "pp2")]
    resumed = [
        case(
            f"{name} resumed",
            starts[CASES[name][0]],
            CASES[name][1],
            parallel=CASES[name][2][layout],
            start_from={"run_dir": found[f"{name} {layout}"]["run_dir"], "step": 3},
        )
        for name, layout in again
    ]
    start_from = {"run_dir": found["bf16 mixers"]["run_dir"], "step": 3}
    model, patterns, _ = BF16["bf16 mixers"]
    resumed.append(case("bf16 mixers resumed", starts[model], patterns, precision="bf16", parallel={"pp": 2}, start_from=start_from))
    return found | gang(2, resumed)


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights, without the rows that pad the vocabulary."""
    checkpoint = folder.read(Path(path))
    reader = torch_dist.TensorReader(checkpoint.state)
    return {rule.mcore: reader.read(rule.mcore, reader.shapes()[rule.mcore])[: rule.shape[0]] for rule in registry.rules(checkpoint.model)}


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def worst(found: dict[str, Any], reference: dict[str, Any], metric: str) -> float:
    return max(abs(a - b) for a, b in zip(found[metric], reference[metric], strict=True))


def test_a_pattern_that_names_nothing_is_refused_before_anything_starts(tiny_checkpoint: Path, tiny_mixture: Path, tmp_path: Path) -> None:
    values = {
        "run_dir": str(tmp_path / "run"),
        "steps": 1,
        "data": {"prepared": str(tiny_mixture), "seq_length": 32},
        "batch": {"global_size": 8},
        "init": {"checkpoint": str(tiny_checkpoint)},
        "parallel": {"pp": 2},
    }
    assert train.resolve(build({**values, "trainable": ATTENTION}, TrainConfig, str), 2).figures["trainable_parameters"] == 5 * (
        128 * 64 + 64 * 64 + 64
    )
    with pytest.raises(InputError, match=r"trainable: \*\.atention\.\*: found no parameter of that name.*self_attention") as caught:
        train.resolve(build({**values, "trainable": ["*.atention.*"]}, TrainConfig, str), 2)
    assert [problem.where for problem in caught.value.problems] == ["trainable: *.atention.*"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_layout_equals_a_single_process(results: dict[str, Any], name: str, layout: str) -> None:
    found, single = results[f"{name} {layout}"], results[name]
    assert worst(found, single, "loss") <= TOLERANCE and worst(found, single, "grad_norm") <= TOLERANCE


@pytest.mark.parametrize(
    "run", [*CASES, *(f"{name} {layout}" for name, layout in LAYOUTS), *BF16, "bf16 mixers resumed", "attention resumed"]
)
def test_what_no_pattern_names_stays_bit_for_bit(results: dict[str, Any], starts: dict[str, Path], run: str) -> None:
    model, patterns, _ = (BF16 | CASES).get(run.removesuffix(" resumed"), CASES.get(run.split()[0], CASES["attention"]))
    before, after = tensors(starts[model]), tensors(results[run]["run_dir"])
    named = {key for key in before if any(fnmatchcase(key, pattern) for pattern in patterns)}
    assert {key for key in before if not is_same(before[key], after[key])} == named and 0 < len(named) < len(before)


def test_the_norm_is_over_what_trains(results: dict[str, Any]) -> None:
    """Of two parts of a model, the squares add up to that of the whole, as long as the weights are the same."""
    attention, rest, whole = (results[name]["grad_norm"][0] for name in ("attention", "rest", "all"))
    assert attention**2 + rest**2 == pytest.approx(whole**2, rel=1e-5) and min(attention, rest) > 0.1 * whole


def test_recompute_behind_a_frozen_embedding_is_bit_equal(results: dict[str, Any]) -> None:
    assert (
        results["recompute"]["loss"] == results["attention"]["loss"]
        and results["recompute"]["grad_norm"] == results["attention"]["grad_norm"]
    )


def test_control_lost_gradient_is_seen(results: dict[str, Any]) -> None:
    """Without a gradient of the embedding's output recomputed layers have none: nothing trains, and nothing says so."""
    assert results["lost"]["grad_norm"] == [0.0] * STEPS


@pytest.mark.parametrize(("run", "whole"), [("tied resumed", "tied pp2"), ("attention resumed", "attention dp2_overlap")])
def test_resume_is_bit_equal(results: dict[str, Any], run: str, whole: str) -> None:
    assert results[run]["loss"] == results[whole]["loss"] and results[run]["grad_norm"] == results[whole]["grad_norm"]
