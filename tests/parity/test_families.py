"""Each of the seven models on a tiny random model of its real Hugging Face class: logits, gradients of every parameter, the same bytes back.

Negative controls build the architecture wrong by one value, and must be seen.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .tiny import FAMILIES, MULTIPLIERS, SIZES

LOGITS, GRADIENT, GRADIENT_SPLIT = 2e-5, 5e-6, 1e-5  # fp32: largest difference; relative by norm, in one process and on a layout
LOSS = 2e-6
DOCUMENTS = [[29, 1, 18], [7, 41]]  # by row of the microbatch: shorter and longer than a window and a Mamba chunk, and a single token
SEQ_LENGTH = 96
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
}
SPLITS = [
    (family, layout) for family in FAMILIES for layout in LAYOUTS if family != "granite_h_micro" or layout == "pp2"
]  # one group: tp 1
PACKED = ("llama", "mistral", "granite", "granite_h_micro", "nemotron_h")
PACKED_SPLITS = [
    ("mistral", "tp2_sp"),
    ("mistral", "pp2"),
    ("nemotron_h", "tp2_sp"),
    ("nemotron_h", "pp2"),
    ("granite_h_micro", "pp2"),
    ("llama", "tp2_pp2"),
    ("nemotron_h", "tp2_pp2"),
]
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "unscaled rope": ("llama", {"rope_scaling": None}),
    "window off by one": ("mistral", {"window_size": 17}),
    "no window": ("mistral", {"window_size": None}),
    "floored_time_step": ("nemotron_h", {}),
    "no_qkv_bias": ("qwen2", {}),
    **{
        f"no {key} ({family})": (family, {key: None if key == "attention_multiplier" else 1.0})
        for family in ("granite", "granite_micro", "granite_h_micro")
        for key in MULTIPLIERS
    },
}


Case = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def case(folders: dict[str, Path]) -> Case:
    """Return a function that makes a case of a family."""
    tokens = [(7 * index * index + 3) % SIZES["vocab_size"] for index in range(SEQ_LENGTH)]

    def make(name: str, family: str, **more: Any) -> dict[str, Any]:
        root = folders[family]
        return {"name": name, "hf": str(root / "hf"), "ckpt": str(root / "ckpt"), "tokens": tokens, **more}

    return make


@pytest.fixture(scope="session")
def results(compare: Callable, case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the differences in one process by case, the controls too."""
    cases = [case(name, name) for name in FAMILIES]
    cases += [case(name, family, replace=replace, control=name) for name, (family, replace) in CONTROLS.items()]
    cases += [case(f"{name} packed", name, documents=DOCUMENTS) for name in PACKED]
    cases += [case(f"no document mask ({name})", name, documents=DOCUMENTS, control="no document mask") for name in PACKED]
    return compare(tmp_path_factory.mktemp("families"), cases)


