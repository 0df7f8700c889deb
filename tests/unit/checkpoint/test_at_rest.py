"""Models at rest are compared by what they hold, whatever they are: a Hugging Face folder, a checkpoint, or a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.checkpoint import at_rest, torch_dist
from megatron_prism.core.errors import PrismError
from megatron_prism.hf import bits
from megatron_prism.jobs import analyze, convert
from tests.parity.tiny import random_model
from tests.unit.merge.folders import moved

NAMED = ("base", "other", "against")  # the paths in a result


@pytest.mark.parametrize(("family", "keys"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("granite_h_micro", {})])
def test_a_checkpoint_and_a_run_are_what_their_export_is(
    family: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure of weights and spectra; a checkpoint that moved elsewhere has others."""
    random_model(family, **keys).save_pretrained(tmp_path / "a")
    moved(tmp_path / "a", tmp_path / "b", 1)
    moved(tmp_path / "a", tmp_path / "c", 2)
    for name in ("a", "b", "c"):
        convert.run_import(tmp_path / name, tmp_path / f"{name}_ckpt", dry_run=False)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "c_ckpt", tmp_path / "run/checkpoints/step_00000001")
    shutil.copytree(tmp_path / "b_ckpt", tmp_path / "run/checkpoints/step_00000002")
    convert.run_export(tmp_path / "run", tmp_path / "exported", dry_run=False)
    monkeypatch.setattr(bits, "PIECE_BYTES", 4096)  # many pieces

    def figures(*names: str) -> str:
        paths = [tmp_path / name for name in names]
        of_weights = analyze.run_weights(paths[0], paths[1], tmp_path / "c", num_threads=2, seed=0)
        both = (of_weights, analyze.run_spectra(*paths, num_directions=4, seed=0))
        assert [(one["kind"], one["analysis"]) for one in both] == [("analysis", "weights"), ("analysis", "spectra")]
        return json.dumps([{key: value for key, value in one.items() if key not in NAMED} for one in both])

    wanted = figures("a", "exported")
    assert {figures("a", "run"), figures("a_ckpt", "b"), figures("a_ckpt", "run"), figures("a", "b_ckpt")} == {wanted}
    assert figures("a", "run/checkpoints/step_00000001") != wanted


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_megatron_cores_tensors_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """Built of a folder's blocks and of a checkpoint's, each is the tensor that the checkpoint stores."""
    random_model(family).save_pretrained(tmp_path / "a")
    convert.run_import(tmp_path / "a", tmp_path / "ckpt", dry_run=False)
    models = [at_rest.read(tmp_path / name) for name in ("a", "ckpt")]
    stored = torch_dist.TensorReader(tmp_path / "ckpt/state")
    with at_rest.opened(models) as opened:
        for key, rule in models[0].rules.items():
            wanted = stored.read(key, rule.shape)
            assert all(torch.equal(each.mcore(key), wanted) for each in opened), key


def test_a_damaged_checkpoint_is_refused_unless_a_gang_shares_the_check(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "a")
    convert.run_import(tmp_path / "a", tmp_path / "ckpt", dry_run=False)
    (file,) = (tmp_path / "ckpt/state").glob("*.distcp")
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\x01\x02\x03")
    with pytest.raises(PrismError, match="SHA256SUMS says"):
        at_rest.read(tmp_path / "ckpt")
    assert at_rest.read(tmp_path / "ckpt", check_sums=False).model.family == "llama"
