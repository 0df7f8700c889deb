"""Every family's tiny model, tied heads however they are stored, and the dtypes of a hybrid's mixers."""

from __future__ import annotations

import json
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
from tests.parity.tiny import FAMILIES, random_model
from tests.unit.merge.folders import changed, moved, tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IN_FP32 = ("A_log", "dt_bias", "D")


def run(out: Path, one: Path, two: Path, **keys: Any) -> dict[str, Any]:
    models = [{"path": str(one), "weight": 0.15}, {"path": str(two), "weight": 0.85}]
    return merge.run(build({"out": str(out), "models": models, **keys}, MergeConfig, str))


def summed(one: Path, two: Path) -> dict[str, torch.Tensor]:
    first, second = tensors(one), tensors(two)
    return {name: 0.15 * first[name].double() + 0.85 * second[name].double() for name in first}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name].double(), wanted[name], rtol=1e-6, atol=1e-6) for name in wanted
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_of_each_family_is_what_transformers_averages(family: str, tmp_path: Path) -> None:
    """The merged folder, loaded by transformers, computes what its own two models averaged in memory compute; neither parent does."""
    import transformers

    one, two = random_model(family).eval(), random_model(family).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in two.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two", max_shard_size="100KB")
    run(tmp_path / "out", tmp_path / "one", tmp_path / "two")
    convert.run_import(tmp_path / "two", tmp_path / "ckpt", dry_run=False)
    run(tmp_path / "of_checkpoint", tmp_path / "one", tmp_path / "ckpt")
    assert same(tensors(tmp_path / "of_checkpoint"), {name: value.double() for name, value in tensors(tmp_path / "out").items()})
    ids_BS = torch.arange(3, 23)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        parent_BSV = two(ids_BS).logits
        for mine, other in zip(two.parameters(), one.parameters(), strict=True):
            mine.data.mul_(0.85).add_(other.data, alpha=0.15)
        wanted_BSV, found_BSV = two(ids_BS).logits, merged(ids_BS).logits
    largest = float(wanted_BSV.abs().max())
    assert float((found_BSV - wanted_BSV).abs().max()) < 1e-4 * largest < 1e-2 * largest < float((parent_BSV - wanted_BSV).abs().max())


@pytest.fixture
def tied(base: Path) -> Path:
    """Return a LLaMA with a tied head that is not stored."""
    stored(base, {HEAD: None})
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}))
    return base


def stored(root: Path, change: dict[str, str | None]) -> None:
    """Store all tensors in one file, some under another name (or under both), or not at all."""
    values = tensors(root)
    for file in root.glob("*.safetensors*"):
        file.unlink()
    for name, source in change.items():
        values.pop(name, None)
        if source is not None:
            values[name] = values[source].clone()
    save_file(values, root / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_head_absent_in_one_and_doubled_in_another(tied: Path, tmp_path: Path) -> None:
    mid = moved(tied, tmp_path / "mid", 1)
    run(tmp_path / "plain", tied, mid)
    wanted = summed(tied, mid)
    assert same(tensors(tmp_path / "plain"), wanted)
    stored(mid, {HEAD: EMBEDDING})
    result = run(tmp_path / "one", tied, mid)
    assert (
        same(tensors(tmp_path / "one"), wanted)
        and f"stored as in {tied}" in str(result["notes"])
        and "tied, stored twice" in str(result["notes"])
    )
    run(tmp_path / "two", tied, mid, config_from=str(mid))
    both = tensors(tmp_path / "two")
    assert torch.equal(both[HEAD], both[EMBEDDING]) and same({name: value for name, value in both.items() if name != HEAD}, wanted)
    stored(mid, {EMBEDDING: None})  # under the head's name alone
    run(tmp_path / "three", mid, tied, config_from=str(tied))
    assert tensors(tmp_path / "three").keys() == wanted.keys()


def test_an_untied_parent_keeps_its_head_only_where_its_config_does(tied: Path, tmp_path: Path) -> None:
    untied = moved(tied, tmp_path / "untied", 1)
    stored(untied, {HEAD: EMBEDDING})
    (untied / "config.json").write_text(json.dumps(json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}))
    changed(untied, lambda name, value: value + 1 if name == HEAD else value)
    for keys in ({}, {"config_from": str(tied)}):
        with pytest.raises(InputError, match="the merge would lose its head: --config-from"):
            run(tmp_path / "out", tied, untied, **keys)
    with pytest.raises(InputError, match="say so by --config-from"):
        run(tmp_path / "out", untied, tied)
    run(tmp_path / "out", tied, untied, config_from=str(untied))
    first, second, found = tensors(tied), tensors(untied), tensors(tmp_path / "out")
    torch.testing.assert_close(found[HEAD], 0.15 * first[EMBEDDING] + 0.85 * second[HEAD])
    assert not torch.allclose(found[HEAD], found[EMBEDDING])


@pytest.mark.parametrize("family", ["granite_h_micro", "nemotron_h"])
def test_a_hybrids_mixers_keep_their_dtype(family: str, tmp_path: Path) -> None:
    """Weights in bf16 and A_log, dt_bias, D in fp32, as published: kept, and kept too where the rest is cast."""
    random_model(family).save_pretrained(tmp_path / "one")

    def cast(name: str, value: torch.Tensor) -> torch.Tensor:
        return value if name.rpartition(".")[2] in IN_FP32 else value.bfloat16()

    changed(tmp_path / "one", cast)
    moved(tmp_path / "one", tmp_path / "two", 1)
    wanted = summed(tmp_path / "one", tmp_path / "two")
    for dtype in (None, "float16"):
        out = tmp_path / str(dtype)
        run(out, tmp_path / "one", tmp_path / "two", **({"dtype": dtype} if dtype else {}))
        for name, value in tensors(out).items():
            expected = torch.float32 if name.rpartition(".")[2] in IN_FP32 else torch.float16 if dtype else torch.bfloat16
            assert value.dtype == expected, name
            torch.testing.assert_close(
                value, wanted[name].float().to(expected), rtol=1e-6 if expected == torch.float32 else 1e-2, atol=1e-6
            )
    assert json.loads((tmp_path / "float16/config.json").read_text())["dtype"] == "float16"
    lost = [
        name for name, value in wanted.items() if name.endswith("A_log") and not torch.allclose(value.bfloat16().double(), value, rtol=1e-6)
    ]
    assert lost, "the control: in bf16 the decay would be another"


def test_names_that_differ_are_one_tensor(base: Path, mid: Path, tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    """`module.` before every name of one parent, and no `model.` in the other."""
    wanted = summed(base, mid)
    for root, rename in ((base, lambda name: name.removeprefix("model.")), (mid, lambda name: f"module.{name}")):
        values = {rename(name): value for name, value in tensors(root).items()}
        for file in root.glob("*.safetensors*"):
            file.unlink()
        save_file(values, root / "model.safetensors", metadata={"format": "pt"})
    run(tmp_path / "out", base, mid)
    assert same(load_file(tmp_path / "out/model.safetensors"), {name.removeprefix("model."): value for name, value in wanted.items()})
    shutil.rmtree(tmp_path / "out")
    run(tmp_path / "out", base, mid, config_from=str(mid))
    assert same(load_file(tmp_path / "out/model.safetensors"), wanted)
