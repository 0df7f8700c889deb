"""A merge is what its formula says, in the origin's files, dtypes and shards, with all that the parents differ in said."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from megatron_prism.core.config import MergeConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build
from megatron_prism.jobs import convert, merge
from tests.unit.merge.folders import changed, tensors


def config(out: Path, *models: tuple[Path, float | None], **keys: Any) -> MergeConfig:
    named = [{"path": str(path), "weight": weight} for path, weight in models]
    return build(
        {"out": str(out), "models": named, **{key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}}, MergeConfig, str
    )


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two models."""
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - wanted[name].double()).abs().max()) for name in wanted)


def test_linear_is_the_weighted_sum_in_the_first_models_files(base: Path, mid: Path, tmp_path: Path) -> None:
    result = merge.run(config(tmp_path / "out", (base, 0.15), (mid, 0.85)))
    before, after, found = tensors(base), tensors(mid), tensors(tmp_path / "out")
    wanted = {name: 0.15 * before[name].double() + 0.85 * after[name].double() for name in before}
    assert worst(found, wanted) < 1e-6 < 0.01 < worst(found, {name: 0.85 * before[name] + 0.15 * after[name] for name in before})
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in before.items()}
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text())["weight_map"] == json.loads((base / index).read_text())["weight_map"]
    assert result["tensors"] == len(before) and result["written"]
    described = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [each["weight"] for each in described["parents"]] == [0.15, 0.85] and len(described["inputs"]) == 6
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- merge\n---\n") and "Scores" not in card
    assert (tmp_path / "out" / "README_PARENT.md").read_bytes() == (base / "README.md").read_bytes()


@pytest.mark.parametrize(("keys", "digest"), [({}, xxhash.xxh3_128), ({"sums": "sha256"}, hashlib.sha256)])
def test_merge_json_has_the_sum_of_every_file(
    base: Path, mid: Path, tmp_path: Path, keys: dict[str, str], digest: Callable[..., Any]
) -> None:
    merge.run(config(tmp_path / "out", (base, 0.15), (mid, 0.85), **keys))
    parents = json.loads((tmp_path / "out/merge.json").read_text())["parents"]
    for root, parent in zip((base, mid), parents, strict=True):
        files = [root / "config.json", *sorted(root.glob("*.safetensors"))]
        assert parent["sums"] == {str(file): digest(file.read_bytes()).hexdigest() for file in files} and len(files) == 3


def test_a_checkpoint_is_merged_as_its_export_would_be(base: Path, mid: Path, tmp_path: Path) -> None:
    """A checkpoint, or a run's newest."""
    convert.run_import(mid, tmp_path / "ckpt", dry_run=False)
    shutil.copytree(tmp_path / "ckpt", tmp_path / "run/checkpoints/step_00000007")
    merge.run(config(tmp_path / "one", (base, 0.15), (mid, 0.85)))
    merge.run(config(tmp_path / "two", (base, 0.15), (tmp_path / "ckpt", 0.85)))
    merge.run(config(tmp_path / "three", (tmp_path / "run", 0.85), (base, 0.15)))
    one, two, three = (tensors(tmp_path / name) for name in ("one", "two", "three"))
    assert worst(two, one) == 0.0 and worst(three, one) < 1e-6
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())


def test_one_rounding_at_the_end(base: Path, mid: Path, tmp_path: Path) -> None:
    """bf16 parents: the merge is the exact sum rounded once. The control rounds each product, and differs.

    Of 0.15 and 0.85 the sum of values ten bf16 steps apart lies exactly between two: these weights have no such ties.
    """
    first, second = 0.15173, 0.84827
    for root in (base, mid):
        changed(root, lambda _, value: value.bfloat16())
    merge.run(config(tmp_path / "out", (base, first), (mid, second)))
    before, after, found = tensors(base), tensors(mid), tensors(tmp_path / "out")
    exact = {name: (first * before[name].double() + second * after[name].double()).bfloat16() for name in before}
    twice = {name: (first * before[name]) + (second * after[name]) for name in before}
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    assert sum(int((found[name] != exact[name]).sum()) for name in exact) <= 2
    assert sum(int((found[name] != twice[name]).sum()) for name in exact) > 1000


@pytest.mark.parametrize("piece_bytes", [1, 24, 100])
def test_pieces_come_to_their_places(base: Path, mid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    convert.run_import(mid, tmp_path / "ckpt", dry_run=False)
    merge.run(config(tmp_path / "one", (base, 0.15), (mid, 0.85)))
    monkeypatch.setattr("megatron_prism.hf.bits.PIECE_BYTES", piece_bytes)
    merge.run(config(tmp_path / "two", (base, 0.15), (tmp_path / "ckpt", 0.85)))
    assert worst(tensors(tmp_path / "two"), tensors(tmp_path / "one")) == 0.0


@pytest.mark.parametrize("keys", [{"weights": (1.0, 0.0)}, {"method": "slerp", "t": 0.0, "weights": (None, None)}])
def test_a_weight_of_0_leaves_every_bit_of_the_other_model(base: Path, mid: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    changed(base, lambda _, value: torch.where(value > 1, -0.0, value))  # a sum with 0 would make 0 of -0
    weights = keys.pop("weights")
    merge.run(config(tmp_path / "one", (base, weights[0]), (mid, weights[1]), **keys))
    if "t" not in keys:
        merge.run(config(tmp_path / "two", (mid, weights[1]), (base, weights[0]), **keys))
    else:
        merge.run(config(tmp_path / "two", (mid, None), (base, None), **{**keys, "t": 1.0}))
    before = tensors(base)
    for out in ("one", "two"):
        found = tensors(tmp_path / out)
        assert all(torch.equal(found[name].view(torch.int32), before[name].view(torch.int32)) for name in before)


def test_weights_of_six_digits_sum_to_1_and_those_of_four_do_not(base: Path, mid: Path, other: Path, tmp_path: Path) -> None:
    def thirds(weight: float) -> dict[str, Any]:
        return merge.run(config(tmp_path / "out", *((root, weight) for root in (base, mid, other))), dry_run=True)

    assert thirds(0.333333)["written"] is False
    with pytest.raises(InputError, match="weights that sum to 0.9999"):
        thirds(0.3333)


def test_a_merge_json_of_another_program_is_no_provenance(base: Path, mid: Path, tmp_path: Path) -> None:
    merge.run(config(tmp_path / "ours", (base, 0.5), (mid, 0.5)))
    for text in ("[1]", "{broken", "{}"):
        (mid / "merge.json").write_text(text)
        notes = merge.run(config(tmp_path / "out", (tmp_path / "ours", 0.15), (mid, 0.85)))["notes"]
        ours, theirs = json.loads((tmp_path / "out/merge.json").read_text())["parents"]
        assert ours["merge"]["kind"] == "merge" and "merge" not in theirs
        assert notes == [f"{mid}: its merge.json is of no merge by prism, and is left out"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_of_folders_needs_no_torch(base: Path, mid: Path, tmp_path: Path, method: str) -> None:
    """torch's import would be a third of the time that a model of a billion parameters takes. The control: a checkpoint's merge needs it."""
    convert.run_import(mid, tmp_path / "ckpt", dry_run=False)
    program = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); from megatron_prism.cli.entry import main; main()"
    )
    for other, needs in ((mid, "False"), (tmp_path / "ckpt", "True")):
        words = ["merge", "--method", method, "--out", str(tmp_path / needs)]
        words += (
            ["--base", str(base), "--model", f"{other}=1"] if method == "ties" else ["--model", f"{base}=.15", "--model", f"{other}=.85"]
        )
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == needs, done.stdout + done.stderr
