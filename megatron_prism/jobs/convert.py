"""`prism convert import|export|verify`: a Hugging Face folder to a Megatron checkpoint, back, and a check that both are the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import convert, folder
from megatron_prism.checkpoint.plan import Plan, plan_export, plan_import, read_config
from megatron_prism.core import log
from megatron_prism.core.check.model import check_split
from megatron_prism.core.config import GangConfig, ParallelConfig, Precision
from megatron_prism.core.errors import Problem, raise_problems

# Math, code, science and prose: the text that verify compares on, if there is a tokenizer.
TEXT = (
    "The area of a circle of radius 3 is 9 pi. Let f(x) = x^2 - 4x + 3; its roots are 1 and 3, since (x - 1)(x - 3) = 0.\n"
    "def mean(values):\n    return sum(values) / len(values)\n\n"
    "Water boils at 100 degrees Celsius at sea level; the mitochondrion makes most of a cell's ATP. Once upon a time there was a river.\n"
)


def run_import(hf: Path, out: Path, dry_run: bool) -> dict[str, Any]:
    """Write `hf` as a Megatron checkpoint at `out`. A dry run checks everything and writes nothing."""
    folder.refuse_existing(out)
    plan = plan_import(hf)
    return _apply(plan, out, dry_run, lambda tick: convert.import_hf(plan, out, tick))


def run_export(ckpt: Path, out: Path, dry_run: bool) -> dict[str, Any]:
    """Write a checkpoint (or the latest of a run) as a Hugging Face folder at `out`. A dry run checks and writes nothing."""
    folder.refuse_existing(out)
    plan, reader = plan_export(ckpt)
    return _apply(plan, out, dry_run, lambda tick: convert.export_hf(plan, reader, out, tick))


def check_verify(hf: Path, ckpt: Path, tp: int, pp: int, world_size: int) -> None:
    """Check a verification's inputs and layout before anything starts.

    Raises: InputError with every problem.
    """
    theirs, ours = plan_import(hf).model, folder.read(ckpt).model
    problems = check_split(ours, tp, pp, "--tp", "--pp")
    if tp * pp != world_size:
        problems.append(Problem("--tp, --pp", f"tp {tp} x pp {pp} on {world_size} processes", "as many processes as tp x pp"))
    differing = [field for field, value in vars(theirs).items() if getattr(ours, field) != value]
    problems += [
        Problem(f"{ckpt}: model.{field}", str(getattr(ours, field)), f"{getattr(theirs, field)}, as in {hf}") for field in differing
    ]
    raise_problems(problems)


def run_verify(
    hf: Path, ckpt: Path, tokens: int, precision: Precision, tolerance: float | None, tp: int, pp: int, seed: int
) -> dict[str, Any]:
    """Return the difference between a checkpoint's logits and transformers' on the same tokens. Every rank of the gang calls this.

    `passed` says whether the largest difference, as a share of the largest logit, is within the tolerance, and whether both rotate by the
    same frequencies, as does a reader of transformers 4's kind where config.json speaks to it (checkpoint/rotary.py).
    """
    from megatron_prism.checkpoint import parity, rotary
    from megatron_prism.parallel import environment
    from megatron_prism.parallel.groups import gang, hand_to_first

    limit = parity.TOLERANCE[precision] if tolerance is None else tolerance
    model = folder.read(ckpt).model
    vocab_size = model.vocab_size
    ids, kind = parity.tokens_of(hf, TEXT, tokens, vocab_size, seed)
    config = GangConfig(parallel=ParallelConfig(tp=tp, pp=pp), precision=precision, seed=seed)
    environment.set_variables(config)  # TF32 in place of fp32 would be beyond the tolerance
    with gang(config) as groups:
        chunks = parity.checkpoint_model(ckpt, config, groups)
        ours = rotary.of_checkpoint(chunks[0], model)
        ours_SV = hand_to_first(parity.checkpoint_logits(chunks, vocab_size, ids, groups), (len(ids), vocab_size), groups)
        del chunks  # before transformers' model takes as much memory
        if ours_SV is None:
            return {}
        theirs = parity.hf_model(hf, precision)
        turned = rotary.compare(ours, theirs, read_config(hf), model, str(hf / "config.json"))
        comparison = parity.compare(ours_SV, parity.hf_logits(theirs, hf, ids))
    if turned["rotary_passed"] and turned["rotary_v4_reading"] != "same":
        log.get().warning("%s has no keys of transformers 4, whose readers would rotate otherwise: %s", hf, turned["rotary_v4_reading"])
    return {
        "hf": str(hf),
        "ckpt": str(ckpt),
        "tokens": kind,
        "precision": precision,
        **vars(comparison),
        "tolerance": limit,
        **turned,
        "passed": comparison.relative_difference <= limit and turned["rotary_passed"],
    }


def _apply(plan: Plan, out: Path, dry_run: bool, apply: Callable[[convert.Tick], None]) -> dict[str, Any]:
    summary = {**plan.summary(), "out": str(out), "written": not dry_run}
    log.get().info(
        "%s: %s parameters in %d tensors, %.2f GB", plan.root, f"{summary['parameters']:,}", summary["tensors"], summary["bytes"] / 1e9
    )
    for note in plan.notes:
        log.get().warning("%s: %s", plan.root, note)
    if not dry_run:
        with log.ticking(len(plan.rules)) as tick:
            apply(tick)
    return summary
