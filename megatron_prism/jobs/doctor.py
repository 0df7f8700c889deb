"""`prism doctor`: what this machine has, at which version, and what each absence costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from typing import Any

PACKAGES = (
    # (import name, distribution, what its absence costs)
    ("torch", "torch", "nothing runs"),
    ("megatron.core", "megatron-core", "no training, no generation from a checkpoint"),
    ("psutil", "psutil", "Megatron-Core's checkpoint writer hangs"),
    ("transformers", "transformers", "no oracle to verify conversions against"),
    ("tokenizers", "tokenizers", "no data preparation, no generation"),
    ("tensorboard", "tensorboard", "no TensorBoard logs"),
    ("datasketch", "datasketch", "no dedup: minhash"),
    ("gigatoken", "gigatoken", "no tokenizer_backend: gigatoken (tokenizers does the work, slower)"),
    ("matplotlib", "matplotlib", "no prepare --report"),
    ("reasoning_gym", "reasoning-gym", "no quickstart corpus"),
    ("transformer_engine", "transformer-engine", "no FP8 and no fused layers on GPUs (Megatron-Core's local layers are used)"),
    ("apex", "apex", "no fused gradient accumulation on GPUs"),
    ("mamba_ssm", "mamba-ssm", "no Mamba hybrids on GPUs"),
    ("causal_conv1d", "causal-conv1d", "no Mamba hybrids on GPUs"),
    ("nemo_aligner", "nemo-aligner", "no NeMo-Aligner backend for RL"),
    ("vllm", "vllm", "no vLLM rollouts"),
)
PROGRAMS = (("sbatch", "no submission to Slurm from here"), ("bwrap", "no sandbox for generated code"), ("git", "no commit in the manifests"))
REQUIRED = {"torch", "megatron-core", "psutil", "tokenizers", "tensorboard", "transformers"}


def run() -> dict[str, Any]:
    """Return the findings: packages, programs, devices, and whether the required ones are here."""
    packages = [
        {"name": distribution, "version": _version(module, distribution), "absence_costs": costs} for module, distribution, costs in PACKAGES
    ]
    programs = [{"name": name, "path": shutil.which(name), "absence_costs": costs} for name, costs in PROGRAMS]
    missing = [entry["name"] for entry in packages if entry["name"] in REQUIRED and entry["version"] is None]
    return {"packages": packages, "programs": programs, "devices": _devices(), "missing": missing, "ok": not missing}


def _version(module: str, distribution: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.metadata.version(distribution)
    except ModuleNotFoundError:  # a parent package is absent; or importable without metadata, as a source tree is
        return None


def _devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def show(found: dict[str, Any]) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "found", "without it", title="prism doctor", title_justify="left")
    for entry in (*found["packages"], *found["programs"]):
        value = entry.get("version") or entry.get("path")
        table.add_row(entry["name"], value or "[yellow]absent[/yellow]", "" if value else entry["absence_costs"])
    devices = ", ".join(found["devices"]) or "none: the CPU stands in (gloo), for tests, demos and debugging"
    table.add_row("CUDA devices", devices, "")
    console.print(table)
