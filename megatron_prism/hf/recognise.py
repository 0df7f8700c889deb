"""What a path is that is no whole Hugging Face model folder, said in one line with the way out: the commonest things given in its place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prism.core.errors import Problem

FOLDER = "a Hugging Face model folder: config.json and safetensors weights"
WEIGHTS = "model.safetensors, or model.safetensors.index.json with its shards"
SHARD = re.compile(r"model-([0-9]+)-of-([0-9]+)\.safetensors")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ADAPTER = re.compile(r"adapter_config\.json|adapter_model\..*")
MERGE = "merge it into its model with peft (merge_and_unload) and save that"
# a quantised folder of before, or of another tool, has a file of its own in place of config.json's key
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
DEQUANTISE = "take the model's release in bf16 or fp32, or save it dequantised (transformers: model.dequantize())"
OTHERS: tuple[tuple[str, str, str], ...] = (  # a pattern of file names, what the folder is, what to do
    (
        r"prism\.json|checkpoints/step_\d{8,}",
        "a Megatron checkpoint of prism",
        "write it as a Hugging Face folder: prism convert export --ckpt",
    ),
    (
        r".*\.nemo|model_config\.yaml|model_weights|context/model\.yaml",
        "a checkpoint of NeMo",
        "export it to Hugging Face with NeMo's own converter",
    ),
    (
        r"latest_checkpointed_iteration\.txt|iter_\d+|.*\.distcp|\.metadata|pytorch_model_fsdp_\d+",
        "a distributed checkpoint (Megatron's or torch's)",
        "save the model as a Hugging Face folder with the tool that wrote it",
    ),
    (r"zero_to_fp32\.py|global_step\d+|mp_rank_\d+.*", "a checkpoint of DeepSpeed", "run its zero_to_fp32.py with --safe_serialization"),
    (
        r"consolidated.*\.safetensors|tekken\.json",
        "Mistral's own layout (params.json, consolidated.safetensors)",
        "take the model's files in Hugging Face's layout: config.json and model*.safetensors",
    ),
    (
        r"consolidated\.\d+\.pth|params\.json",
        "Meta's own layout (params.json, consolidated.*.pth)",
        "take the release in Hugging Face's layout, or convert it: transformers/models/llama/convert_llama_weights_to_hf.py",
    ),
    (r"(?i).*\.gguf", "a GGUF model of llama.cpp", "take the model's safetensors release: GGUF is quantised or renamed"),
    (r"weights.*\.npz", "a model of MLX", "take the model's safetensors release"),
    (r".*\.msgpack|.*\.h5|.*\.onnx|.*\.tflite", "weights of Flax, TensorFlow or ONNX", "take the model's safetensors release"),
    (r"model_index\.json", "a pipeline of diffusers", "no language model"),
)


def no_model(root: Path) -> Problem | None:
    """Return what a path without config.json is, None where it is nothing that we know."""
    if not root.is_dir():
        return no_folder(root)
    names = sorted(path.name for path in root.iterdir())
    if (root / "snapshots").is_dir() or root.name == "snapshots":
        snapshots = root if root.name == "snapshots" else root / "snapshots"
        inside = [str(path) for path in sorted(snapshots.iterdir())]
        fix = f"give the snapshot: {', '.join(inside[:3])}" if inside else "it has no snapshot: hf download the model"
        return Problem(str(root), "the hub's cache of a model", FOLDER, fix)
    cached = [name for name in names if name.startswith("models--")]
    if cached or (root / "hub").is_dir():
        fix = f"give a snapshot in it: {cached[0] if cached else 'hub/models--ORG--NAME'}/snapshots/HASH"
        return Problem(str(root), "the hub's cache", FOLDER, fix)
    adapters = [name for name in names if ADAPTER.fullmatch(name)]
    if adapters:
        return Problem(str(root), f"an adapter alone ({', '.join(adapters)})", FOLDER, MERGE)
    if ours := _other(root, [name for name in names if name == "prism.json"], FOLDER):
        return ours  # its hf/ has a config.json, and no weights
    models = [name for name in names if (root / name / "config.json").is_file()]
    if models:
        return Problem(str(root), f"a folder of model folders ({', '.join(models[:3])})", FOLDER, "give one of them")
    folders = [name for name in names if (root / name).is_dir() and os.access(root / name, os.R_OK | os.X_OK)]
    below = [f"{name}/{path.name}" for name in folders for path in sorted((root / name).iterdir())]
    if other := _other(root, [*names, *below], FOLDER):
        return other
    return None if names else Problem(str(root), "an empty folder", FOLDER)


def no_folder(root: Path, required: str = FOLDER) -> Problem:
    """Return the problem of a path that is no folder: absent, a hub's name, an address, a file of a folder."""
    if root.is_symlink():
        return Problem(str(root), f"a link to {root.readlink()}, which is not there", required)
    if not root.exists():
        is_id = HUB_ID.fullmatch(str(root))
        fix = (
            f"where it is a name on the hub, download it first (hf download {root} --local-dir DIR) and give that local folder"
            if is_id
            else ""
        )
        if ":/" in str(root):  # Path makes one slash of two
            fix = "an address? Download what is there first, and give that local folder"
        return Problem(str(root), "no such folder", required, fix)
    fix = f"give the folder that it is in: {root.parent}" if (root.parent / "config.json").is_file() else ""
    return _other(root, [root.name], required) or Problem(str(root), "a file", required, fix)


