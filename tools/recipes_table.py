"""Plan every recipe on every size it is laid out for: `python tools/recipes_table.py` writes the tables in docs/RECIPES.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generated import ROOT, write

from megatron_prism.core.config import TrainConfig
from megatron_prism.core.layers import merge, read_layers
from megatron_prism.core.load import load
from megatron_prism.core.scalars import LAYOUTS
from megatron_prism.jobs import plan

DOCUMENT, RECIPES = ROOT / "docs" / "RECIPES.md", ROOT / "configs" / "recipes"


def plans() -> list[dict[str, Any]]:
    """Return {"recipe", "world_size", "plan"} of each recipe and size, in order."""
    found = []
    for path in sorted(RECIPES.glob("*/*.yaml")):
        for size in sorted(merge(read_layers(path, ()))[LAYOUTS]):
            config = load(path, TrainConfig, [f"world_size={size}"])
            found.append({"recipe": f"{path.parent.name}/{path.stem}", "world_size": size, "plan": plan.run(config, usd_per_gpu_hour=0.0)})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return a table of plans."""
    return "\n".join(_lines(found))


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
