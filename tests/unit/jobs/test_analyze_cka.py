"""What `prism analyze cka` refuses before anything starts, and the table that it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.analysis.states import Kept
from megatron_prism.core.check.cka import check_cka, pairs
from megatron_prism.core.config import CkaConfig
from megatron_prism.core.errors import CheckpointError, InputError
from megatron_prism.core.load import build
from megatron_prism.jobs import analyze_cka
from megatron_prism.report import analysis

MODELS = [{"name": name, "hf": f"models/{name}"} for name in ("base", "mid", "rl")]


def config(**more: Any) -> CkaConfig:
    return build({"out": "out", "models": MODELS, "distributions": {"a": {"path": ["a.jsonl"]}}, **more}, CkaConfig, str)


def test_a_pair_is_each_model_with_the_first_and_neighbours() -> None:
    assert pairs(config()) == [("base", "mid"), ("base", "rl"), ("mid", "rl")]
    assert pairs(config(pairs=["rl|mid"])) == [("rl", "mid")]
    assert not check_cka(config(), 1)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"models": MODELS[:1]}, "models: found 1; required at least two"),
        ({"models": [*MODELS, MODELS[0]]}, "models.3.name: found base twice"),
        ({"models": [*MODELS, {"name": "x"}]}, "models.3: found both or none"),
        ({"models": [*MODELS, {"name": "a|b", "hf": "x"}]}, "models.3.name: found 'a|b'"),
        ({"pairs": ["base|nobody"]}, "pairs.0: found 'base|nobody'"),
        ({"pairs": ["base|base"]}, "pairs.0: found 'base|base'"),
        ({"pairs": ["base|mid", "base|mid"]}, "each pair once"),
        ({"distributions": {}}, "distributions: found none"),
        ({"distributions": {"a": {"path": ["a", "b"], "set": "gsm8k"}}}, "distributions.a.path: found 2 files of the set gsm8k"),
        ({"num_prompts": 20, "subsample": 21}, "subsample: found 21"),
        ({"num_prompts": 20, "num_directions_removed": [1, 17]}, "num_directions_removed: found 17; required at most 16"),
        ({"parallel": {"pp": 2, "vpp": 2}}, "parallel.vpp: found 2; required null"),
        ({"num_permutations": 1}, "num_permutations: found 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(more: dict[str, Any], named: str) -> None:
    assert named in "\n".join(map(str, check_cka(config(**more), 1)))


def test_models_and_prompts_that_are_not_there_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        analyze_cka.resolve(config(out=str(tmp_path / "out")), 1)
    said = str(refused.value)
    assert all(name in said for name in ("models/base", "models/mid", "models/rl", "a.jsonl")), said
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_one_to_a_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"base": {"a": [[1, 2], [1, 3], [1, 2]], "b": [[1], [2]]}, "mid": {"a": [[1], [2], [3]], "b": [[5], [5]]}}
    monkeypatch.setattr(analyze_cka, "_tokens", lambda resolved: tokens)
    said = [str(problem) for problem in analyze_cka._alike(analyze_cka.Resolved(config(), {}, {}, {}, {}))]
    assert len(said) == 2
    assert "distributions.a: found 2 of 3 differ in what base reads of them, at most 2 tokens" in said[0]
    assert "distributions.b: found 1 of 2 differ in what mid reads" in said[1]


def test_states_that_no_prompt_changes_are_refused_and_not_kept(tmp_path: Path) -> None:
    states_PNC = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
    subject = analyze_cka.Subject("base", None, {})
    analyze_cka._keep(Kept(tmp_path), "a", states_PNC, subject, "words")
    states_PNC[1] = states_PNC[1, :1] * (1 + 1e-8 * states_PNC[2])  # but for rounding
    with pytest.raises(CheckpointError, match="base: found the same state of every prompt after layer 1 on words"):
        analyze_cka._keep(Kept(tmp_path), "b", states_PNC, subject, "words")
    states_PNC[2, 3, 4] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or inf after layer 2 on words"):
        analyze_cka._keep(Kept(tmp_path), "b", states_PNC, subject, "words")
    assert Kept(tmp_path).path("a") is not None and Kept(tmp_path).path("b") is None


def test_the_table_has_a_line_a_pair_and_distribution_beside_its_nulls() -> None:
    def figures(least: float) -> dict[str, Any]:
        null = {"mean": 0.5, "std": 0.01, "min": 0.4, "max": 0.6}
        return {
            **{f"min_{form}": least for form in ("biased", "debiased")},
            **{f"min_{form}_layer": 7 for form in ("biased", "debiased")},
            **{f"min_{form}_{what}": null for form in ("biased", "debiased") for what in ("subsampled", "permutation_null")},
            **{f"min_{form}_ablated": {"1": 0.25, "5": 0.125} for form in ("biased", "debiased")},
            "gaussian_null": {"biased": 0.95, "debiased": -0.01},
            "null_update": {"min_biased": 0.997, "min_debiased": 0.996},
        }

    result = {"pairs": {"base|mid": {"c4": figures(0.75), "gsm8k": figures(0.5)}}}
    lines = list(analysis.cka(json.loads(json.dumps(result))))
    assert [line.split()[:1] for line in lines] == [["least"], ["base|mid"], ["base|mid"]] * 2
    assert lines[1].split() == ["base|mid", "c4", "0.7500", "7", "0.0100", "0.5000", "0.9500", "0.1250", "0.9970"]
    assert lines[4].split()[-3:] == ["-0.0100", "0.1250", "0.9960"]
