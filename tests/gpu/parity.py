"""Each family's logits, loss and gradients on this device beside transformers' on the CPU: python -m tests.gpu.parity FIXTURES WORK.

In fp32 and bf16, plain and with packed documents. The oracle computes in fp32; for bf16 its weights are rounded first. On a GPU the layers are
Transformer Engine's and mamba_ssm's. Transformer Engine asks cuBLAS for TF32 where all is in fp32 (common/gemm/cublaslt_gemm.cu); the variables of
an fp32 run forbid it (parallel/environment.py), and the bounds hold with them and without.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from megatron_prism.core.config import GangConfig, ParallelConfig, Precision
from megatron_prism.models import spec
from megatron_prism.parallel import environment, host
from megatron_prism.parallel.groups import Groups, grid, join
from tests.gpu import options
from tests.gpu.options import Options
from tests.gpu.report import check
from tests.parity import worker
from tests.parity.tiny import FAMILIES, SIZES

TOKENS = [(7 * index * index + 3) % SIZES["vocab_size"] for index in range(96)]
DOCUMENTS = [[29, 1, 18], [7, 41]]  # by row, as in tests/parity/test_families.py
# Relative differences by norm: of the logits, and of the worst parameter's gradient. bf16: some 2.5 times the worst on a CPU (0.0125; 0.084,
# of a Mamba dt_bias). TF32, which rounds eight times as finely: a fifth of that. fp32: on a CPU.
BOUNDS: dict[str, tuple[float, float]] = {"bf16": (0.03, 0.2), "tf32": (0.006, 0.04), "fp32": (1e-5, 1e-5)}
# of each family an architecture that is wrong in one value, or a fault of worker.py: its logits must be beyond the bound
CONTROLS: dict[str, dict[str, Any]] = {
    "llama": {"control": "no document mask", "documents": DOCUMENTS},
    "mistral": {"replace": {"window_size": None}},
    "mistral_small": {"replace": {"rotary_base": 500.0}},
    "granite": {"replace": {"residual_multiplier": 1.0}},
    "granite_micro": {"replace": {"embedding_multiplier": 1.0}},
    "granite_h_micro": {"control": "no document mask", "documents": DOCUMENTS},
    "nemotron_h": {"control": "no document mask", "documents": DOCUMENTS},
    "qwen2": {"control": "no_qkv_bias"},
}


def main(given: Options) -> None:
    """Run every family; tiny: a dense one and a hybrid."""
    environment.set_variables(gang_of("fp32"))
    join()
    # one grid for all: on a device its groups stay until the process ends, each with threads of its own
    with grid(gang_of("fp32")) as groups:
        families(given, groups)
    sys.stdout.flush()
    os._exit(0)  # nothing is left to say, and a process group's end could wait


def families(given: Options, groups: Groups) -> None:
    """Compare every family, and each with a fault."""
    with check("parity", "Transformer Engine's layers") as result:
        if host.has_cuda():
            result.ok = spec.use_transformer_engine()
        else:
            result.skip("no CUDA device: Megatron-Core's own layers")
    for family in ("llama", "nemotron_h") if given.tiny else FAMILIES:
        for precision in ("fp32", "bf16"):
            for name, more in (("", {}), (" packed", {"documents": DOCUMENTS})):
                with check("parity", f"{family} {precision}{name}") as result:
                    result.figures = compare(given, groups, family, precision, more)
                    result.ok = within(result.figures, precision)
            with check("parity", f"{family} {precision} control") as result:
                result.figures = compare(given, groups, family, precision, CONTROLS[family])
                result.ok = result.figures["logits_relative"] > bounds(precision)[0]


def gang_of(precision: Precision) -> GangConfig:
    """Return the gang of one rank."""
    return GangConfig(parallel=ParallelConfig(distributed_optimizer=False), precision=precision, seed=0)


def bounds(precision: str) -> tuple[float, float]:
    """Return the bounds of a precision on this device."""
    return BOUNDS["tf32" if precision == "fp32" and host.has_cuda() else precision]


def within(figures: dict[str, Any], precision: str) -> bool:
    """Say whether logits and gradients are those of transformers. NaN is not."""
    logits, gradient = bounds(precision)
    return figures["logits_relative"] <= logits and figures["gradient"] <= gradient


def compare(given: Options, groups: Groups, family: str, precision: Precision, more: dict[str, Any]) -> dict[str, Any]:
    """Return the differences of a case of worker.py."""
    root, scratch = given.fixtures / family, given.work / "gradients"
    case = {"ckpt": root / "ckpt", "tokens": TOKENS, "control": None, "replace": {}, "documents": None, **more}
    ours = worker.megatron(scratch, case, gang_of(precision), groups)
    shutil.rmtree(scratch)
    documents = tuple(length for row in case["documents"] or [[len(TOKENS)]] for length in row)
    return worker.compare(ours, worker.transformers_oracle(root / "hf", tuple(TOKENS), documents, False, rounded=precision == "bf16"))


if __name__ == "__main__":
    main(options.read())
