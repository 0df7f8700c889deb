"""Jobs that run on several processes: this process joins their gang, or starts it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.cli.options import finish
from megatron_prism.launch import slurm

if TYPE_CHECKING:
    from megatron_prism.parallel.launch import Span


def run(
    job: Callable[[], Any],
    kind: type,
    config: Path | None,
    overrides: Sequence[str],
    nproc: int | None,
    dry_run: bool,
    json: Path | None,
    shown: Callable[[dict[str, Any]], Iterable[str]] | None = None,
) -> dict[str, Any]:
    """Run a job that is resolved and then run on a gang, as jobs/train.py is. kind: its config. job: imports it, and torch with it.

    config: None where the overrides are all of it. shown: the result's lines; None: a line a value. Returns the result, on every rank; of a dry run nothing.
    """
    from megatron_prism.core.load import load, placed
    from megatron_prism.parallel import environment, launch

    launch.heed_signals_while_starting()
    settings: Any = load(config, kind, overrides)  # before the job imports torch
    module = job()
    if nproc:
        launch.check_nproc(nproc)
    span = launch.slurm_span() if nproc else launch.ALONE
    size = world_size(nproc or (settings.world_size if dry_run else None), span)
    with placed(config, kind, overrides):
        resolved = module.resolve(settings, size)
    if dry_run:
        finish(resolved.figures, json)
        return {}
    environment.set_variables(settings)  # before any rank starts: a process reads some of them at its start
    become(size, span)
    result: dict[str, Any] = module.run(resolved)
    if speaks():
        for line in shown(result) if shown else ():
            sys.stdout.write(f"{line}\n")
        finish(result, json, quiet=shown is not None)
    return result


def world_size(nproc: int | None, span: Span | None = None) -> int:
    """Return the size of the gang that this process is in or is to start: `nproc` ranks on each of a span's machines, if there are several."""
    from megatron_prism.parallel import launch

    if nproc and span is not None and span.num_nodes > 1:  # each machine's task is no rank: it starts its ranks
        return nproc * span.num_nodes
    return launch.world_size() if launch.in_gang() else nproc or 1


def become(world_size: int, span: Span | None = None) -> None:
    """Join the gang that this process was started in. Outside a gang, start one if several ranks are requested, and exit with its code.

    span: the machines of the gang to start, if there are several.
    """
    from megatron_prism.parallel import launch

    span = span or launch.ALONE
    if span.num_nodes == 1:
        launch.adopt_slurm()
    if span.num_nodes > 1 or (world_size > 1 and not launch.in_gang()):
        code = launch.start_gang(world_size // span.num_nodes, ["-m", "megatron_prism.cli", *sys.argv[1:]], span)
        slurm.note_exit_code(code)
        sys.stdout.flush()
        os._exit(code)  # the gang has printed everything


def speaks() -> bool:
    """Say whether this process prints the result: rank 0, or a process without a gang."""
    return os.environ.get("RANK", "0") == "0"


def has_peers() -> bool:
    """Say whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
