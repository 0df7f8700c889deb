"""What transformers takes is taken: a folder with buffers, ties and names of other kinds exports as one of the same logits.

Where the folder is taken as it stands, the export has the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.checkpoint import integrity, parity, reference, torch_dist
from megatron_prism.checkpoint.plan import plan_import
from megatron_prism.core.errors import CheckpointError, InputError
from megatron_prism.hf import as_torch, safetensors
from megatron_prism.jobs import convert

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
NEMOTRON: dict[str, Any] = {
    **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", "mlp", "full_attention"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 20,  # 80, and no multiple of the hidden size
    "ssm_state_size": 16,
    "n_groups": 2,
    "head_dim": 8,
}
Tensors = dict[str, torch.Tensor]
IDS = torch.arange(40)[None] % 64
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INV_FREQ = 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)


def save(kind: str, root: Path, **sizes: Any) -> torch.Tensor:
    """Save a tiny random model of a real class, and return its logits."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**(NEMOTRON if kind == "NemotronH" else SIZES), **sizes})
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(root)
    return logits(root)


def logits(root: Path) -> torch.Tensor:
    with torch.no_grad():
        return reference.load(root, torch.float32)(IDS).logits


def set_keys(root: Path, **keys: Any) -> None:
    path = root / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change(root: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Change a folder's tensors, in a single file."""
    save_file(edit(load_file(root / safetensors.SINGLE)), root / safetensors.SINGLE, metadata={"format": "pt"})


def in_shards(root: Path, edit: Callable[[Tensors], Tensors], of_second: Callable[[str], bool]) -> None:
    """Write a folder's tensors, changed, as two files with their index."""
    found = edit(load_file(root / safetensors.SINGLE))
    (root / safetensors.SINGLE).unlink()
    file_of = {name: f"model-0000{1 + of_second(name)}-of-00002.safetensors" for name in found}
    for file in sorted(set(file_of.values())):
        save_file({name: value for name, value in found.items() if file_of[name] == file}, root / file, metadata={"format": "pt"})
    (root / safetensors.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": file_of}))


def there_and_back(root: Path) -> Path:
    convert.run_import(root, root.parent / "ckpt", dry_run=False)
    convert.run_export(root.parent / "ckpt", root.parent / "out", dry_run=False)
    return root.parent / "out"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def twice(found: Tensors) -> Tensors:
    return found | {HEAD: found[EMBEDDING].clone()}


def under_the_head(found: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDING else name: value for name, value in found.items()}


def without_model(found: Tensors) -> Tensors:
    return {name.removeprefix("model."): value for name, value in found.items()}


def with_model(found: Tensors) -> Tensors:
    return {f"model.{name}": value for name, value in found.items()}


def in_memory(found: Tensors) -> Tensors:
    return {name.replace("backbone.", "model."): value for name, value in found.items()}


TAKEN: list[tuple[str, str, dict[str, Any], Callable[[Tensors], Tensors]]] = [
    ("a tied head stored twice", "Qwen2", {"tie_word_embeddings": True}, twice),
    ("a tied matrix under the head's name", "Granite", {"tie_word_embeddings": True}, under_the_head),
    ("names of the model without its head", "Granite", {"tie_word_embeddings": True}, without_model),
    ("a model within a model", "Llama", {}, with_model),
    ("Nemotron-H's names in memory", "NemotronH", {}, in_memory),
]


@pytest.mark.parametrize(("kind", "sizes", "edit"), [row[1:] for row in TAKEN], ids=[row[0] for row in TAKEN])
def test_a_spelling_that_transformers_takes_comes_back_byte_for_byte(
    tmp_path: Path, kind: str, sizes: dict[str, Any], edit: Callable[[Tensors], Tensors]
) -> None:
    root = tmp_path / "hf"
    wanted = save(kind, root, **sizes)
    change(root, edit)
    assert torch.equal(logits(root), wanted)
    assert files(there_and_back(root)) == files(root)


def test_both_names_of_a_tied_head_follow_training(tmp_path: Path) -> None:
    save("Qwen2", tmp_path / "hf", tie_word_embeddings=True)
    change(tmp_path / "hf", twice)
    convert.run_import(tmp_path / "hf", tmp_path / "ckpt", dry_run=False)
    reader = torch_dist.TensorReader(tmp_path / "ckpt/state")
    values = {key: reader.read(key, shape) for key, shape in reader.shapes().items()}
    values["embedding.word_embeddings.weight"] += 1
    for path in (tmp_path / "ckpt/state").iterdir():
        path.unlink()
    specs = [torch_dist.TensorSpec(key, tuple(value.shape), value.dtype) for key, value in values.items()]
    torch_dist.write_tensors(tmp_path / "ckpt/state", specs, lambda key: [as_torch.of_tensor(values[key])])
    integrity.seal(tmp_path / "ckpt")
    convert.run_export(tmp_path / "ckpt", tmp_path / "out", dry_run=False)
    before, after = (load_file(tmp_path / name / safetensors.SINGLE) for name in ("hf", "out"))
    assert torch.equal(after[HEAD], before[EMBEDDING] + 1) and torch.equal(after[EMBEDDING], after[HEAD])


def with_inv_freq(found: Tensors) -> Tensors:
    return found | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": INV_FREQ.clone() for layer in range(2)}


def with_mtp(found: Tensors) -> Tensors:
    return found | {"mtp.layers.0.norm.weight": torch.ones(32), "backbone.mtp.head.weight": torch.full((4,), float("nan"))}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("kind", "keys", "edit"),
    [
        ("Llama", {}, with_inv_freq),
        ("Mistral", {}, lambda found: found | {"model.rotary_emb.inv_freq": INV_FREQ}),
        ("NemotronH", {"num_nextn_predict_layers": 1}, with_mtp),
    ],
)
def test_what_transformers_drops_is_left_out(
    tmp_path: Path, kind: str, keys: dict[str, Any], edit: Callable[[Tensors], Tensors], shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The export is the folder without it: a second round trip changes no byte. A file of dropped tensors alone goes too."""
    root = tmp_path / "hf"
    wanted = save(kind, root, **keys)
    plain = load_file(root / safetensors.SINGLE)
    if shards == 1:
        change(root, edit)
    else:
        in_shards(root, edit, lambda name: name not in plain)
    assert any("are left out, as transformers leaves them out" in note for note in plan_import(root).notes)
    out = there_and_back(root)
    assert torch.equal(logits(out), wanted)
    exported = {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}
    assert exported.keys() == plain.keys() and all(torch.equal(exported[name], value) for name, value in plain.items())
    assert {name for name in files(root) if not name.startswith("model")} <= files(out).keys()
    (tmp_path / "second").mkdir()
    out = out.rename(tmp_path / "second" / "hf")
    assert files(there_and_back(out)) == files(out)


@pytest.mark.parametrize(
    ("kind", "edit", "named"),
    [
        ("Llama", lambda found: found | {"model.layers.0.self_attn.bias": torch.ones(2)}, "an extra tensor"),
        ("Llama", lambda found: found | {"mtp.norm.weight": torch.ones(2)}, "an extra tensor"),
        ("NemotronH", lambda found: found | {"backbone.rotary_emb.inv_freq": INV_FREQ}, "an extra tensor"),
        ("Llama", lambda found: {name: value for name, value in found.items() if name != HEAD}, "no such tensor"),
    ],
)
def test_what_belongs_to_no_rule_is_refused(tmp_path: Path, kind: str, edit: Callable[[Tensors], Tensors], named: str) -> None:
    save(kind, tmp_path / "hf")
    change(tmp_path / "hf", edit)
    with pytest.raises(InputError, match=f"found {named}"):
        plan_import(tmp_path / "hf")


def wrap(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {f"{prefix}{name}": value for name, value in found.items()}


def wrap_layers(found: Tensors) -> Tensors:
    return {name.replace("layers.1.", "layers.1._checkpoint_wrapped_module._fsdp_wrapped_module."): value for name, value in found.items()}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "edit",
    [wrap("module."), wrap("_orig_mod."), wrap("_fsdp_wrapped_module."), wrap("module._orig_mod."), wrap("_forward_module."), wrap_layers],
)
def test_wrapped_names_lose_their_wrapper(tmp_path: Path, edit: Callable[[Tensors], Tensors], shards: int) -> None:
    """transformers takes none of them, and would draw the weights at random: verify says so instead of comparing with those."""
    root = tmp_path / "hf"
    wanted = save("Llama", root)
    if shards == 1:
        change(root, edit)
    else:
        in_shards(root, edit, lambda name: "mlp" in name)
    with pytest.raises(CheckpointError, match="which transformers would draw at random"):
        logits(root)
    assert any("lose what their trainer wrapped them in" in note for note in plan_import(root).notes)
    assert torch.equal(logits(there_and_back(root)), wanted)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "absent"}, "ValueError"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "KeyError"),
        ({"hidden_size": "32"}, "StrictDataclass"),
        ({"intermediate_size": 56}, "RuntimeError"),
        ({"hidden_act": "absent"}, "KeyError"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "ImportError|ValueError|RuntimeError"),
    ],
)
def test_errors_of_transformers_are_the_verifications(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    save("Llama", tmp_path / "hf")
    set_keys(tmp_path / "hf", **keys)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/hf: found .*({said}).* of transformers: ") as caught:
        logits(tmp_path / "hf")
    assert len(str(caught.value).splitlines()) == 1


LFS = b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / safetensors.SINGLE).write_bytes(LFS), "model.safetensors: found a Git-LFS pointer"),
        (
            lambda root: (root / safetensors.SINGLE).rename(root / "pytorch_model.bin"),
            "found no safetensors weights, only pytorch_model.bin",
        ),
        (lambda root: (root / safetensors.SINGLE).rename(root / "model-00001-of-00002.safetensors"), "1 of 2 shards.* fetch the index"),
        (lambda root: (root / "adapter_config.json").write_text("{}"), "an adapter beside the model .*merge it"),
    ],
)
def test_files_that_are_wrong_are_named_before_a_symptom_that_transformers_names(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    """Without peft, transformers passes over an adapter in silence."""
    save("Llama", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(InputError, match=said) as caught:
        logits(tmp_path / "hf")
    assert len(str(caught.value).splitlines()) == 1


def test_verifys_text_is_not_cut_by_a_tokenizer_saved_so(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """transformers saves the truncation and padding of its last call in tokenizer.json."""
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=24)
    saved.save(str(tmp_path / "tokenizer.json"))
    whole = parity.tokens_of(tiny_tokenizer, convert.TEXT, 64, 384, 0)
    assert parity.tokens_of(tmp_path, convert.TEXT, 64, 384, 0) == whole and whole[1] == "text"
