"""Hold the planner against published rows (bench/published.yaml): `python tools/planner_table.py` writes the table in docs/PLANNER.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from generated import ROOT, write

from megatron_prism.core.config import BatchConfig, DataConfig, FP8Config, ModelConfig, ParallelConfig, RecomputeConfig, TrainConfig
from megatron_prism.core.load import build
from megatron_prism.jobs import plan
from megatron_prism.planning.predict import Prediction, predict
from megatron_prism.planning.stage import Stage

DOCUMENT = ROOT / "docs" / "PLANNER.md"


@dataclass(frozen=True)
class Row:
    """A published row beside its prediction. Errors are shares of the published value; of FLOPs None where no tokens/s were published."""

    facts: Mapping[str, Any]
    published_tokens_s: float
    found: Prediction

    @property
    def is_fitted(self) -> bool:
        return "fit" in self.facts

    @property
    def flops_error(self) -> float | None:
        if "tokens_s" not in self.facts:
            return None
        return getattr(self.found.flops, self.facts["convention"]) * self.facts["tokens_s"] / (self.facts["tflops"] * 1e12) - 1

    @property
    def rate_error(self) -> float:
        return self.found.tokens_per_s_per_gpu / self.published_tokens_s - 1


def rows() -> list[Row]:
    """Return every published row with the planner's prediction of it."""
    published = yaml.safe_load((ROOT / "bench" / "published.yaml").read_text(encoding="utf-8"))
    return [_row(facts, published["models"][facts["model"]], published["attention"][facts["release"][:2]]) for facts in published["rows"]]


def _row(facts: Mapping[str, Any], sizes: Mapping[str, Any], attention: float) -> Row:
    model = build({"family": "llama", "max_position_embeddings": facts["seq"], **sizes}, ModelConfig, str)
    recompute = RecomputeConfig(granularity="full", num_layers=facts["recompute"]) if "recompute" in facts else RecomputeConfig()
    config = TrainConfig(
        run_dir=Path("."),
        steps=1,
        data=DataConfig(prepared=Path("."), seq_length=facts["seq"]),
        fp8=FP8Config(),
        recompute=recompute,
        batch=BatchConfig(global_size=facts["global"], micro_size=facts["micro"]),
        parallel=ParallelConfig(
            tp=facts["tp"],
            pp=facts["pp"],
            cp=facts["cp"],
            vpp=facts.get("vpp"),
            sequence_parallel=facts["tp"] > 1,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    )
    stages = plan.derived(model, config)
    if layers := facts.get("stages"):
        stages = [_resized(stage, count) for stage, count in zip(stages, layers, strict=True)]
    found = predict(stages, model, config, facts["gpus"], attention)
    rate = facts.get("tokens_s") or facts["tflops"] * 1e12 / getattr(found.flops, facts["convention"])
    return Row(facts, rate, found)


def _resized(stage: Stage, num_layers: int) -> Stage:
    """Return a dense stage with another number of layers."""
    layers = len(stage.letters) // 2
    share = num_layers / layers
    moved = {name: round(getattr(stage, name) * share) for name in ("matrices", "trainable_matrices", "fp8")}
    more = moved["matrices"] - stage.matrices
    return replace(stage, letters="*-" * num_layers, parameters=stage.parameters + more, trainable=stage.trainable + more, **moved)


def table(found: list[Row]) -> str:
    """Return the table of rows, and what it comes to."""
    return "\n".join(_lines(found))


def _lines(found: list[Row]) -> Iterator[str]:
    yield "| model | release | GPUs | tokens | TP/PP/CP/VP | FLOPs a token | published tokens/s/GPU | predicted | error | |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in found:
        facts = row.facts
        flops = "-" if row.flops_error is None else f"{row.flops_error:+.1%}"
        grid = "/".join(str(facts.get(name, 1)) for name in ("tp", "pp", "cp", "vpp"))
        kind = f"fitted: {facts['fit']}" if row.is_fitted else "held out"
        rates = f"{row.published_tokens_s:,.0f} | {row.found.tokens_per_s_per_gpu:,.0f} | {row.rate_error:+.1%}"
        yield f"| {facts['model']} | {facts['release']} | {facts['gpus']} | {facts['seq']:,} | {grid} | {flops} | {rates} | {kind} |"
    held = [abs(row.rate_error) for row in found if not row.is_fitted]
    flops_errors = [abs(row.flops_error) for row in found if row.flops_error is not None]
    yield ""
    yield (
        f"Held out: {sum(error <= 0.1 for error in held)} of {len(held)} rows within 10%, mean error {sum(held) / len(held):.1%}, largest {max(held):.1%}. "
        f"FLOPs a token: largest error {max(flops_errors):.1%}."
    )


if __name__ == "__main__":
    write(DOCUMENT, Path(__file__).name, table(rows()))
