"""Changes of weights against plain numpy in fp64, and the nulls against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.analysis import weights
from megatron_prism.analysis.components import KIND_OF, parts_of
from megatron_prism.core.errors import PrismError
from megatron_prism.hf import bits
from megatron_prism.jobs import analyze, convert
from megatron_prism.report import analysis
from tests.parity.tiny import FAMILIES, random_model

ONE_PERCENT = weights.THRESHOLDS.index(0.01)


def pair(num: int, scale: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    old_N = torch.randn(num, generator=torch.Generator().manual_seed(1)).to(dtype)
    update_N = torch.randn(num, generator=torch.Generator().manual_seed(2))
    return old_N, (old_N.float() + scale * update_N).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_in_pieces_is_numpys(dtype: torch.dtype) -> None:
    old_N, new_N = pair(10_007, 0.01, dtype)
    old_N[::100], new_N[::200] = 0, old_N[::200]  # zeros, some of which stay
    old_N[7], new_N[7] = 0, 1
    pieces = [weights.tally(old_N[first : first + 999], new_N[first : first + 999], first, 3) for first in range(0, 10_007, 999)]
    tallied = weights.added(pieces)
    old, delta = (values.double().numpy() for values in (old_N, new_N.double() - old_N.double()))
    assert tallied.square_old == pytest.approx(float(old @ old), rel=1e-6)
    assert tallied.square_delta == pytest.approx(float(delta @ delta), rel=1e-6)
    wide = np.float64 if dtype == torch.float64 else np.float32  # in which the ratio is taken
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(new_N.to(torch.double).numpy().astype(wide) - old.astype(wide)) / np.abs(old).astype(wide)
    assert tallied.num_changed == tuple(int((ratio > threshold).sum()) for threshold in weights.THRESHOLDS)
    assert (tallied.num, tallied.num_zero) == (10_007, int((old == 0).sum()))
    assert tallied.num_different == int((delta != 0).sum())
    assert torch.equal(tallied.sample_old_N.double(), old_N[::3].double())  # as if it had come in one piece
    torch.testing.assert_close(tallied.sample_delta_N.double(), torch.from_numpy(delta)[::3], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_squares_that_fp32_does_not_hold_are_taken_in_fp64(scale: float) -> None:
    """Of 1e-25 the squares are 0 in fp32, of 1e25 they are inf: an update of 98 % of the entries would have no norm, or none that is finite."""
    old_N, new_N = pair(1000, 0.5)
    old_N, new_N = old_N * scale, new_N * scale
    change = weights.change_of(weights.tally(old_N, new_N), torch.float32, 0)
    delta = (new_N.double() - old_N.double()).norm() / old_N.double().norm()
    assert change.delta == pytest.approx(float(delta), rel=1e-6) and change.dense_null[ONE_PERCENT] > 0.9
    assert weights.cosine(old_N, new_N, new_N).figures()["cosine"] == pytest.approx(1)


def test_the_dense_null_is_what_a_dense_update_changes() -> None:
    """A Gaussian update of 6e-4 of a Gaussian matrix changes 3.8 % by more than 1 %: what the paper's RL changes."""
    old_N, new_N = pair(1 << 20, 6e-4)
    change = weights.change_of(weights.tally(old_N, new_N, 0, 16), torch.float32, 0)
    assert change.delta == pytest.approx(6e-4, rel=1e-2)
    assert change.changed[ONE_PERCENT] == pytest.approx(0.038, abs=0.001)
    for null in (change.dense_null, change.dense_null_stored, change.shuffled_null):
        assert null[ONE_PERCENT] == pytest.approx(0.038, abs=0.002)


def test_a_sparse_update_is_below_its_nulls_and_rounding_is_seen() -> None:
    old_N, new_N = pair(1 << 18, 6e-3)
    is_kept_N = torch.rand(old_N.shape, generator=torch.Generator().manual_seed(3)) < 0.01
    sparse = weights.change_of(weights.tally(old_N, torch.where(is_kept_N, new_N, old_N), 0, 4), torch.float32, 0)
    assert sparse.different == pytest.approx(0.01, abs=0.001)
    assert sparse.changed[ONE_PERCENT] < 0.3 * sparse.dense_null[ONE_PERCENT]
    assert sparse.shuffled_null[ONE_PERCENT] == pytest.approx(sparse.changed[ONE_PERCENT], rel=0.2)  # its entries, elsewhere
    old_N, new_N = pair(1 << 18, 6e-4, torch.bfloat16)
    stored = weights.change_of(weights.tally(old_N, new_N, 0, 4), torch.bfloat16, 0)
    assert stored.different < 0.2 and stored.delta != pytest.approx(6e-4, rel=0.2)  # a true 6e-4, read through bfloat16
    assert stored.changed[0] == pytest.approx(stored.different, rel=1e-3)  # any step there is above 0.1 %
    drawn_N = stored.delta * torch.randn(old_N.shape, generator=torch.Generator().manual_seed(6))
    step_N = ((old_N.float() + drawn_N).bfloat16().float() - old_N.float()).abs()
    shares = [float((step_N > threshold * old_N.float().abs()).float().mean()) for threshold in weights.THRESHOLDS]
    assert stored.dense_null_stored == pytest.approx(shares, abs=0.01)  # rounded as the update was
    assert abs(stored.dense_null[0] - stored.dense_null_stored[0]) > 0.05
    assert weights.change_of(weights.tally(old_N, old_N, 0, 4), torch.bfloat16, 0).figures()["changed"]["0.001"] == 0


