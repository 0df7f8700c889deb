"""`prism analyze cka` over layouts, from a checkpoint and a Hugging Face folder, and through kills: the same figures; after a kill, the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.analysis.cka import FORMS
from megatron_prism.analysis.states import TENSOR, Kept
from megatron_prism.checkpoint import reference
from megatron_prism.core.check.cka import STATES
from megatron_prism.core.config import CkaConfig
from megatron_prism.core.load import build
from megatron_prism.data import tokenizer
from megatron_prism.jobs import analyze_cka
from megatron_prism.parallel.groups import Groups
from tests.distributed.killing import Point, killed
from tests.unit.analysis.test_cka import numpys

pytestmark = pytest.mark.slow
SP = {"tp": 2, "sequence_parallel": True}
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {  # model, ranks, layout
    "tiny tp2_sp": ("tiny", 2, SP),
    "tiny pp2": ("tiny", 2, {"pp": 2}),
    "tiny dp2": ("tiny", 2, {}),
    "nemotron tp2_sp": ("nemotron", 2, SP),
    "granite_h pp2": ("granite_h", 2, {"pp": 2}),  # a tied embedding on both stages: both get the same noise
}
POINTS = {
    "before the first states": Point(Kept, "write", 0, is_after=False),
    "between models": Point(Kept, "write", 2, is_after=False),
    "before the random update's": Point(Kept, "write", 4, is_after=False),
    "while layers are aligned": Point(Kept, "read", 3, is_after=True),
}
Compare = Callable[..., Path]


def compared(groups: Groups, values: dict[str, Any], point: str | None = None) -> dict[str, Any]:
    config = build(values, CkaConfig, str)
    with killed(POINTS, point, (Kept, "write"), None, "SIGKILL"):
        return analyze_cka.compare_in_gang(analyze_cka.resolve(config, groups.world_size), groups)


@pytest.fixture(scope="module")
def compare(run_distributed: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Compare:
    """Return a function that compares a tiny model's checkpoint with a folder of other weights, and returns the output folder."""
    home = tmp_path_factory.mktemp("cka")
    lines = [{"text": f"The sum of {n} and {n * n} is {n + n * n}" + " and more" * (n % 5)} for n in range(40)]
    (home / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "words.txt").write_text("\n\n".join(f"return {n} times\nx{n % 7}" for n in range(30)))

    def run(name: str, model: str, num_ranks: int = 1, grid: dict[str, Any] | None = None, point: str | None = None, **more: Any) -> Path:
        values = {
            "out": str(home / name),
            "models": [{"name": "base", "checkpoint": str(checkpoint_of(model))}, {"name": "rl", "hf": str(other(model))}],
            "distributions": {"sums": {"path": [str(home / "sums.jsonl")]}, "words": {"path": [str(home / "words.txt")]}},
            "parallel": grid or {},
            "precision": "fp32",
            "num_prompts": 20,
            "max_tokens": 24,
            "micro_size": 3,
            "num_permutations": 10,
            "null_update": True,
            **more,
        }
        (home / f"{name}.json").write_text(json.dumps(values))
        run_distributed(compared, num_ranks, timeout_s=120, values=values, point=point, **({"parallel": grid} if grid else {}))
        return home / name

    def checkpoint_of(model: str) -> Path:
        return request.getfixturevalue(f"{model}_checkpoint")

    def other(model: str) -> Path:
        root = home / f"{model}_other"
        if not root.exists():
            shutil.copytree(checkpoint_of(model).parent / "hf", root)
            generator = torch.Generator().manual_seed(1)
            weights = load_file(root / "model.safetensors")
            moved = {key: value + 0.02 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
            save_file(moved, root / "model.safetensors", metadata={"format": "pt"})
        return root

    return run


@pytest.fixture(scope="module")
def alone(compare: Compare) -> Callable[[str], Path]:
    """Return a function that gives a model's comparison in one process."""
    made: dict[str, Path] = {}

    def of(model: str) -> Path:
        if model not in made:
            made[model] = compare(f"{model} alone", model)
        return made[model]

    return of


def read(root: Path) -> dict[str, Any]:
    return json.loads((root / analyze_cka.RESULT).read_text())


def states(root: Path) -> dict[str, torch.Tensor]:
    return {path.stem.partition("_")[2]: load_file(path)[TENSOR] for path in sorted((root / STATES).iterdir())}


def flat(value: Any, key: str = "") -> dict[str, float]:
    """Return the numbers of a result by their dotted keys, without the layers, of two the least may be."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    numbers = {key: value} if isinstance(value, int | float) and not key.endswith("_layer") else {}
    return {**numbers, **{dotted: number for name, part in parts for dotted, number in flat(part, f"{key}.{name}").items()}}


@pytest.mark.parametrize("name", RUNS)
def test_on_any_layout(name: str, compare: Compare, alone: Callable[[str], Path]) -> None:
    model, num_ranks, grid = RUNS[name]
    on_layout, single = compare(name, model, num_ranks, grid), alone(model)
    ours, theirs = states(on_layout), states(single)
    assert ours.keys() == theirs.keys() and len(ours) == 6  # two models and a random update, on two distributions
    assert max(float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in ours) < 1e-5
    assert flat(read(on_layout)) == pytest.approx(flat(read(single)), abs=1e-4)


def test_what_is_written(alone: Callable[[str], Path]) -> None:
    result = read(alone("tiny"))
    assert (result["kind"], result["analysis"]) == ("analysis", "cka") and list(result["pairs"]) == ["base|rl"]
    for name, figures in result["pairs"]["base|rl"].items():
        assert [layer["layer"] for layer in figures["layers"]] == [0, 1, 2, 3, 4, 5]  # the embedding and five layers
        assert result["distributions"][name]["num_prompts"] == 20
        for form in ("biased", "debiased"):
            of_layers = [layer[form] for layer in figures["layers"]]
            assert figures[f"min_{form}"] == min(of_layers) < 0.9999 and max(of_layers) <= 1 + 1e-9
            assert figures[f"min_{form}_permutation_null"]["mean"] < 0.5 < figures["null_update"][f"min_{form}"] < 0.9999
    assert result["distributions"]["sums"]["num_available"] == 40


def test_the_command_prints_the_table_and_writes_the_result(alone: Callable[[str], Path], tmp_path: Path) -> None:
    root = alone("tiny")
    values = root.parent / f"{root.name}.json"  # JSON is YAML
    command = [sys.executable, "-m", "megatron_prism.cli", "analyze", "cka", str(values), "num_permutations=4", f"out={tmp_path / 'out'}"]
    done = subprocess.run([*command, "--json", str(tmp_path / "cka.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cka.json").read_bytes() == (tmp_path / "out" / analyze_cka.RESULT).read_bytes()
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["least", form] if name == "" else ["base|rl", name] for form in FORMS for name in ("", "sums", "words")
    ]
    assert lines[1][2] == f"{read(root)['pairs']['base|rl']['sums']['min_biased']:.4f}"


def transformers_states(root: Path, texts: Sequence[str], longest: int) -> np.ndarray:
    """Return the pooled states of prompts (L + 1, N, C) by transformers, in fp64."""
    model, spec = reference.load(root, torch.float32), tokenizer.load(root)
    pooled = []
    for text in texts:
        tokens_1S = torch.tensor([tokenizer.encode_prompt(text, spec)[:longest]])
        with torch.no_grad():
            states = model(tokens_1S, output_hidden_states=True, use_cache=False).hidden_states
        pooled.append(torch.stack([state_1SC[0].double().mean(0) for state_1SC in states]))
    return torch.stack(pooled, 1).numpy()


@pytest.mark.parametrize("model", ["tiny", "nemotron"])
def test_the_figures_are_numpys_of_transformers_states(model: str, alone: Callable[[str], Path]) -> None:
    root = alone(model)
    config = build(json.loads((root.parent / f"{root.name}.json").read_text()), CkaConfig, str)
    assert config.models[0].checkpoint is not None and config.models[1].hf is not None
    folders = (config.models[0].checkpoint.parent / "hf", config.models[1].hf)
    for name, texts in analyze_cka.resolve(config, 1).texts.items():
        base_PNC, other_PNC = (transformers_states(folder, texts, config.max_tokens) for folder in folders)
        figures = read(root)["pairs"]["base|rl"][name]["layers"]
        told = [{form: layer[form] for form in ("biased", "debiased")} for layer in figures]
        for layer, values in enumerate(told):
            assert values == pytest.approx(numpys(base_PNC[layer], other_PNC[layer]), abs=1e-5)
        assert told[1] != pytest.approx(numpys(base_PNC[2], other_PNC[1]), abs=1e-3)  # the control: layers in another order


def test_another_seed_draws_another_update_and_other_prompts(compare: Compare, alone: Callable[[str], Path]) -> None:
    other = compare("another seed", "tiny", seed=5)
    assert not states(other).keys() & states(alone("tiny")).keys()
    assert flat(read(other)) != pytest.approx(flat(read(alone("tiny"))), abs=1e-3)  # the control of test_on_any_layout


@pytest.mark.parametrize("point", POINTS)
def test_after_a_kill_it_goes_on_to_the_same_bytes(point: str, compare: Compare, alone: Callable[[str], Path]) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        compare(f"killed {point}", "tiny", point=point)
    root = compare(f"killed {point}", "tiny").parent / f"killed {point}"
    for path in (alone("tiny") / analyze_cka.RESULT, *(alone("tiny") / STATES).iterdir()):
        assert (root / path.relative_to(alone("tiny"))).read_bytes() == path.read_bytes(), path


def test_an_output_of_another_pair_computes_only_what_is_new(compare: Compare, alone: Callable[[str], Path]) -> None:
    kept = alone("tiny")
    shutil.copytree(kept, root := kept.parent / "grown")
    before = {path.name: path.stat().st_mtime_ns for path in (root / STATES).iterdir()}
    result = read(compare("grown", "tiny", pairs=["rl|base"]))
    after = {path.name: path.stat().st_mtime_ns for path in (root / STATES).iterdir()}
    assert list(result["pairs"]) == ["rl|base"] and len(after) == 8  # the update of the other direction is new
    assert {name: after[name] for name in before} == before
    own = read(compare("grown", "tiny", final_norm=False))["pairs"]["base|rl"]["sums"]["layers"]
    behind = read(kept)["pairs"]["base|rl"]["sums"]["layers"]
    assert own[:-1] == behind[:-1] and own[-1] != behind[-1]  # the last layer's own output, from the states that are kept
    assert len(list((root / STATES).iterdir())) == 8
