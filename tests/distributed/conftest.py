"""One tiny model and one prepared mixture for all layouts, and gangs that each train several layouts in one life."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
Gang = Callable[[int, list[dict[str, Any]]], dict[str, Any]]


SIZES = {"vocab_size": 390, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1}  # fmt: skip


def random_checkpoint(folder: Path, kind: str, tokenizer: Path, **own: Any) -> Path:
    """Return an imported checkpoint of a random 5-layer model with GQA; its vocabulary pads differently at each TP."""
    import torch
    import transformers

    from megatron_prism.jobs import convert

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own})
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder / "hf")
    for file in tokenizer.iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    convert.run_import(folder / "hf", folder / "ckpt", dry_run=False)
    return folder / "ckpt"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a tiny LLaMA."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny"), "Llama", tiny_tokenizer, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def granite_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a tiny Granite: four multipliers and tied embeddings."""
    scalars = {"attention_multiplier": 1 / 16, "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "logits_scaling": 4.0}
    return random_checkpoint(tmp_path_factory.mktemp("granite"), "Granite", tiny_tokenizer, tie_word_embeddings=True, **scalars)


@pytest.fixture(scope="session")
def mistral_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a tiny Mistral: each token sees 11."""
    return random_checkpoint(tmp_path_factory.mktemp("mistral"), "Mistral", tiny_tokenizer, tie_word_embeddings=False, sliding_window=11)


@pytest.fixture(scope="session")
def nemotron_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a tiny Nemotron-H: two groups of Mamba heads, so that it splits over TP 2; nine layers, uneven at PP 2."""
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16, "head_dim": 16}
    layers = {"layers_block_type": [kinds[kind] for kind in "M-M*-M-*M"]}
    return random_checkpoint(tmp_path_factory.mktemp("nemotron"), "NemotronH", tiny_tokenizer, **mamba, **layers)


@pytest.fixture(scope="session")
def granite_h_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a tiny Granite-4.0-H: one group, so PP and DP only; four multipliers, tied embeddings."""
    scalars = {"attention_multiplier": 1 / 16, "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "logits_scaling": 4.0}
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 16}
    layers = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3, "position_embedding_type": None,
              "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 176, "rms_norm_eps": 1e-5}  # fmt: skip
    return random_checkpoint(
        tmp_path_factory.mktemp("granite_h"), "GraniteMoeHybrid", tiny_tokenizer, tie_word_embeddings=True, **scalars, **mamba, **layers
    )


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return a prepared mixture of two sources, one with a held-out part."""
    from megatron_prism.core.config import PrepareConfig, SourceConfig
    from megatron_prism.jobs import prepare

    folder = tmp_path_factory.mktemp("mixture")
    sums = [{"text": f"The sum of {a} and {b} is {a + b}."} for a in range(60) for b in range(30)]
    code = [{"text": f"def f{a}(x):\n    return x * {a} + {b}\n"} for a in range(60) for b in range(20)]
    for name, records in (("math", sums), ("code", code)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = (
        SourceConfig(name="math", path=(str(folder / "math.jsonl"),), weight=70, valid_percent=10),
        SourceConfig(name="code", path=(str(folder / "code.jsonl"),), weight=30, valid_percent=10),
    )
    prepare.run(PrepareConfig(out=folder / "data", tokenizer=tiny_tokenizer, sources=sources, num_workers=1))
    return folder / "data"


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_mixture: Path) -> Gang:
    """Return a function that trains cases one after another in one torchrun gang, and returns {case: result}.

    A case: {"name", "config": keys of TrainConfig to override, "control": a fault to build in, or None, "start_from":
    {"run_dir", "step"} of a run to be continued as if it had been killed there, or None}.
    """

    def run(num_processes: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"gang{num_processes}")
        base: dict[str, Any] = {
            "init": {"checkpoint": str(tiny_checkpoint)},
            "data": {"prepared": str(tiny_mixture), "seq_length": 32},
            "batch": {"global_size": 8, "micro_size": 2},
            "steps": 10,
            "precision": "fp32",
            "optimizer": {"lr": 3e-3},
            "schedule": {"warmup_steps": 2},
            "validation": {"sequences": 6},
        }
        named = []
        for case in cases:
            config = {"run_dir": str(folder / case["name"]), **base, **case["config"]}
            config["data"] = {**base["data"], **case["config"].get("data", {})}
            named.append({"control": None, "start_from": None, **case, "config": config})
        (folder / "cases.json").write_text(json.dumps(named))
        script = (
            "import sys; from megatron_prism.parallel.launch import start_gang;"
            f"sys.exit(start_gang({num_processes}, [{str(WORKER)!r}, {str(folder)!r}]))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
        said = [line for line in done.stderr.splitlines() if "registered at" not in line]  # torch lists its whole dispatcher
        assert done.returncode == 0, "\n".join(said)[-6000:]
        return json.loads((folder / "results.json").read_text())

    return run
