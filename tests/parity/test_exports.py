"""The 128k step's exports of all seven models, and of the Mistrals with another base, yarn and no window: what readers make of config.json.

transformers 5 loads the export; a reader of transformers 4's kind is families/rope_v4.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.core.config import InitConfig, ModelConfig, YarnRope

from .tiny import FAMILIES, random_model

LENGTH, HAD = 131072, 32768
ORIGINAL = "original_max_position_embeddings"
YARN = YarnRope(factor=4.0, original_max_position_embeddings=HAD)
SEVEN = [name for name in FAMILIES if name != "qwen2"]
STEPS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SEVEN} | {
    "mistral, yarn without a window": ("mistral", {"yarn": YARN, "window_size": LENGTH}),
    "mistral, another base": ("mistral", {"rope_theta": 1e7}),
    "mistral_small, yarn": ("mistral_small", {"yarn": YARN}),
    "mistral_small, another base and yarn": ("mistral_small", {"yarn": replace(YARN, beta_fast=16.0), "rope_theta": 5e6}),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return, by family, a checkpoint of a model with 32,768 positions; it has a tokenizer's config and a generation config."""
    from megatron_prism.jobs import convert

    roots = {name: tmp_path_factory.mktemp(name) for name in SEVEN}
    for name, root in roots.items():
        random_model(name, max_position_embeddings=HAD).save_pretrained(root / "hf")
        (root / "hf" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8192, "bos_token": "<s>"}))
        convert.run_import(root / "hf", root / "ckpt", dry_run=False)
    return roots


def extended(root: Path, out: Path, init: InitConfig) -> tuple[Path, ModelConfig]:
    """Return the export of a run that began from a checkpoint and extends its model, and what the model is to be. Its weights stay."""
    from megatron_prism.checkpoint import folder, integrity, run_folder
    from megatron_prism.checkpoint.start import Start
    from megatron_prism.core.check.train import check_extension
    from megatron_prism.jobs import convert

    had = folder.read(root)
    assert not list(check_extension(init, had.model))
    model = init.extend(had.model)
    out.mkdir()
    run_folder._write_origin(Start(model, had.assets, root, 0, "float32", 0), init, out / "ckpt")
    shutil.copytree(had.state, out / "ckpt" / folder.STATE)
    integrity.seal(out / "ckpt")
    convert.run_export(out / "ckpt", out / "hf", dry_run=False)
    return out / "hf", model


@pytest.mark.parametrize("name", STEPS)
def test_an_export_at_128k_is_read_as_it_was_meant(imported: dict[str, Path], tmp_path: Path, name: str) -> None:
    import transformers

    from megatron_prism.checkpoint import folder, reference, rotary
    from megatron_prism.checkpoint.plan import plan_import, read_config
    from megatron_prism.models import rope

    family, changes = STEPS[name]
    root = imported[family] / "ckpt"
    hf, model = extended(root, tmp_path / "run", InitConfig(checkpoint=root, max_position_embeddings=LENGTH, **changes))
    had, config = folder.read(root).model, read_config(hf)
    meant = replace(
        had,
        max_position_embeddings=LENGTH,
        rotary_base=changes.get("rope_theta", had.rotary_base),
        yarn=changes.get("yarn"),
        window_size=None if "window_size" in changes else had.window_size,
    )
    assert model == meant == plan_import(hf).model and plan_import(hf).notes == ()
    theirs = reference.load(hf)
    assert theirs.config.max_position_embeddings == LENGTH == transformers.AutoConfig.from_pretrained(hf).max_position_embeddings
    assert getattr(theirs.config, "sliding_window", None) == meant.window_size
    if meant.position_embedding == "rope":
        wanted = rotary.Rotary(rope.inverse_frequencies(meant), rope.attention_factor(meant))
        assert rotary.difference(wanted, rotary.of_transformers(theirs)) == "" == rotary.difference(wanted, rotary.of_v4(config, meant, ""))
        assert torch.equal(wanted.inverse_F, theirs.base_model.rotary_emb.inv_freq)
        assert "attention_factor" not in config["rope_parameters"] and config["rope_theta"] == meant.rotary_base
    before = json.loads((imported[family] / "hf" / "config.json").read_text())
    ours = {"rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings"} | (
        {"sliding_window"} if "window_size" in changes else set()
    )
    assert {key: value for key, value in config.items() if key not in ours} == {
        key: value for key, value in before.items() if key not in ours
    }
    assert json.loads((hf / "tokenizer_config.json").read_text()) == {"model_max_length": LENGTH, "bos_token": "<s>"}
    assert (hf / "generation_config.json").read_bytes() == (imported[family] / "hf" / "generation_config.json").read_bytes()


@pytest.mark.parametrize(("family", "lost"), [("mistral_small", "rope_theta"), ("mistral_small", ORIGINAL), ("llama", ORIGINAL)])
def test_what_transformers_takes_in_silence_is_seen_and_refused(imported: dict[str, Path], tmp_path: Path, family: str, lost: str) -> None:
    """The three silent cases on an export: transformers loads each without an error, with other frequencies; an import refuses it."""
    from megatron_prism.checkpoint import reference, rotary
    from megatron_prism.checkpoint.plan import plan_import, read_config
    from megatron_prism.core.errors import InputError
    from megatron_prism.models import rope

    root = imported[family] / "ckpt"
    changes: dict[str, Any] = {"yarn": YARN, "rope_theta": 5e6} if family == "mistral_small" else {}
    hf, meant = extended(root, tmp_path / "run", InitConfig(checkpoint=root, max_position_embeddings=LENGTH, **changes))
    config: dict[str, Any] = dict(read_config(hf))
    del (config["rope_scaling"] if lost == ORIGINAL else config)[lost]
    (hf / "config.json").write_text(json.dumps(config))
    wanted = rotary.Rotary(rope.inverse_frequencies(meant), rope.attention_factor(meant))
    assert "frequencies differ" in rotary.difference(wanted, rotary.of_transformers(reference.load(hf)))
    with pytest.raises(InputError, match=r"config\.json:rope_"):
        plan_import(hf)


def verify(hf: Path, ckpt: Path) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, "-m", "megatron_prism.cli", "convert", "verify", "--hf", str(hf), "--ckpt", str(ckpt)]
    done = subprocess.run([*command, "--json", str(hf.parent / "found.json")], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr, json.loads((hf.parent / "found.json").read_text())


@pytest.mark.slow
def test_verify_names_the_frequency_that_a_reader_takes_otherwise(imported: dict[str, Path], tmp_path: Path) -> None:
    """The logits of 64 tokens agree: it is transformers 4 that would read another base. A folder without its keys passes, with a warning."""
    root = imported["mistral_small"] / "ckpt"
    init = InitConfig(checkpoint=root, max_position_embeddings=LENGTH, yarn=YARN, rope_theta=1e6)
    hf, _ = extended(root, tmp_path / "run", init)
    code, said, found = verify(hf, hf.parent / "ckpt")
    assert code == 0 and found["passed"] and found["rotary_transformers"] == "same" == found["rotary_v4_reading"], said
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rope_scaling": None, "rope_theta": 5e5}))
    code, said, found = verify(hf, hf.parent / "ckpt")
    assert code == 1 and not found["passed"] and found["relative_difference"] <= found["tolerance"]
    assert "transformers 4's kind: inv_freq[" in said and "of every attention layer" in said and "12 frequencies differ" in said
    (hf / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}))
    code, said, found = verify(hf, hf.parent / "ckpt")
    assert code == 0 and found["passed"] and "has no keys of transformers 4" in said and found["rotary_v4_reading"] != "same"
