"""Plan every recipe on every size it is laid out for: `python tools/recipes_table.py` writes the tables in docs/RECIPES.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generated import ROOT, write

from megatron_prism.core.config import EvaluateConfig, PresetConfig, RLConfig, TrainConfig
from megatron_prism.core.layers import merge, read_layers
from megatron_prism.core.load import load
from megatron_prism.core.scalars import LAYOUTS
from megatron_prism.jobs import plan, plan_sampling
from megatron_prism.planning.layouts import Planned

DOCUMENT, RECIPES = ROOT / "docs" / "RECIPES.md", ROOT / "configs" / "recipes"
EVALUATION = "eval"  # of a recipe's name: what it samples is planned, and no training
CONTEXTS = (34_816, 131_072)  # a response of 32,768 tokens behind a prompt of 2,048, and RULER's longest prompt


def plans() -> list[dict[str, Any]]:
    """Return {"recipe", "world_size", "plan"} of each recipe and size, in order."""
    found = []
    for path in sorted(path for path in RECIPES.glob("*/*.yaml") if path.stem != EVALUATION):
        for size in sorted(merge(read_layers(path, ()))[LAYOUTS]):
            kind: type[Planned] = RLConfig if path.stem == "rl" else TrainConfig
            config: Planned = load(path, kind, [f"world_size={size}"])
            found.append({"recipe": f"{path.parent.name}/{path.stem}", "world_size": size, "plan": plan.run(config, plan.Asked())})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return a table of the plans of training, one of those of reinforcement learning, and one of the evaluations."""
    training, rl = ([entry for entry in found if ("rollout_s" in entry["plan"]) == is_rl] for is_rl in (False, True))
    return "\n".join([*_lines(training), "", *_rl_lines(rl), "", *_evaluation_lines(evaluations())])


def evaluations() -> list[dict[str, Any]]:
    """Return {"recipe", "world_size", "num_rows", "plan"} of each evaluation recipe and size. num_rows: by the tokens of a prompt and its response."""
    described = []
    for path in sorted(RECIPES.glob(f"*/{EVALUATION}.yaml")):
        model = load(ROOT / "configs" / "models" / f"{path.parent.name}.yaml", PresetConfig).model
        for size in sorted(merge(read_layers(path, ()))[LAYOUTS]):
            config = load(path, EvaluateConfig, [f"world_size={size}"])
            planned = plan_sampling.run(config, plan.Asked(), model)
            rows = {tokens: plan_sampling.num_rows(config, tokens) for tokens in CONTEXTS}
            described.append({"recipe": f"{path.parent.name}/{path.stem}", "world_size": size, "num_rows": rows, "plan": planned})
    return described


def _evaluation_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| recipe | GPUs | layout | {' | '.join(f'rows at {tokens:,} tokens' for tokens in CONTEXTS)} | GiB a GPU | hours | H100-hours | hours, all responses full |"
    yield f"|---|---|---|{'---|' * len(CONTEXTS)}---|---|---|---|"
    for entry in found:
        planned, rows = entry["plan"], " | ".join(str(entry["num_rows"][tokens]) for tokens in CONTEXTS)
        said = f"{planned['memory_gib_per_gpu_max']:.0f} | {planned['hours']:.1f} | {planned['gpu_hours']:.0f} | {planned['hours_longest']:.0f}"
        yield f"| {entry['recipe']} | {entry['world_size']} | {_layout({**planned['layout'], 'recompute': 'none'})} | {rows} | {said} |"


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
