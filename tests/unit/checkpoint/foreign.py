"""More rows of the table of malformed folders: what a download, a trainer or another tool leaves in place of a model folder."""

from __future__ import annotations

import gzip

import torch
from safetensors.torch import load_file, save_file

from .damages import CONFIG, FIRST, INDEX, QUERY, SECOND, TOKENIZER, case, data, rename, settings, tensors

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FOREIGN = [
    case(
        "Git-LFS pointer for a file",
        "found a Git-LFS pointer, not the file & git lfs pull",
        *(data(file, lambda raw: LFS) for file in (FIRST, INDEX, CONFIG, TOKENIZER, "tokenizer_config.json")),
        *(
            lambda root, file=file: (root / file).write_bytes(LFS)
            for file in ("tokenizer.model", "generation_config.json", "chat_template.jinja", "merges.txt")
        ),
        lambda root: [(root / file).write_bytes(LFS) for file in (FIRST, SECOND)],
    ),
    case(
        "web page for a file",
        "found a web page, not the file",
        *(data(file, lambda raw: PAGE) for file in (FIRST, INDEX, CONFIG, TOKENIZER, "tokenizer_config.json")),
    ),
    case(
        "link to nothing in a subfolder",
        "hf/templates/rag.jinja: found a link to ../gone, which is not there & cp -rL",
        lambda root: ((root / "templates").mkdir(), (root / "templates/rag.jinja").symlink_to("../gone")),
    ),
    case(
        "link saved as text",
        "found a link saved as text & cp -rL",
        *(data(file, lambda raw: b"../../blobs/0123abc") for file in (FIRST, INDEX, CONFIG, TOKENIZER)),
    ),
    case(
        "text for weights",
        f"{FIRST}: found text ('Access to model & fetch it again",
        data(FIRST, lambda raw: b"Access to model X is restricted.\n"),
    ),
    case(
        "archive for weights",
        f"{FIRST}: found",
        data(FIRST, lambda raw: b"PK\x03\x04" + raw),
        data(FIRST, lambda raw: b"GGUF\x03\0\0\0" + raw),
        data(FIRST, gzip.compress),
    ),
    case("shards without their index", "hf: found 2 of 2 shards & fetch the index", lambda root: (root / INDEX).unlink()),
    case("a shard alone", "hf: found 1 of 2 shards", lambda root: [(root / file).unlink() for file in (INDEX, SECOND)]),
    case(
        "adapter beside the model",
        "hf: found an adapter beside the model & merge it",
        *(
            lambda root, file=file: (root / file).write_bytes(b"{}")
            for file in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
        ),
    ),
    case(
        "adapter's tensors",
        "found an adapter's tensor & merge it",
        tensors(rename(QUERY, f"base_model.model.{QUERY}")),
        tensors(lambda found: found.update({QUERY.replace(".weight", ".lora_A.weight"): torch.ones(2, 16)})),
    ),
    case(
        "quantised model",
        "hf/config.json:quantization_config: found a quantised model & dequantise",
        *(
            settings(quantization_config={"quant_method": method, "bits": 4})
            for method in ("bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "aqlm", "hqq", "torchao", "modelopt")
        ),
        settings(quantization_config={"load_in_4bit": True}),
    ),
    case(
        "quantised by another key or file",
        "found a quantised model & dequantise",
        settings(quantization={"group_size": 64, "bits": 4}),
        settings(compression_config={"format": "pack-quantized"}),
        *(
            lambda root, file=file: (root / file).write_text("{}")
            for file in ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
        ),
    ),
    case(
        "tied head of other values",
        f"{SECOND}: lm_head.weight: found other values & untie it in config.json",
        settings(tie_word_embeddings=True),
        lambda root: (
            settings(tie_word_embeddings=True)(root),
            save_file(load_file(root / SECOND) | {"lm_head.weight": torch.ones(390, 16).half()}, root / SECOND),
        ),
    ),
    case(
        "tensor with and without its wrapper",
        "found the tensor that & is too",
        tensors(lambda found: found.update({f"module.{QUERY}": torch.ones(16, 16)})),
    ),
    case(
        "model_type of another class",
        f"{CONFIG}:model_type: found & 'llama', as architectures",
        *(settings(model_type=value) for value in ("mistral", "qwen2", "evil", "", 7, ["llama"])),
    ),
    case(
        "rotary keys that Megatron-Core cannot honour",
        f"{CONFIG}:rope_",
        *(
            settings(**keys)
            for keys in (
                {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
                {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
                {"rope_parameters": {**LLAMA3, "low_freq_factor": None}},
                {"rope_parameters": {key: value for key, value in LLAMA3.items() if key != "high_freq_factor"}},
                {"rope_parameters": {key: value for key, value in LLAMA3.items() if not key.startswith("original")}},
                {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
                {"rope_parameters": LLAMA3, "partial_rotary_factor": 0.5},
                {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "layer_types": ["full_attention"] * 2},
                {"rope_scaling": [4.0]},
            )
        ),
    ),
]
