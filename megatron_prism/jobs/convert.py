"""`prism convert import|export`: a Hugging Face folder to a Megatron checkpoint, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import convert, folder
from megatron_prism.core import log


def run_import(hf: Path, out: Path, dry_run: bool) -> dict[str, Any]:
    """Write `hf` as a Megatron checkpoint at `out`; a dry run checks everything and writes nothing."""
    folder.refuse_existing(out)
    plan = convert.plan_import(hf)
    return _apply(plan, out, dry_run, lambda tick: convert.import_hf(plan, out, tick))


def run_export(ckpt: Path, out: Path, dry_run: bool) -> dict[str, Any]:
    """Write a checkpoint (or the latest of a run) as a Hugging Face folder at `out`; a dry run checks and writes nothing."""
    folder.refuse_existing(out)
    plan, reader = convert.plan_export(ckpt)
    return _apply(plan, out, dry_run, lambda tick: convert.export_hf(plan, reader, out, tick))


def _apply(plan: convert.Plan, out: Path, dry_run: bool, apply: Callable[[convert.Tick], None]) -> dict[str, Any]:
    summary = {**plan.summary(), "out": str(out), "written": not dry_run}
    log.get().info("%s: %s parameters in %d tensors, %.2f GB", plan.root, f"{summary['parameters']:,}", summary["tensors"], summary["bytes"] / 1e9)
    if not dry_run:
        with _ticking(len(plan.rules)) as tick:
            apply(tick)
    return summary


@contextmanager
def _ticking(total: int) -> Iterator[convert.Tick]:
    """Show a progress bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tensors", total=total)
        yield lambda: bar.advance(task)
