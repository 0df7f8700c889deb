"""Asks Transformer Engine, with the stand-in, for its attention: attention_worker.py FOLDER reads FOLDER/cases.json, writes FOLDER/answers.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import standin
import torch
from torch.overrides import TorchFunctionMode
from worker import believing_te, built

from megatron_prism.core.config import FusionConfig, GangConfig, ModelConfig
from megatron_prism.core.load import build as read
from megatron_prism.models import attention_backend, build
from megatron_prism.parallel import groups

FUSED = "NVTE_F16_arbitrary_seqlen"


class OnCuda(TorchFunctionMode):
    """Every tensor says that it is on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return True if func == torch.Tensor.is_cuda.__get__ else func(*args, **(kwargs or {}))  # type: ignore[attr-defined]


def main(root: Path) -> None:
    standin.install(Path(sys.prefix) / "transformer_engine_python")
    groups.join()
    answers = {}
    for case in json.loads((root / "cases.json").read_text()):
        model = read(case["model"], ModelConfig, str)
        with groups.grid(GangConfig(), 60.0) as grid:
            chunks = built(model, grid, GangConfig(), "te", None)
            answers[case["name"]] = ask(chunks, case)
    fused = GangConfig(fusion=FusionConfig(gradient_accumulation=True))
    with groups.grid(fused, 60.0) as grid:
        answers["fused gradients"] = {
            name: fused_gradients(built(model, grid, gang, "te", None)) for name, gang in (("off", GangConfig()), ("on", fused))
        }
    (root / "answers.json").write_text(json.dumps(answers))


def ask(chunks: list[Any], case: dict[str, Any]) -> dict[str, Any]:
    """Return the choice, where cuDNN has a kernel or refuses as case["cudnn"] says."""
    import transformer_engine_torch as bindings

    tokens = torch.zeros(case.get("size_B", 1), case["size_S"], dtype=torch.long)
    batch = {"tokens": tokens} | ({"document_ids": torch.arange(case["size_S"])[None] // 7} if case.get("packed") else {})
    backend = getattr(bindings.NVTE_Fused_Attn_Backend, FUSED if case["cudnn"] else "NVTE_No_Backend")
    with (
        believing_te(),
        mock.patch.object(bindings, "get_fused_attn_backend", lambda *args, **kwargs: backend),
        OnCuda(),
    ):
        first, second = (dataclasses.asdict(attention_backend.choice(chunks, batch, 1)) for _ in range(2))
    logger = logging.getLogger(attention_backend.LOGGER)
    return {**first, "next_time": second["backend"], "loggers": [logger.level, logger.propagate, len(logger.handlers)]}


def fused_gradients(chunks: list[Any]) -> dict[str, bool]:
    """Return which matrices' gradients are summed within the matrix product, by the module's name."""
    switches = ("fuse_wgrad_accumulation", "gradient_accumulation_fusion")
    modules = build.unwrap(chunks[0]).named_modules()
    return {name: getattr(module, switch) for name, module in modules for switch in switches if hasattr(module, switch)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
