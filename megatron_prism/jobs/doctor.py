"""`prism doctor`: which packages and devices this machine has, their versions, and what does not work without each.

On a machine with a GPU each kernel of the GPU path is also run once (models/probes.py), in a child process under a time limit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_prism.core.errors import EnvironmentFault

if TYPE_CHECKING:
    from megatron_prism.models.probes import Probe


@dataclass(frozen=True)
class Package:
    """A package: the module to import, its distribution, what does not work without it, and its compiled module."""

    module: str
    distribution: str
    absence_costs: str
    compiled: str | None = None


@dataclass(frozen=True)
class Finding:
    """The state of a package. version: None where it is absent. broken: why it cannot work though it is installed."""

    name: str
    version: str | None
    broken: str | None
    absence_costs: str


@dataclass(frozen=True)
class Kernel:
    """The state of a kernel: works, absent, or broken for a reason. ms: the time of a call on small inputs."""

    name: str
    state: Literal["works", "absent", "broken"]
    ms: float | None
    detail: str
    absence_costs: str


PACKAGES = (
    Package("torch", "torch", "nothing runs"),
    Package("megatron.core", "megatron-core", "no training, no generation from a checkpoint"),
    Package("psutil", "psutil", "Megatron-Core's checkpoint writer hangs"),
    Package("transformers", "transformers", "no oracle to verify conversions against"),
    Package("tokenizers", "tokenizers", "no data preparation, no generation"),
    Package("tensorboard", "tensorboard", "no TensorBoard logs"),
    Package("datasketch", "datasketch", "no dedup: minhash"),
    Package("gigatoken", "gigatoken", "no tokenizer_backend: gigatoken (tokenizers does the work, slower)"),
    Package("matplotlib", "matplotlib", "no report, no prepare --report"),
    Package("math_verify", "math-verify", "no grading of math, in RL and in evaluation"),
    Package("lm_eval", "lm-eval", "no tasks of lm_eval, so no leaderboards"),
    Package("reasoning_gym", "reasoning-gym", "no corpus of examples/quickstart_text.sh"),
    Package(
        "transformer_engine",
        "transformer-engine",
        "no training on a GPU",
        "transformer_engine_torch",
    ),
    Package("apex", "apex", "no fused gradient accumulation on GPUs", "fused_weight_gradient_mlp_cuda"),
    Package(
        "flash_attn",
        "flash-attn",
        "under Transformer Engine only cuDNN's fused attention, or the slow unfused one; no engine mcore",
        "flash_attn_2_cuda",
    ),
    Package("mamba_ssm", "mamba-ssm", "no Mamba hybrids on GPUs", "selective_scan_cuda"),
    Package("causal_conv1d", "causal-conv1d", "no Mamba hybrids on GPUs", "causal_conv1d_cuda"),
    Package("nemo", "nemo-toolkit", "no NeMo-Aligner backend for RL"),
    Package("nemo_aligner", "nemo-aligner", "no NeMo-Aligner backend for RL"),
    Package("vllm", "vllm", "no vLLM rollouts"),
)
PROGRAMS = (
    ("sbatch", "no submission to Slurm from here"),
    ("srun", "no gang started by Slurm from here"),
    ("git", "no commit in the manifests"),
)
PROBE_LIMIT_S = 240  # mamba_ssm's kernels are compiled and tuned at their first call: a minute and more
REQUIRED = {"torch", "megatron-core", "psutil", "tokenizers", "tensorboard", "transformers"}


def run() -> dict[str, Any]:
    """Return the findings: packages, programs, the sandbox, devices, kernels, and whether the required packages are present and work.

    This process imports no package but torch.
    """
    packages = [asdict(find(package)) for package in PACKAGES]
    programs = [{"name": name, "path": shutil.which(name), "absence_costs": costs} for name, costs in PROGRAMS]
    missing = [entry["name"] for entry in packages if entry["name"] in REQUIRED and (entry["version"] is None or entry["broken"])]
    devices = _devices()
    kernels = [asdict(finding) for finding in run_kernels()] if devices else []
    found = {"packages": packages, "programs": programs, "sandbox": _sandbox(), "devices": devices, "kernels": kernels}
    return {**found, "missing": missing, "ok": not missing}


def _sandbox() -> dict[str, str | None]:
    """Return the sandbox that grading would choose here, for which it is tried; or why there is none."""
    from megatron_prism.grade.sandbox import choose

    try:
        backend = choose.choose().backend
    except EnvironmentFault as fault:
        return {"name": None, "detail": str(fault)}
    return {"name": backend.name, "detail": backend.bwrap}


def run_kernels() -> Iterator[Kernel]:
    """Run each kernel of the GPU path once, and yield its state."""
    from megatron_prism.models import probes

    for probe in probes.PROBES:
        if absent := [package for package in probe.packages if importlib.util.find_spec(package) is None]:
            yield Kernel(probe.name, "absent", None, f"without {', '.join(absent)}", probe.absence_costs)
        else:
            yield _run(probe)


def _run(probe: Probe) -> Kernel:
    command = [sys.executable, "-m", "megatron_prism.models.probes", probe.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Kernel(probe.name, "broken", None, f"no answer within {PROBE_LIMIT_S} s", probe.absence_costs)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return Kernel(probe.name, "broken", None, reason[0][:300], probe.absence_costs)
    outcome = json.loads(done.stdout.strip().splitlines()[-1])
    if not outcome["error"] <= probe.max_error:
        wrong = f"relative error {outcome['error']:.2g}, at most {probe.max_error:g} {outcome['detail']}".strip()
        return Kernel(probe.name, "broken", outcome["ms"], wrong, probe.absence_costs)
    return Kernel(probe.name, "works", outcome["ms"], outcome["detail"], probe.absence_costs)


def find(package: Package) -> Finding:
    """Return the state of a package, from its files alone: its metadata, its module, its compiled module."""
    try:
        version = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package.distribution, None, None, package.absence_costs)
    broken = None
    folder = _folder(package.module)
    if folder is None:
        broken = f"there is no module {package.module}: install it again"
    elif package.compiled is not None and not _is_compiled(package.compiled, folder):
        broken = f"its compiled part {package.compiled} is not there: build it on a machine with CUDA"
    return Finding(package.distribution, version, broken, package.absence_costs)


def _folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a parent package is absent
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _is_compiled(name: str, folder: Path) -> bool:
    """Say whether a compiled module lies beside its package, or within it (as Transformer Engine's may)."""
    return importlib.util.find_spec(name) is not None or any(folder.rglob(f"{name}*.so"))


def _devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def show(findings: dict[str, Any]) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "found", "without it", title="prism doctor", title_justify="left")

    def add(name: str, value: str, without: str, style: str = "") -> None:
        table.add_row(name, Text(value, style), Text(without))  # as Text: an error or a path may hold brackets, which are rich's markup

    for entry in (*findings["packages"], *findings["programs"]):
        value = entry.get("version") or entry.get("path")
        if entry.get("broken"):
            add(entry["name"], f"{value}, broken", f"{entry['broken']} ({entry['absence_costs']})", "red")
        else:
            add(entry["name"], value or "absent", "" if value else entry["absence_costs"], "" if value else "yellow")
    sandbox = findings["sandbox"]
    add("sandbox for generated code", sandbox["name"] or "none", sandbox["detail"], "" if sandbox["name"] else "yellow")
    for kernel in findings["kernels"]:
        works = kernel["state"] == "works"
        without = kernel["detail"] if works else f"{kernel['detail']} ({kernel['absence_costs']})"
        add(kernel["name"], f"{kernel['ms']:.2f} ms" if works else kernel["state"], without, "" if works else "red")
    add("CUDA devices", ", ".join(findings["devices"]) or "none: the CPU stands in (gloo), for tests, demos and debugging", "")
    console.print(table)
