"""Plan every recipe on every size it is laid out for: `python tools/recipes_table.py` writes the tables in docs/RECIPES.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generated import ROOT, write

from megatron_prism.core.config import RLConfig, TrainConfig
from megatron_prism.core.layers import merge, read_layers
from megatron_prism.core.load import load
from megatron_prism.core.scalars import LAYOUTS
from megatron_prism.jobs import plan
from megatron_prism.planning.layouts import Planned

DOCUMENT, RECIPES = ROOT / "docs" / "RECIPES.md", ROOT / "configs" / "recipes"


def plans() -> list[dict[str, Any]]:
    """Return {"recipe", "world_size", "plan"} of each recipe and size, in order."""
    found = []
    for path in sorted(RECIPES.glob("*/*.yaml")):
        for size in sorted(merge(read_layers(path, ()))[LAYOUTS]):
            kind: type[Planned] = RLConfig if path.stem == "rl" else TrainConfig
            config: Planned = load(path, kind, [f"world_size={size}"])
            found.append({"recipe": f"{path.parent.name}/{path.stem}", "world_size": size, "plan": plan.run(config, plan.Asked())})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return a table of the plans of training, and one of those of reinforcement learning."""
    training, rl = ([entry for entry in found if ("rollout_s" in entry["plan"]) == is_rl] for is_rl in (False, True))
    return "\n".join([*_lines(training), "", *_rl_lines(rl)])


def _rl_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| recipe | GPUs | layout | rows | GiB a GPU | rollout s | log-probs s | training s | hours | H100-hours | hours, all responses full |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for entry in found:
        figures = entry["plan"]
        cells = [
            entry["recipe"],
            str(entry["world_size"]),
            _layout(figures["layout"]),
            str(figures["layout"]["num_rows"]),
            f"{figures['memory_gib_per_gpu_max']:.0f}",
            *(f"{figures[name]:,.0f}" for name in ("rollout_s", "log_probs_s", "training_s", "hours", "gpu_hours", "hours_longest")),
        ]
        yield f"| {' | '.join(cells)} |"


def _lines(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| recipe | GPUs | layout | GiB a GPU | tokens/s/GPU | MFU (causal) | tokens | hours | H100-hours |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for entry in found:
        figures = entry["plan"]
        cells = [
            entry["recipe"],
            str(entry["world_size"]),
            _layout(figures["layout"]),
            f"{figures['memory_gib_per_gpu_max']:.0f}",
            f"{figures['tokens_per_s_per_gpu']:,.0f}",
            f"{figures['mfu_causal']:.0%}",
            f"{figures['tokens'] / 1e9:.1f} B",
            f"{figures['hours']:.1f}",
            f"{figures['gpu_hours']:,.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _layout(layout: Mapping[str, Any]) -> str:
    """Return what is not 1, data parallelism last."""
    sizes = [f"{name.upper()} {layout[name]}" for name in ("tp", "pp", "vpp", "cp", "dp") if layout.get(name, 1) > 1]
    return ", ".join([*sizes, *([f"{layout['recompute']} recomputed"] if layout["recompute"] != "none" else [])])


if __name__ == "__main__":
    write(DOCUMENT, Path(__file__).name, table(plans()))
