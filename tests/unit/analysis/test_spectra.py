"""Spectra against numpy and scipy in fp64, and three kinds of update that they tell apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.analysis import spectra
from megatron_prism.jobs import analyze
from megatron_prism.report import analysis
from tests.parity.tiny import random_model


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_principal_angles_are_scipys_whatever_the_signs_and_the_order() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    basis = torch.linalg.qr(gaussian(60, 10, seed=1))[0]
    near = torch.linalg.qr(basis + 1e-9 * gaussian(60, 10, seed=2))[0]
    for other in (near, torch.linalg.qr(basis + 0.3 * gaussian(60, 10, seed=3))[0], torch.linalg.qr(gaussian(60, 10, seed=4))[0]):
        found = spectra.principal_angles(basis, other)
        theirs = np.sort(linalg.subspace_angles(basis.numpy(), other.numpy()))
        np.testing.assert_allclose(found.numpy(), theirs, rtol=1e-6, atol=1e-12)
        turned = other[:, torch.randperm(10)] * torch.tensor([-1.0, 1.0] * 5, dtype=torch.float64)
        np.testing.assert_allclose(spectra.principal_angles(basis, turned).numpy(), theirs, rtol=1e-6, atol=1e-12)
    assert float(spectra.principal_angles(basis, near).max()) > 1e-10  # a cosine would have lost it


def test_ranks_are_numpys_and_the_randomised_svd_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(200, 12, seed=5) @ torch.diag(torch.arange(12, 0, -1.0, dtype=torch.float64)) @ gaussian(12, 150, seed=6)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    square = float((matrix**2).sum())
    whole = spectra.leading(matrix, 8, seed=0)
    shares = values[values > 1e-9] / values.sum()
    told = spectra.ranks(whole, square)
    assert told["stable_rank"] == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-9)
    assert told["effective_rank"] == pytest.approx(math.exp(-float((shares * np.log(shares)).sum())), rel=1e-6)
    assert spectra.share_in_leading(whole, 8, square) == pytest.approx(float((values[:8] ** 2).sum() / (values**2).sum()))
    monkeypatch.setattr(spectra, "EXACT", 8)
    drawn = spectra.leading(matrix, 8, seed=0)
    assert not drawn.is_whole and spectra.ranks(drawn, square)["effective_rank"] is None
    np.testing.assert_allclose(drawn.values_K.numpy(), values[:8], rtol=1e-5)
    assert float(spectra.principal_angles(whole.left_RK[:, :8], drawn.left_RK).max()) < 1e-3
    assert spectra.ranks(spectra.leading(torch.zeros(9, 9), 2, 0), 0.0)["stable_rank"] == 0


def test_the_randomised_svd_holds_for_a_flat_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    old = gaussian(800, 600, seed=5)
    new = old + 3e-3 * gaussian(800, 600, seed=6)
    exact = spectra.spectra(old, new, 8, seed=0)
    monkeypatch.setattr(spectra, "EXACT", 8)
    drawn = spectra.spectra(old, new, 8, seed=0)
    for name, rel in {"stable_rank": 1e-3, "share_in_leading": 1e-2, "principal_angle_left_max": 0.2}.items():
        assert drawn[name] == pytest.approx(exact[name], rel=rel), name
    monkeypatch.setattr(spectra, "NUM_ITERATIONS", 4)
    few = spectra.spectra(old, new, 8, seed=0)["principal_angle_left_max"]
    assert few != pytest.approx(exact["principal_angle_left_max"], rel=0.5)


def test_a_matrix_of_low_rank_has_no_shift_of_its_zeros() -> None:
    old = torch.zeros(64, 48, dtype=torch.float64)
    old[:2] = gaussian(2, 48, seed=11)
    assert spectra.spectra(old, 1.5 * old, 8, seed=0)["singular_value_shift_max"] == pytest.approx(0.5)
    rounded = gaussian(64, 2, seed=12) @ gaussian(2, 48, seed=13)  # its other singular values are rounding
    assert spectra.spectra(rounded, 1.5 * rounded, 8, seed=0)["singular_value_shift_max"] == pytest.approx(0.5)


def test_no_more_directions_are_looked_at_than_there_are() -> None:
    figures = spectra.spectra(gaussian(5, 3, seed=1), gaussian(5, 3, seed=2), 8, 0)
    assert figures["directions"] == 3 and figures["share_in_leading"] == pytest.approx(1)


def test_angles_near_a_right_one_and_near_0_are_exact() -> None:
    for angle in (1e-9, math.pi / 2 - 1e-9):
        one, other = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[math.cos(angle)], [math.sin(angle)]]).double()
        assert float(spectra.principal_angles(one, other)) == pytest.approx(angle, abs=1e-14)


def test_sparse_low_rank_and_dense_updates_differ() -> None:
    old = gaussian(96, 64, seed=7)
    dense = 0.01 * gaussian(96, 64, seed=8)
    low = 0.05 * gaussian(96, 2, seed=9) @ gaussian(2, 64, seed=10)
    figures = {name: spectra.spectra(old, old + update, 8, seed=0) for name, update in {"dense": dense, "low": low}.items()}
    null = figures["dense"]["null_stable_rank"]
    assert null == pytest.approx(96 * 64 / (math.sqrt(96) + math.sqrt(64)) ** 2, rel=0.1)  # Bai and Yin
    assert figures["dense"]["stable_rank"] == pytest.approx(null, rel=0.1) and figures["dense"]["effective_rank"] > 50
    assert figures["low"]["stable_rank"] < 2 < 2.1 > figures["low"]["effective_rank"]
    assert figures["low"]["share_in_leading"] == pytest.approx(1) and figures["low"]["null_share_in_leading"] < 0.5
    left, values, right = torch.linalg.svd(old, full_matrices=False)
    along = old + 0.1 * left[:, :3] @ torch.diag(values[:3]) @ right[:3]  # its own leading directions, stretched
    told = spectra.spectra(old, along, 8, seed=0)
    assert told["share_on_principal"] == pytest.approx(1) and told["null_share_on_principal"] < 0.05
    assert told["principal_angle_left_max"] < 1e-6 < told["null_principal_angle_left_max"]
    assert told["singular_value_shift_max"] == pytest.approx(0.1)


def test_a_gaussian_update_is_as_its_null() -> None:
    old = gaussian(80, 60, seed=1)
    for scale in (1e-4, 1e-2):
        told = spectra.spectra(old, old + scale * gaussian(80, 60, seed=2), 8, seed=0)
        for name in ("stable_rank", "effective_rank", "singular_value_shift_mean", "principal_angle_left_max"):
            assert told[name] == pytest.approx(told[f"null_{name}"], rel=0.6), name


def test_left_and_right_directions_turn_apart() -> None:
    left, right, other = (torch.linalg.qr(gaussian(40, 5, seed=seed)).Q for seed in (1, 2, 3))
    values = torch.diag(torch.arange(5.0, 0.0, -1.0, dtype=torch.float64))
    told = spectra.spectra(left @ values @ right.T, left @ values @ other.T, 5, seed=0)
    assert told["principal_angle_left_max"] < 1e-6 and told["principal_angle_right_max"] > 0.5


def test_folders_are_looked_at_matrix_by_matrix(tmp_path: Path) -> None:
    for name in ("a", "b"):
        random_model("granite_h_micro").save_pretrained(tmp_path / name)
    after = load_file(tmp_path / "b/model.safetensors")
    moved = "model.layers.0.mamba.in_proj.weight"
    after[moved] += 0.01 * gaussian(after[moved].shape[0], 1, seed=1).float() @ gaussian(1, after[moved].shape[1], seed=2).float()
    save_file(after, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    result = analyze.run_spectra(tmp_path / "a", tmp_path / "b", 4, seed=0)
    ranks = {name: figures["stable_rank"] for name, figures in result["tensors"].items()}
    assert ranks[moved] == pytest.approx(1, abs=1e-3)
    assert all(rank == 0 for name, rank in ranks.items() if name != moved)
    halves = {name for name in ranks if name not in after}  # of a tensor that holds two components; the others have their own name
    assert halves and {name.partition(" ")[2] for name in halves} == {"(gate)", "(up)"}
    assert {"q", "gate", "up", "down", "in_proj", "out_proj"} <= {*result["components"]} and "embed/lm_head" not in result["components"]
    assert len(list(analysis.spectra(result))) == 1 + len(result["components"])
