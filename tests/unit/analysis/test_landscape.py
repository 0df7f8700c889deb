"""Points between three models against plain sums of their folders, the share that is kept against a sort, and what a path says."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megatron_prism.analysis import landscape, path
from megatron_prism.analysis.landscape import Point
from megatron_prism.checkpoint import at_rest
from megatron_prism.checkpoint.at_rest import Opened
from megatron_prism.cli.entry import app
from megatron_prism.core.check.landscape import check_landscape
from megatron_prism.core.config import LandscapeConfig
from megatron_prism.core.load import build
from megatron_prism.hf import bits
from megatron_prism.jobs import convert
from megatron_prism.report import analysis
from tests.parity.tiny import random_model
from tests.unit.merge.folders import moved

SHARES = (0.01, 0.2)


@pytest.fixture(params=["llama", "granite_h_micro"])
def three(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Return three models of a family as folders."""
    base = tmp_path / "base"
    random_model(request.param).save_pretrained(base)
    mid = moved(base, tmp_path / "mid", 1)
    return [base, mid, moved(mid, tmp_path / "rl", 2, by=0.01)]


@contextmanager
def opened(paths: list[Path]) -> Iterator[dict[str, Opened]]:
    with at_rest.opened([at_rest.read(path) for path in paths]) as models:
        yield dict(zip(landscape.MODELS, models, strict=True))


def test_the_points_are_the_papers() -> None:
    points = landscape.points(6, 4, 5, SHARES, 2)
    along, plane = points[:11], points[11:36]
    assert [point.a for point in along] == pytest.approx([*(step / 6 for step in range(7)), 1, 1, 1, 1])
    assert [point.b for point in along] == [0] * 7 + [0.25, 0.5, 0.75, 1]
    assert {point.name: point.model for point in along if point.model} == {"base": "base", "mid": "mid", "rl": "rl"}
    assert {round(point.b, 6) for point in plane} == {-0.3, 0.1, 0.5, 0.9, 1.3} == {round(1 - point.a, 6) for point in plane}
    assert all(sum(point.weights.values()) == pytest.approx(1) for point in points[:36])
    assert [point.name for point in points[36:]] == ["keep_0.01", "keep_0.2", "null_0", "null_1"]
    assert len({point.name for point in points}) == len(points) and len(landscape.points(6, 4, 0, (), 0)) == 11
    finer = {point.name: (point.a, point.b) for point in landscape.points(6, 4, 9, (), 0)}
    assert all(finer[point.name] == pytest.approx((point.a, point.b)) for point in plane)  # what is sampled stays what it is


