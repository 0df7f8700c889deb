"""Every family on Transformer Engine's layers, constructed and never run, beside the same family on local layers.

What is compared: parameters and their marks, checkpoint keys, loading either side's checkpoint into the other with nothing missing and
nothing left over, Megatron-Core's own TE specs. tests/te/standin.py says what is real here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import MambaConfig, ModelConfig, YarnRope
from megatron_prism.families import registry

WORKER = Path(__file__).with_name("worker.py")
SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 384,
    "max_position_embeddings": 256,
}
YARN = YarnRope(factor=4.0, original_max_position_embeddings=64)
HYBRIDS = {"granite-4.0-h-micro": ("M-*-", 1), "nemotron-h-8b": ("M*-M", 2)}
CONTROLS = {
    "no key maps": "nemotron-h-8b",
    "no extra state": "llama-3.1-8b",
    "no extra state (hybrid)": "nemotron-h-8b",
    "fp32 norms": "llama-3.1-8b",
}
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mixer.in_proj.layer_norm_weight": "norm.weight",
}
Facts = dict[str, Any]


def tiny(name: str, preset: ModelConfig) -> ModelConfig:
    """Return a preset's architecture in small: the sizes are ours, all else is the preset's."""
    if name not in HYBRIDS:
        return dataclasses.replace(preset, **SIZES, yarn=YARN if name == "mistral-small-24b" else None)
    pattern, num_groups = HYBRIDS[name]
    mamba = MambaConfig(num_heads=8, head_dim=16, state_dim=16, num_groups=num_groups)
    return dataclasses.replace(preset, **SIZES | {"num_layers": len(pattern)}, layer_pattern=pattern, mamba=mamba)


@pytest.fixture(scope="session")
def models(presets: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
    return {name: tiny(name, preset) for name, preset in presets.items()}


def imported(path: Path, model: ModelConfig, seed: int) -> dict[str, str]:
    """Write a checkpoint as an import of Hugging Face weights does, from the family's rules; return its tensors' digests."""
    import torch

    from megatron_prism.checkpoint import folder, integrity, torch_dist
    from megatron_prism.hf import as_torch

    generator = torch.Generator().manual_seed(seed)
    rules = registry.rules(model)
    tensors = {rule.mcore: torch.randn(rule.shape, generator=generator).bfloat16() for rule in rules}
    (path / folder.STATE).mkdir(parents=True)
    torch_dist.write_tensors(
        path / folder.STATE,
        [torch_dist.TensorSpec(rule.mcore, rule.shape, torch.bfloat16) for rule in rules],
        lambda key: [as_torch.of_tensor(tensors[key])],
    )
    folder.write_meta(path, folder.describe(model, 0, 0))
    integrity.seal(path)
    return {key: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}


@pytest.fixture(scope="session")
def sides(models: dict[str, ModelConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Facts]]:
    """Return, by side and case, what the workers found; under "imported" the digests of the checkpoints made of rules."""
    root = tmp_path_factory.mktemp("te")
    faulty = {control: models[name] for control, name in CONTROLS.items()}
    cases = [
        {"name": name, "model": dataclasses.asdict(model), "control": name.split(" (")[0] if name in CONTROLS else None}
        for name, model in {**models, **faulty}.items()
    ]
    (root / "cases.json").write_text(json.dumps(cases))
    found: dict[str, Any] = {
        "imported": {name: imported(root / name / "imported", model, seed) for seed, (name, model) in enumerate(models.items())}
    }
    for side in ("local", "te", "local"):
        done = subprocess.run([sys.executable, str(WORKER), str(root), side], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        found[side] = json.loads((root / f"{side}.json").read_text())
    return found


def unfused(parameters: Facts) -> Facts:
    """Return TE's parameters under the names that the local layers give them."""
    renamed = {}
    for name, facts in parameters.items():
        for fused, alone in FUSED_NORMS.items():
            name = name.replace(fused, alone)
        renamed[name] = facts
    return renamed


