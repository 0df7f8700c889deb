"""A job that several processes run: this process joins their gang, or starts it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_prism.parallel.launch import Span


def world_size(nproc: int | None) -> int:
    """Return the gang's size: that of the gang this process is in, or the one asked for."""
    from megatron_prism.parallel import launch

    return launch.world_size() if launch.in_gang() else nproc or 1


def become(world_size: int, span: Span | None = None) -> None:
    """Join the gang this process was started in; outside one, start it where several processes are asked for, and exit as it does.

    span: the machines of the gang to start, where they are several.
    """
    from megatron_prism.parallel import launch

    span = span or launch.ALONE
    if span.num_nodes == 1:
        launch.adopt_slurm()
    if span.num_nodes > 1 or (world_size > 1 and not launch.in_gang()):
        code = launch.start_gang(world_size // span.num_nodes, ["-m", "megatron_prism.cli", *sys.argv[1:]], span)
        sys.stdout.flush()
        os._exit(code)  # the gang has said everything


def speaks() -> bool:
    """Say whether this process prints the result: rank 0, or a process that is alone."""
    return os.environ.get("RANK", "0") == "0"


def has_peers() -> bool:
    """Say whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
