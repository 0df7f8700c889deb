"""What cannot be merged is refused by name, with every problem at once, and nothing stays behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.core.config import MergeConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build
from megatron_prism.jobs import convert, merge
from tests.unit.merge.folders import changed, moved

QUERY = "model.layers.0.self_attn.q_proj.weight"


def attempt(out: Path, *models: Path, weights: tuple[float | None, ...] = (0.15, 0.85), **keys: Any) -> str:
    """Merge, and return the refusal."""
    named = [{"path": str(path), "weight": weight} for path, weight in zip(models, weights, strict=True)]
    settings = build(
        {"out": str(out), "models": named, **{key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}}, MergeConfig, str
    )
    beside = {path.name for path in out.parent.iterdir()}
    with pytest.raises(InputError) as caught:
        merge.run(settings)
    assert {path.name for path in out.parent.iterdir()} == beside, "something stayed behind"
    return str(caught.value)


def edit(root: Path, file: str = "config.json", **changes: Any) -> None:
    (root / file).write_text(json.dumps(json.loads((root / file).read_text()) | changes))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weights": (0.15, 0.8)}, r"models: found weights that sum to 0\.95; required weights that sum to 1; --normalize"),
        ({"weights": (0.15, 0.849998)}, "models: found weights that sum to 0.999998"),
        ({"weights": (0.15, float("nan"))}, r"models\.1\.weight: found nan; required a finite number"),
        ({"weights": (0.15, None)}, r"models\.1\.weight: found no value"),
        ({"weights": (1.0, -1.0), "normalize": True}, "models: found weights that sum to 0; required a sum to divide by"),
        ({"normalize": True, "any_sum": True}, "any_sum: found true with normalize"),
        ({"method": "slerp"}, r"t: found no value(?s:.*)models\.0\.weight: found 0\.15(?s:.*)models\.1\.weight"),
        ({"method": "slerp", "weights": (None, None), "t": 1.5}, "t: found 1.5; required between 0 and 1"),
        ({"method": "ties"}, "base_model: found no value"),
        ({"density": 0.5}, "density: found 0.5 with method linear; required a value only with ties"),
        ({"scale": 2.0}, "scale: found 2.0 with method linear"),
        ({"method": "ties", "density": 0.0}, "density: found 0.0; required more than 0"),
        ({"config_from": Path("nowhere")}, "config_from: found nowhere; required one of"),
    ],
)
def test_a_config_that_means_nothing(base: Path, mid: Path, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    refusal = attempt(tmp_path / "out", base, mid, **keys)
    assert re.search(said, refusal), refusal


def test_all_problems_of_all_models_come_at_once(base: Path, mid: Path, other: Path, tmp_path: Path) -> None:
    (mid / "adapter_config.json").write_text("{}")
    edit(other, quantization_config={"quant_method": "gptq", "bits": 4})
    (base / "out").mkdir()
    (base / "out" / "a").touch()
    lines = attempt(base / "out", base, mid, other, tmp_path / "absent", weights=(0.1, 0.2, 0.3, 0.3)).splitlines()
    assert [
        part for part in ("sum to 0.9", "existing output", "adapter", "quantised", "absent", "inside") for line in lines if part in line
    ] == [
        "sum to 0.9",
        "existing output",
        "adapter",
        "quantised",
        "absent",
        "inside",
    ]
    assert "models.1.path" in lines[2] and "models.2.path" in lines[3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, "mistral, another architecture"),
        ({"vocab_size": 400}, "vocab_size: found 400; required 390"),
        ({"num_hidden_layers": 3}, "num_layers: found 3; required 2"),
        ({"num_key_value_heads": 4}, "num_query_groups: found 4; required 2"),
    ],
)
def test_another_architecture_or_shape(
    base: Path, tmp_path: Path, make_folder: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    make_folder(tmp_path / "mid", changes, 1)
    for config_from in ({}, {"config_from": base}):
        assert said in attempt(tmp_path / "out", base, tmp_path / "mid", **config_from)


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 10000.0), ("rms_norm_eps", 1e-6)])
def test_what_weights_compute_must_be_the_same_or_config_from_says(base: Path, mid: Path, tmp_path: Path, key: str, value: float) -> None:
    edit(mid, **{key: value})
    assert "--config-from says whose to take" in attempt(tmp_path / "out", base, mid)
    named = [{"path": str(base), "weight": 0.15}, {"path": str(mid), "weight": 0.85}]
    result = merge.run(build({"out": str(tmp_path / "out"), "models": named, "config_from": str(mid)}, MergeConfig, str))
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == value and f"the merge takes {mid}'s" in str(result["notes"])


def test_what_changes_no_value_is_said(base: Path, mid: Path, tmp_path: Path) -> None:
    edit(mid, max_position_embeddings=64, eos_token_id=3)
    (mid / "generation_config.json").write_text('{"eos_token_id": 3}')
    named = [{"path": str(base), "weight": 0.15}, {"path": str(mid), "weight": 0.85}]
    notes = "\n".join(merge.run(build({"out": str(tmp_path / "out"), "models": named}, MergeConfig, str), dry_run=True)["notes"])
    for said in ("max_position_embeddings 32, and 64 there", "eos_token_id 2, and 3 there", "no generation_config.json"):
        assert f"differs from {mid}, and the merge takes {base}'s: {said}" in notes
    assert not (tmp_path / "out").exists()


def edit_tokens(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    described = json.loads((root / "tokenizer.json").read_text())
    change(described)
    (root / "tokenizer.json").write_text(json.dumps(described))


def test_another_vocabulary(base: Path, mid: Path, tmp_path: Path) -> None:
    def swap(described: dict[str, Any]) -> None:
        vocab = described["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit_tokens(mid, swap)
    for config_from in ({}, {"config_from": base}):
        refusal = attempt(tmp_path / "out", base, mid, **config_from)
        assert "tokenizer.json: found 2 ids that are other tokens" in refusal and "only models of one vocabulary" in refusal


def test_an_added_token_of_another_name_needs_config_from(base: Path, mid: Path, tmp_path: Path) -> None:
    edit_tokens(mid, lambda described: described["added_tokens"][0].update(content="<think>"))
    edit_tokens(mid, lambda described: described["model"]["vocab"].update({"<think>": described["model"]["vocab"].pop("<unk>")}))
    assert "1 ids that are other tokens, such as 0: '<think>'; required '<unk>'" in attempt(tmp_path / "out", base, mid)
    named = [{"path": str(base), "weight": 0.15}, {"path": str(mid), "weight": 0.85}]
    merge.run(build({"out": str(tmp_path / "out"), "models": named, "config_from": str(mid)}, MergeConfig, str))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (mid / "tokenizer.json").read_bytes()


def test_every_nan_and_inf_of_every_parent_is_named(base: Path, mid: Path, tmp_path: Path) -> None:
    for root, name, value in (
        (base, "model.norm.weight", float("inf")),
        (mid, QUERY, float("nan")),
        (mid, "lm_head.weight", -float("inf")),
    ):
        changed(root, lambda each, tensor: torch.full_like(tensor, value) if each == name else tensor)  # noqa: B023
    refusal = attempt(tmp_path / "out", base, mid)
    assert len(refusal.splitlines()) == 3
    assert (
        f"{QUERY}: found nan at [0, 0]" in refusal
        and "found -inf at [0, 0]" in refusal
        and "model.norm.weight: found inf at [0]" in refusal
    )


def test_a_merged_value_that_is_not_finite_is_named(base: Path, mid: Path, tmp_path: Path) -> None:
    changed(mid, lambda name, tensor: tensor + 70000 if name in (QUERY, "model.norm.weight") else tensor)
    refusal = attempt(tmp_path / "out", base, mid, weights=(0.0, 1.0), dtype="float16")
    assert len(refusal.splitlines()) == 2 and f"{QUERY}: found a merged value beyond float16" in refusal


def test_one_model_twice_and_an_output_in_a_parent(base: Path, mid: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    assert "models.1.path" in (refusal := attempt(tmp_path / "out", base, link)) and "the model that models.0.path is too" in refusal
    (mid / "deep").mkdir()
    assert f"inside {mid}" in attempt(mid / "deep" / "out", base, mid)
    assert "existing output" in attempt(base, base, mid)


def test_a_tied_head_that_is_stored_twice_must_be_the_embedding(base: Path, tmp_path: Path) -> None:
    edit(base, tie_word_embeddings=True)
    assert "lm_head.weight: found other values than model.embed_tokens.weight" in attempt(
        tmp_path / "out", base, moved(base, tmp_path / "mid", 1)
    )


def test_a_damaged_parent(base: Path, mid: Path, tmp_path: Path) -> None:
    file = next(mid.glob("model-00001*"))
    values = load_file(file)
    values.pop(QUERY)
    save_file(values, file)
    assert QUERY in attempt(tmp_path / "out", base, mid)
    shutil.copyfile(next(base.glob("model-00001*")), file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 2)
    assert "truncated" in attempt(tmp_path / "out", base, mid)


def test_a_run_and_its_checkpoint_are_one_model(base: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.parent.mkdir(parents=True)
    convert.run_import(base, checkpoint, dry_run=False)
    refusal = attempt(tmp_path / "out", tmp_path / "run", checkpoint)
    assert f"models.1.path ({checkpoint}): found the model that models.0.path ({tmp_path / 'run'}) is too" in refusal


def test_a_path_that_cannot_be_looked_at_is_named(base: Path, tmp_path: Path) -> None:
    long = tmp_path / ("a" * 300)
    assert f"models.1.path {long}: found File name too long" in attempt(tmp_path / "out", base, long)


def test_what_the_origin_lacks_is_said(base: Path, mid: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").unlink()
    named = [{"path": str(base), "weight": 0.15}, {"path": str(mid), "weight": 0.85}]
    notes = merge.run(build({"out": str(tmp_path / "out"), "models": named}, MergeConfig, str), dry_run=True)["notes"]
    assert notes == [f"{base}: differs from {mid}, and the merge takes {base}'s: no tokenizer.json"]


def test_a_tied_head_beside_one_apart_says_whose_config_to_take(base: Path, mid: Path, tmp_path: Path) -> None:
    edit(mid, tie_word_embeddings=True)
    changed(mid, lambda name, tensor: tensor)
    for file in mid.glob("*.safetensors"):
        values = load_file(file)
        values.pop("lm_head.weight", None)
        save_file(values, file, metadata={"format": "pt"})
    index = mid / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    described["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(described))
    for models in ((base, mid), (mid, base)):
        assert f"--config-from {base}" in attempt(tmp_path / "out", *models)