def layouts(sides: dict[str, dict[str, Facts]], name: str) -> list[tuple[Facts, Facts]]:
    """Return (local, te) in one process and, where the family can be split, on a rank of TP 2 with sequence parallelism."""
    local, te = sides["local"][name], sides["te"][name]
    return [(local, te), *([(local["tp2"], te["tp2"])] if "tp2" in local else [])]


def test_parameters_have_the_same_names_shapes_dtypes_and_marks(sides: dict[str, dict[str, Facts]], preset_name: str) -> None:
    for local, te in layouts(sides, preset_name):
        assert unfused(te["parameters"]) == local["parameters"]
        assert {dtype for _, dtype, _ in te["parameters"].values()} == {"torch.bfloat16"}


def test_marks_are_set_where_ranks_differ(sides: dict[str, dict[str, Facts]], preset_name: str) -> None:
    """Norms over the hidden size are marked for sequence parallelism, everything else for tensor parallelism."""
    for _, te in layouts(sides, preset_name)[1:]:
        for name, (shape, _, marks) in te["parameters"].items():
            is_norm = shape == [SIZES["hidden_size"]] and "norm" in name and not name.endswith("mixer.norm.weight")
            assert (marks["sequence_parallel"], marks["tensor_model_parallel"]) == (is_norm, not is_norm), name


def test_only_a_single_group_of_mamba_heads_was_not_split(sides: dict[str, dict[str, Facts]]) -> None:
    assert [name for name, facts in sides["te"].items() if "tp2" not in facts and name not in CONTROLS] == ["granite-4.0-h-micro"]


def test_checkpoint_keys_are_the_rules(sides: dict[str, dict[str, Facts]], models: dict[str, ModelConfig], preset_name: str) -> None:
    rules = {rule.mcore: list(rule.shape) for rule in registry.rules(models[preset_name])}
    for side in ("local", "te"):
        found = sides[side][preset_name]
        assert found["tensors"] == rules
        assert found["objects"] == sides["te"][preset_name]["objects"]
        assert all(key.endswith("._extra_state") for key in found["objects"])


@pytest.mark.parametrize(("reader", "writer"), [("te", "local"), ("local", "te")])
def test_either_side_loads_the_other_with_nothing_missing_or_left_over(
    sides: dict[str, dict[str, Facts]], preset_name: str, reader: str, writer: str
) -> None:
    written = sides[writer][preset_name]["saved"]
    assert sides[reader][preset_name]["strict"][writer] == written
    assert sides[reader][preset_name]["weights"][writer] == written


@pytest.mark.parametrize("reader", ["te", "local"])
def test_an_imported_checkpoint_loads(sides: dict[str, dict[str, Facts]], preset_name: str, reader: str) -> None:
    assert sides[reader][preset_name]["weights"]["imported"] == sides["imported"][preset_name]


def test_modules_are_those_of_the_stock_te_spec(sides: dict[str, dict[str, Facts]], preset_name: str) -> None:
    te = sides["te"][preset_name]
    assert te["modules"] == te["stock"]
    kinds = {kind.rsplit(".", 1)[1] for kind in te["modules"].values()}
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention", "RMSNorm"} < kinds
    assert not kinds & {"LocalNorm", "LocalFinalNorm", "RowParallelLinear", "DotProductAttention"}