def test_the_cosine_of_two_updates_and_its_null() -> None:
    old_N, one_N = pair(1 << 16, 1.0)
    other_N = old_N + 0.6 * (one_N - old_N) + 0.8 * torch.randn(old_N.shape, generator=torch.Generator().manual_seed(4))
    found = weights.cosine(old_N, one_N, other_N).figures()
    assert found["cosine"] == pytest.approx(0.6, abs=0.01) and found["cosine_null_std"] == 1 / 256
    apart = weights.cosine(old_N, one_N, old_N + torch.randn(old_N.shape, generator=torch.Generator().manual_seed(5))).figures()
    assert apart["cosine"] is not None and abs(apart["cosine"]) < 4 / 256
    assert weights.cosine(old_N, one_N, old_N).figures()["cosine"] is None  # 0 would say that two updates are independent


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_belongs_to_a_component(family: str) -> None:
    kinds = set()
    for name, value in random_model(family).state_dict().items():
        parts = parts_of(name, value.shape[0])
        assert [end for _, end in parts.values()][-1] == value.shape[0]
        kinds |= {KIND_OF[component] for component in parts}
    assert ("mamba" in kinds) == (family in ("granite_h_micro", "nemotron_h"))
    assert kinds >= {"attention", "mlp", "norm", "embed/lm_head"}
    with pytest.raises(KeyError):
        parts_of("model.layers.0.router.weight", 4)


