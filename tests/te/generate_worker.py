"""The embedded engine over Transformer Engine's layers, built with the stand-in, beside Megatron's own: generate_worker.py FOLDER writes FOLDER/tokens.json.

The engine computes from parameters alone, so it runs where the layers cannot.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import standin
import torch
from worker import built

from megatron_prism.core.config import GangConfig, ModelConfig
from megatron_prism.core.load import build as read
from megatron_prism.generate import weights
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Sampling
from megatron_prism.models.build import unwrap
from megatron_prism.parallel import groups, megatron_versions

GANG = GangConfig(precision="fp32")


def main(root: Path) -> None:
    torch.set_num_threads(1)
    standin.install(Path(sys.prefix) / "transformer_engine_python")
    groups.join()
    found = {}
    for name, values in json.loads((root / "models.json").read_text()).items():
        model = read(values, ModelConfig, str)
        with groups.grid(GANG) as grid:
            local, te = (built(model, grid, GANG, side, None) for side in ("local", "te"))
            copy(local[0], te[0])
            found[name] = {side: sampled(chunks, model, grid) for side, chunks in (("local", local), ("te", te))}
    (root / "tokens.json").write_text(json.dumps(found))


@torch.no_grad()
def copy(local: Any, te: Any) -> None:
    """Give the TE layers the local ones' parameters: their norms have other names."""
    theirs = {megatron_versions.weight_name(name): parameter for name, parameter in unwrap(te).named_parameters()}
    for name, parameter in unwrap(local).named_parameters():
        layer, dot, rest = megatron_versions.weight_name(name).rpartition(".layers.")
        number, _, own = rest.partition(".")
        theirs[f"{layer}{dot}{number}.{weights._fused_name(own)}" if dot else rest].copy_(parameter)


def sampled(chunks: list[Any], model: ModelConfig, grid: groups.Groups) -> dict[str, Any]:
    rollouts = Cached(chunks, model, grid).generate([[5, 6, 7, 8], [9, 10]], 2, Sampling(max_tokens=12, temperature=1.0), [1, 2])
    positions = asdict(weights.read(chunks[0], model, grid)[2])
    return {"tokens": [rollout.token_ids.tolist() for rollout in rollouts], "rotary_dtype": str(positions["rotary_dtype"])}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