def test_a_point_is_the_sum_of_its_models(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of folders and of a checkpoint; the models themselves bit for bit."""
    monkeypatch.setattr(bits, "PIECE_BYTES", 4096)
    convert.run_import(three[2], tmp_path / "ckpt", dry_run=False)
    with opened([*three[:2], tmp_path / "ckpt"]) as models, opened(three) as folders:
        rules = models["mid"].at_rest.rules
        for point in landscape.points(2, 2, 2, (), 0):
            for key in rules:
                base, mid, rl = (folders[name].mcore(key).double() for name in landscape.MODELS)
                wanted = base + point.a * (mid - base) + point.b * (rl - mid)
                made = landscape.tensor(point, models, key, {}, 0)
                torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=1e-7)
                if point.model:
                    assert torch.equal(made, folders[point.model].mcore(key))


def test_the_largest_changes_are_kept_exactly(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "PIECE_BYTES", 4096)
    mid, rl = (load_file(path / "model.safetensors") for path in three[1:])
    changes_N = torch.cat([(rl[name] - mid[name]).abs().reshape(-1) for name in mid]).sort(descending=True).values
    with opened(three) as models:
        thresholds = landscape.largest(models["mid"], models["rl"], SHARES)
        for share in SHARES:
            num = round(share * changes_N.numel())
            assert thresholds[share] == float(changes_N[num - 1])
            kept = 0
            for key in models["mid"].at_rest.rules:
                made = landscape.tensor(Point("", "keep_largest", b=1.0, keep=share), models, key, thresholds, 0)
                old, new = models["mid"].mcore(key), models["rl"].mcore(key)
                assert bool(((made == old) | (made == new)).all())
                kept += int((made != old).sum())
            assert kept == num


def test_without_a_share_no_change_is_read(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 billion parameters it would be four times 16 GB, on one rank, while the others wait."""
    with opened(three) as models:
        monkeypatch.setattr(landscape, "match", lambda models: pytest.fail("the models are read"))
        assert landscape.largest(models["mid"], models["rl"], ()) == {}


def test_a_null_has_the_updates_norm_and_is_drawn_by_name_and_seed(three: list[Path]) -> None:
    with opened(three) as models:
        draws = {}
        for key in models["mid"].at_rest.rules:
            mid, rl = (models[name].mcore(key).double() for name in ("mid", "rl"))
            for seed, draw in ((0, 0), (0, 1), (7, 0)):
                made = landscape.tensor(Point("", "null", draw=draw), models, key, {}, seed)
                assert float((made.double() - mid).norm()) == pytest.approx(float((rl - mid).norm()), rel=1e-4)
                draws[key, seed, draw] = zlib.crc32((made - mid.float()).contiguous().numpy().tobytes())
            assert abs(float(torch.nn.functional.cosine_similarity((made - mid).flatten(), (rl - mid).flatten(), 0))) < 0.9
        assert len(set(draws.values())) == len(draws)


def test_barriers_and_drops() -> None:
    assert path.barrier([1.0, 1.5, 2.0]) == 0 and path.barrier([1.0, 1.8, 2.0]) == pytest.approx(0.3)
    assert path.barrier([2.0, 0.5, 1.0]) == 0  # a valley is none
    assert path.largest_drop([0.1, 0.5, 0.3, 0.4, 0.1, 0.9]) == (1, 4)
    first, last = path.largest_drop([0.1, 0.1, 0.2])
    assert first == last
    walk = list(np.random.default_rng(0).normal(size=50).cumsum())
    first, last = path.largest_drop(walk)
    assert walk[first] - walk[last] == max(walk[i] - walk[j] for i in range(50) for j in range(i, 50))


def test_the_figures_of_a_landscape() -> None:
    """A score that falls and one that a fault hides, a loss with a barrier, and gains above and below their error."""
    points = landscape.points(2, 1, 0, (0.2,), 1)
    scores = {"base": 0.3, "to_mid_1_of_2": 0.1, "mid": 0.4, "rl": 0.8, "keep_0.2": 0.7, "null_0": 0.4}

    def scored(name: str, score: float) -> dict[str, Any]:
        loss = {"loss": 3.0 if name == "to_mid_1_of_2" else 2.0, "num_tokens": 10}
        math = {"score": score, "standard_error": 0.03, "num_questions": 50, "num_faults": 0}
        faulty = {**math, "score": None if name == "mid" else 0.5}
        return {
            "tasks": {
                "math": math,
                "same": {**math, "score": score / 8},
                "faulty": faulty,
                "losses": {"score": None, "losses": {"a": loss}},
            }
        }

    figures = path.figures(points, {name: scored(name, score) for name, score in scores.items()})
    assert figures["monotonic"] == {"math": False, "same": False}
    drop = figures["largest_drop"]["math"]
    assert drop == {"drop": pytest.approx(0.2), "from": "base", "to": "to_mid_1_of_2", "standard_error": pytest.approx(0.03 * 2**0.5)}
    assert figures["barrier"] == {"base_to_mid": pytest.approx(1.0), "mid_to_rl": 0.0}
    assert figures["gain_kept"]["keep_0.2"] == {"math": pytest.approx(0.75), "same": None}
    assert figures["gain_kept"]["null_0"] == {"math": 0.0, "same": None}
    assert [row["loss"] for row in figures["points"]] == [2, 3, 2, 2, 2, 2] and figures["points"][4]["keep_largest"] == 0.2
    assert "faulty" not in figures["points"][2]["tasks"] and list(analysis.landscape({**figures}))


def config(**values: object) -> LandscapeConfig:
    models = {f"{name}_model": {"hf": name} for name in landscape.MODELS}
    return build(
        {"out": "out", "precision": "fp32", **models, "tasks": {"a": {"set": "file", "path": "a"}}, **values}, LandscapeConfig, str
    )


def test_every_problem_of_a_config_is_named() -> None:
    assert check_landscape(config(), 1) == []
    wrong = config(
        base_model={}, rl_model={"hf": "a", "checkpoint": "b"}, engine="vllm", keep_largest=[1.5], num_steps_to_rl=0, tasks={"a b": {}}
    )
    places = [problem.where for problem in check_landscape(wrong, 1)]
    assert sorted(places) == ["base_model", "engine", "keep_largest.0", "num_steps_to_rl", "rl_model", "tasks.a b"]
    said = "\n".join(map(str, check_landscape(config(keep_largest=[0.2, 0.1, 0.20000001], plane_size=1), 1)))
    assert "keep_largest: found 0.2 twice" in said and "plane_size: found 1; required 0" in said and len(said.splitlines()) == 2


def test_models_that_are_not_there_are_all_named(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"out: {tmp_path}/out\ntasks: {{a: {{set: file, path: {tmp_path}/none}}}}\nprecision: fp32\n")
    words = [f"{name}_model.hf={tmp_path}/{name}" for name in landscape.MODELS]
    said = str(CliRunner().invoke(app, ["analyze", "landscape", str(file), *words]).exception)
    assert all(said.count(f"{name}_model.hf {tmp_path}/{name}: ") == said.count(f"{tmp_path}/{name}: ") == 1 for name in landscape.MODELS)
    assert f"{tmp_path}/none: found no such file" in said
    assert not (tmp_path / "out").exists()


def test_the_lines_say_what_the_path_says() -> None:
    row = {"kind": "path", "a": 1.0, "b": 0.0, "loss": 2.5, "tasks": {"math": {"score": 0.5, "standard_error": 0.1, "num_questions": 9}}}
    result = {
        "points": [{**row, "name": "mid"}, {**row, "name": "null_0", "kind": "null", "loss": None}],
        "monotonic": {"math": False},
        "largest_drop": {"math": {"drop": 0.25, "standard_error": 0.125}},
        "barrier": {"base_to_mid": 0.125, "mid_to_rl": None},
        "gain_kept": {"null_0": {"math": 0.5}},
    }
    lines = list(analysis.landscape(result))
    assert lines[1].split() == ["mid", "1", "0", "0.500", "0.100", "2.500"] and lines[2].split()[1:3] == ["-", "-"]
    assert "falls by up to 0.250 (+- 0.125)" in lines[3] and "0.1250" in lines[4] and "no held_out task" in lines[5] and "50 %" in lines[6]