def folders(tmp_path: Path, family: str, scale: float) -> tuple[Path, Path]:
    random_model(family).save_pretrained(tmp_path / "a")
    random_model(family).save_pretrained(tmp_path / "b")
    before = load_file(tmp_path / "a/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    after = {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    save_file(after, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("family", ["granite_h_micro", "llama"])
def test_folders_are_compared_by_tensor_component_and_in_all(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = folders(tmp_path, family, 0.01)
    monkeypatch.setattr(bits, "PIECE_BYTES", 4096)  # many pieces
    result = analyze.run_weights(base, other, other, num_threads=2, seed=0)
    before, after = (load_file(root / "model.safetensors") for root in (base, other))
    assert {*result["tensors"]} == {*before}
    squares = {"delta": 0.0, "old": 0.0}
    for name, value in before.items():
        delta = after[name].double() - value.double()
        told = result["tensors"][name]
        relative = pytest.approx(float(delta.norm() / value.double().norm()), rel=1e-6)
        assert told["delta"] == (relative if value.any() else None)  # a new model's conv1d.bias is zeros
        assert told["changed"]["0.01"] == pytest.approx(float((delta.abs() > 0.01 * value.double().abs()).double().mean()), abs=2e-4)
        assert told["parameters"] == value.numel() and told["cosine"] == pytest.approx(1)
        squares["delta"] += float(delta.norm() ** 2)
        squares["old"] += float(value.double().norm() ** 2)
    assert result["total"]["delta"] == pytest.approx(math.sqrt(squares["delta"] / squares["old"]), rel=1e-6)
    for key in ("changed", "changed_dense_null", "changed_dense_null_stored", "changed_shuffled_null"):  # each entry counts once
        num = sum(of["parameters"] * of[key]["0.01"] for of in result["tensors"].values())
        assert result["total"][key]["0.01"] == pytest.approx(num / result["total"]["parameters"], rel=1e-9)
    deltas = [of["delta"] for of in result["tensors"].values()]
    of_tensors = None if None in deltas else pytest.approx(sum(deltas) / len(deltas), rel=1e-9)  # each counts once, whatever its size
    assert result["total"]["delta_mean_of_tensors"] == of_tensors
    assert (family == "llama") == (of_tensors is not None)
    assert result["total"]["parameters"] == sum(value.numel() for value in before.values())  # a tied head once
    lines = list(analysis.weights(analyze.run_weights(base, other, base, num_threads=2, seed=0)))
    assert [line.split()[-2] for line in lines[1:]] == ["-"] * (len(lines) - 1)  # no cosine with no update
    assert len({line[: lines[0].index("delta") - 4].strip() for line in lines}) == len(lines)  # each row has a name of its own
    again = analyze.run_weights(base, other, other, num_threads=1, seed=0)
    assert json.dumps(again) == json.dumps(result)  # whatever the threads
    other_seed = analyze.run_weights(base, other, other, num_threads=2, seed=1)["total"]
    assert {key for key in other_seed if other_seed[key] != result["total"][key]} == {"changed_dense_null_stored", "changed_shuffled_null"}


def test_the_stored_null_is_rounded_to_the_dtype_of_the_model_after(tmp_path: Path) -> None:
    base, other = folders(tmp_path, "llama", 0.01)
    halves = {name: value.bfloat16() for name, value in load_file(other / "model.safetensors").items()}
    save_file(halves, other / "model.safetensors", metadata={"format": "pt"})
    name = "model.layers.0.mlp.down_proj.weight"
    for one, two, dtype in ((base, other, torch.bfloat16), (other, base, torch.float32)):
        result = analyze.run_weights(one, two, None, 1, 0)
        before, after = (load_file(root / "model.safetensors")[name].flatten() for root in (one, two))
        change = weights.change_of(weights.tally(before, after), dtype, analyze._seed(0, name)).figures()
        assert result["tensors"][name]["changed_dense_null_stored"] == change["changed_dense_null_stored"]
        assert change["changed_dense_null_stored"] != {key: 0.0 for key in change["changed_dense_null_stored"]}
    assert result["dtypes"] == ["bfloat16", "float32"]


def test_models_that_differ_in_shape_are_refused_and_positions_may_differ(tmp_path: Path) -> None:
    base, other = folders(tmp_path, "llama", 0.01)
    config: dict[str, Any] = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    assert analyze.run_weights(base, other, None, 1, 0)["against"] is None
    random_model("llama", intermediate_size=96).save_pretrained(tmp_path / "c")
    with pytest.raises(PrismError, match="the shape in"):
        analyze.run_weights(base, tmp_path / "c", None, 1, 0)
    random_model("mistral").save_pretrained(tmp_path / "d")
    with pytest.raises(PrismError, match="mistral: required|found mistral"):
        analyze.run_weights(base, tmp_path / "d", None, 1, 0)
    with pytest.raises(PrismError):
        convert.plan_import(tmp_path / "none")


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    base, other = folders(tmp_path, "llama", 0.01)
    values = load_file(other / "model.safetensors")
    values["model.layers.1.self_attn.q_proj.weight"][3, 5] = value
    save_file(values, other / "model.safetensors", metadata={"format": "pt"})
    said = rf"b/model\.safetensors: model\.layers\.1\.self_attn\.q_proj\.weight: found {value} at \[3, 5\]"
    for one, two in ((base, other), (other, base)):
        with pytest.raises(PrismError, match=said):
            analyze.run_weights(one, two, None, 1, 0)
        with pytest.raises(PrismError, match=said):
            analyze.run_spectra(one, two, 4, 0)


def test_what_was_zeros_has_no_relative_change_and_the_result_is_json(tmp_path: Path) -> None:
    base, other = folders(tmp_path, "llama", 0.01)
    name = "model.layers.1.self_attn.o_proj.weight"
    values = load_file(base / "model.safetensors")
    save_file({**values, name: torch.zeros_like(values[name])}, base / "model.safetensors", metadata={"format": "pt"})
    weights_of, spectra_of = analyze.run_weights(base, other, None, 1, 0), analyze.run_spectra(base, other, 4, 0)
    json.dumps([weights_of, spectra_of], allow_nan=False)
    assert any(line.startswith("total ") for line in analysis.weights(weights_of)) and list(analysis.spectra(spectra_of))
    assert weights_of["tensors"][name]["delta"] is None and weights_of["total"]["delta"] > 0
    assert spectra_of["tensors"][name]["singular_value_shift_max"] is None and spectra_of["tensors"][name]["stable_rank"] > 1


def test_a_tied_head_beside_one_apart_is_refused_by_its_cause(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "a")
    random_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "b")
    for one, two in (("a", "b"), ("b", "a")):
        with pytest.raises(PrismError, match="tie_word_embeddings: found (True|False); required"):
            analyze.run_weights(tmp_path / one, tmp_path / two, None, 1, 0)