def test_multipliers_window_and_rotary_scaling_reach_te(
    sides: dict[str, dict[str, Facts]], models: dict[str, ModelConfig], preset_name: str
) -> None:
    model, te, local = models[preset_name], sides["te"][preset_name], sides["local"][preset_name]
    scale = model.kv_channels**-0.5 if model.attention_multiplier is None else model.attention_multiplier
    if (
        model.yarn is not None
    ):  # its factor is in the scores of every kernel, and nowhere in Megatron-Core's rotary kernels, which may drop it
        scale *= (0.1 * math.log(model.yarn.factor) + 1) ** 2
    assert te["rotary_factor"] == local["rotary_factor"] == 1.0
    window = [-1 if model.window_size is None else model.window_size - 1, 0]
    assert te["attention"] and all(
        facts == {"scales": pytest.approx([scale] * 3, rel=1e-12), "window": window} for facts in te["attention"]
    )
    branches = len(model.layer_pattern or "*-" * model.num_layers)
    assert te["residual"] == pytest.approx([model.residual_multiplier] * branches)
    assert te["rope"] == local["rope"]
    assert (te["rope"] is None) == (model.position_embedding == "none")


def test_the_same_parameters_are_left_to_train(
    sides: dict[str, dict[str, Facts]], models: dict[str, ModelConfig], preset_name: str
) -> None:
    """A norm goes with the linear layer behind it, under the name that a checkpoint has, whether that layer holds it or not."""
    wanted = sorted(name for name in registry.parameters(models[preset_name]) if ".self_attention." in name)
    assert all(local["trained"] == te["trained"] == wanted for local, te in layouts(sides, preset_name))


def test_context_parallelism_reaches_te(sides: dict[str, dict[str, Facts]], preset_name: str) -> None:
    found = sides["te"][preset_name]["context"]
    for kind in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        assert found[kind] and all(
            told == {"kind": kind, "ranks": [0, 1], "sizes": [2, 1] if kind == "a2a+p2p" else [2]} for told in found[kind]
        )


def test_documents_reach_te_as_packed_sequences(sides: dict[str, dict[str, Facts]], preset_name: str) -> None:
    """Two sequences of two documents in one row; `padding_causal` is what TE calls causal within each of them."""
    starts = [0, 3, 4, 5, 8]
    wanted = {
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal",
        "cu_seqlens_q": starts,
        "cu_seqlens_kv": starts,
        "max_seqlen_q": 5,
        "max_seqlen_kv": 5,
    }
    found = sides["te"][preset_name]["packed"]
    assert found and all(given == wanted for given in found)


def test_control_without_key_maps_a_hybrids_norms_have_other_keys(
    sides: dict[str, dict[str, Facts]], models: dict[str, ModelConfig]
) -> None:
    local, te = sides["local"]["no key maps"], sides["te"]["no key maps"]
    rules = {rule.mcore for rule in registry.rules(models[CONTROLS["no key maps"]])}
    assert "decoder.layers.0.norm.weight" in local["tensors"].keys() - rules
    assert (
        "decoder.layers.0.mixer.in_proj.layer_norm_weight" in local["strict"]["te"]
        and "decoder.layers.0.norm.weight" in te["strict"]["local"]
    )
    assert isinstance(local["weights"]["te"], str) and isinstance(te["weights"]["local"], str)


@pytest.mark.parametrize(("control", "key"), [("no extra state", "final_layernorm"), ("no extra state (hybrid)", "final_norm")])
def test_control_a_final_norm_without_extra_state_does_not_load_strictly(
    sides: dict[str, dict[str, Facts]], control: str, key: str
) -> None:
    local, te = sides["local"][control], sides["te"][control]
    assert set(te["objects"]) - set(local["objects"]) == {f"decoder.{key}._extra_state"}
    assert f"decoder.{key}._extra_state" in local["strict"]["te"] and f"decoder.{key}._extra_state" in te["strict"]["local"]
    assert te["weights"]["local"] == local["saved"], "sharded.load_weights leaves extra state out"


def test_control_norms_in_fp32_are_seen(sides: dict[str, dict[str, Facts]]) -> None:
    local, te = sides["local"]["fp32 norms"]["parameters"], unfused(sides["te"]["fp32 norms"]["parameters"])
    assert {name for name in local if local[name] != te[name]} == {
        f"decoder.layers.{layer}.{norm}.weight" for layer in (0, 1) for norm in ("input_layernorm", "pre_mlp_layernorm")
    }