def _other(root: Path, names: list[str], required: str) -> Problem | None:
    for pattern, what, fix in OTHERS:
        if any(re.fullmatch(pattern, name) for name in names):
            return Problem(str(root), what, required, fix)
    return None


def no_weights(root: Path) -> Problem:
    """Return what a folder has in place of the weights that its config.json speaks of."""
    names = sorted(path.name for path in root.iterdir())
    shards = [match for name in names if (match := SHARD.fullmatch(name))]
    if shards:
        found = f"{len(shards)} of {int(shards[0][2])} shards, and no model.safetensors.index.json"
        return Problem(str(root), found, WEIGHTS, "fetch the index (and every shard) from where the shards came")
    if other := _other(root, names, WEIGHTS):
        return other
    pickles = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        fix = "pickled weights are not read, since loading them can run code: save the model anew as safetensors"
        return Problem(str(root), f"no safetensors weights, only {', '.join(pickles[:3])}", WEIGHTS, fix)
    named = [name for name in names if name.endswith(".safetensors")]
    only = f" of these names, only {', '.join(named[:3])}" if named else ""
    fix = f"transformers takes no other name: if it is the model's only file, rename {named[0]} to model.safetensors" if named else ""
    return Problem(str(root), f"no safetensors weights{only}", WEIGHTS, fix)


def adapter_beside(root: Path) -> list[Problem]:
    """Return a problem where a PEFT adapter lies beside a model: transformers loads both where peft is installed."""
    names = sorted(path.name for path in root.iterdir() if ADAPTER.fullmatch(path.name))
    if not names:
        return []
    if not (root / "model.safetensors").exists() and not (root / "model.safetensors.index.json").exists():
        return [Problem(str(root), f"an adapter alone ({', '.join(names)})", FOLDER, MERGE)]
    fix = f"{MERGE}, or move the adapter's files to a folder of their own"
    return [Problem(str(root), f"an adapter beside the model ({', '.join(names)})", "a model without an adapter", fix)]


def quantised(root: Path, config: Mapping[str, Any]) -> list[Problem]:
    """Return a problem where config.json, or a file of a quantisation tool beside it, says that the weights are quantised."""
    for key in QUANTISED_KEYS:
        if value := config.get(key):
            method = value.get("quant_method") or value.get("quant_algo") or value.get("format") if isinstance(value, dict) else value
            bits = f", {value['bits']} bits" if isinstance(value, dict) and "bits" in value else ""
            fix = f"{DEQUANTISE}; if its weights are whole, remove the key"
            return [
                Problem(
                    f"{root / 'config.json'}:{key}", f"a quantised model ({method or 'method not named'}{bits})", "no quantisation", fix
                )
            ]
    for name in QUANTISED_FILES:
        if (root / name).is_file():
            return [
                Problem(
                    str(root / name), "a quantised model", "no quantisation", f"{DEQUANTISE}; if its weights are whole, remove the file"
                )
            ]
    return []
