"""What Megatron-Core and Transformer Engine make of fp8, offload and deterministic: constructed, never run (tests/te/standin.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.check.precision import Machine, check_machine
from megatron_prism.core.config import BatchConfig, DataConfig, FP8Config, TrainConfig

WORKER = Path(__file__).with_name("precision_worker.py")
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    target = tmp_path_factory.mktemp("precision") / "found.json"
    done = subprocess.run([sys.executable, str(WORKER), str(target)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(target.read_text())


def test_every_recipe_becomes_its_class_with_its_keys(found: Facts) -> None:
    assert found["recipes"] == {
        "tensorwise": {"class": "Float8CurrentScaling", "format": "HYBRID"},
        "delayed": {"class": "DelayedScaling", "format": "E4M3", "amax_history_len": 7, "amax_compute_algo": "most_recent", "margin": 3},
        "blockwise": {"class": "Float8BlockScaling", "format": "HYBRID"},
    }


def test_control_an_unknown_recipe_raises(found: Facts) -> None:
    assert found["unknown"].startswith("ValueError")


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_model_with_bf16_ends_is_built_and_only_they_stay_outside_fp8(found: Facts, kind: str) -> None:
    assert found["layers"][kind] == {"in_bf16": [True, False, False, True], "dtypes": ["torch.bfloat16"], "offloads": False}


def test_control_megatron_refuses_what_check_sizes_refuses(found: Facts) -> None:
    assert "multiple of 16" in found["ragged"]
    assert found["too many offloaded"].startswith("ValueError")


def test_a_dense_model_offloads_its_activations_and_a_hybrid_would_not(found: Facts) -> None:
    assert found["offloaded"]["offloads"] and not found["hybrid offloaded"]["offloads"]


def test_the_optimizer_is_told_of_fp8_weights_and_of_its_offloading(found: Facts) -> None:
    assert found["optimizer"] == {
        "fp8_recipe": "delayed",
        "fp8_param_gather": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }
    assert not any(found["plain optimizer"].values())


def test_moments_in_bf16_are_told_to_the_optimizer_whoever_holds_the_main_weights(found: Facts) -> None:
    dtypes = {"exp_avg_dtype": "torch.bfloat16", "exp_avg_sq_dtype": "torch.bfloat16", "main_params_dtype": "torch.float32"}
    for kind, is_held in {"bf16": True, "delayed": True, "tensorwise": False}.items():
        told = {"use_precision_aware_optimizer": True, "store_param_remainders": False}
        assert found["moments"][kind] == {**dtypes, **told, "use_precision_aware_optimizer_no_fp8_or_ds_fp8": is_held}


def test_graphs_are_of_whole_layers_by_megatron_core(found: Facts) -> None:
    assert found["graphs"] == [["none", []], ["local", []]]


def test_control_megatron_refuses_graphs_where_we_do(found: Facts) -> None:
    recomputed, offloaded = found["graphs refused"]
    assert recomputed.startswith("AssertionError: full recompute") and offloaded.startswith("ValueError: CUDA graphs not supported")


def test_deterministic_needs_its_variable(found: Facts) -> None:
    assert found["deterministic"]["0"] is True
    assert "NVTE_ALLOW_NONDETERMINISTIC_ALGO is not 0" in found["deterministic"]["1"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_a_machine_is_refused_where_transformer_engine_refuses_it(found: Facts, recipe: Any) -> None:
    data = DataConfig(prepared=Path("data"), seq_length=16)
    config = TrainConfig(run_dir=Path("run"), steps=1, data=data, batch=BatchConfig(global_size=1), fp8=FP8Config(recipe=recipe))
    said = {case["verdicts"][recipe] for case in found["machines"]}
    assert said == {True, False}
    for case in found["machines"]:
        major, minor = case["cuda"].split(".")
        machine = Machine(has_cuda=True, capability=tuple(case["capability"]), cuda=(int(major), int(minor)), transformer_engine=(2, 11))
        assert (check_machine(config, machine) == []) == case["verdicts"][recipe], case