@pytest.fixture(scope="session")
def split(compare: Callable, case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the differences on layouts by case."""
    cases: dict[int, list[dict[str, Any]]] = {2: [], 4: []}
    for family, layout in SPLITS:
        cases[4 if layout == "tp2_pp2" else 2].append(case(f"{family} {layout}", family, parallel=LAYOUTS[layout]))
    for family, layout in PACKED_SPLITS:
        packed = case(f"{family} packed {layout}", family, parallel=LAYOUTS[layout], documents=DOCUMENTS)
        cases[4 if layout == "tp2_pp2" else 2].append(packed)
    return {name: found for count in cases for name, found in compare(tmp_path_factory.mktemp("gang"), cases[count], count).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), SPLITS)
def test_a_layout_has_the_logits_and_gradients_of_transformers(split: dict[str, dict[str, Any]], family: str, layout: str) -> None:
    """Vocabularies pad differently, stages are uneven, a mixer's projection is split piece by piece."""
    found = split[f"{family} {layout}"]
    assert found["logits"] <= LOGITS
    assert found["gradient"] <= GRADIENT_SPLIT, found["parameter"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(results: dict[str, dict[str, Any]], family: str) -> None:
    assert results[family]["logits"] <= LOGITS and results[family]["loss"] <= LOSS
    assert results[family]["gradient"] <= GRADIENT, results[family]["parameter"]


@pytest.mark.parametrize("family", PACKED)
def test_documents_packed_into_rows_are_each_as_if_alone(results: dict[str, dict[str, Any]], family: str) -> None:
    """Each document's logits, the loss and all gradients are transformers' own of the documents one by one."""
    found = results[f"{family} packed"]
    assert found["logits"] <= LOGITS and found["loss"] <= LOSS
    assert found["gradient"] <= GRADIENT, found["parameter"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), PACKED_SPLITS)
def test_packed_documents_on_a_layout(split: dict[str, dict[str, Any]], family: str, layout: str) -> None:
    found = split[f"{family} packed {layout}"]
    assert found["loss"] <= LOSS
    assert found["gradient"] <= GRADIENT_SPLIT, found["parameter"]


@pytest.mark.parametrize("family", PACKED)
def test_documents_without_a_mask_are_seen(results: dict[str, dict[str, Any]], family: str) -> None:
    found = results[f"no document mask ({family})"]
    assert found["logits"] > 100 * LOGITS
    assert found["gradient"] > 100 * GRADIENT


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_seen(results: dict[str, dict[str, Any]], control: str) -> None:
    assert results[control]["logits"] > 100 * LOGITS
    assert results[control]["gradient"] > 100 * GRADIENT


@pytest.mark.parametrize("source", ["hf", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_byte_for_byte(folders: dict[str, Path], family: str, source: str, tmp_path: Path) -> None:
    from megatron_prism.jobs import convert

    original = folders[family] / source
    convert.run_import(original, tmp_path / "ckpt", dry_run=False)
    convert.run_export(tmp_path / "ckpt", tmp_path / "back", dry_run=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_written_from_scratch_reads_back(folders: dict[str, Path], family: str) -> None:
    """What a model trained from scratch would write: the same architecture to us, and a model that transformers builds."""
    from transformers import AutoConfig

    from megatron_prism.checkpoint import folder
    from megatron_prism.families import registry

    model = folder.read(folders[family] / "ckpt").model
    written = registry.of_model(model).write_config(model)
    assert registry.of_hf(written, "config").read_config(written, "config") == model
    kind = AutoConfig.for_model(**written)
    assert type(kind).__name__ == f"{FAMILIES[family][0]}Config"


def verify(hf: Path, ckpt: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_prism.cli", "convert", "verify", "--hf", str(hf), "--ckpt", str(ckpt), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_verify_says_so_on_four_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    """Nemotron-H, without a tokenizer: random ids, the reference's floored time steps mended."""
    root = folders["nemotron_h"]
    done = verify(root / "hf", root / "ckpt", "--tp", "2", "--pp", "2", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] and found["tokens"] == "random ids" and found["num_tokens"] == 64 and found["same_choice"] == 1
    assert found["relative_difference"] <= 1e-5 and "time_step_limit" in done.stderr


def test_verify_names_where_a_changed_weight_shows(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    root = folders["granite_h_micro"]
    shutil.copytree(root / "hf", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.0.mamba.conv1d.bias"] += 0.5
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    done = verify(tmp_path / "hf", root / "ckpt", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 1 and not found["passed"] and found["relative_difference"] > 1e-3
    assert f"token {found['worst_position']}, vocabulary entry {found['worst_token_id']}" in done.stderr
    assert found["max_abs_difference"] == pytest.approx(abs(found["worst_checkpoint_logit"] - found["worst_hf_logit"]))


def test_verify_refuses_another_architecture_before_it_runs(folders: dict[str, Path]) -> None:
    done = verify(folders["nemotron_h"] / "hf", folders["mistral"] / "ckpt", "--tp", "3")
    assert done.returncode == 2
    assert "model.family: found mistral; required nemotron_h" in done.stderr and "--tp, --pp: " not in done.stderr
    assert "--tp (num_attention_heads 4): found 3" in done.stderr
