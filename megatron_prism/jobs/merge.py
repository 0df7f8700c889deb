"""`prism merge`: models of one architecture become one Hugging Face folder."""

from __future__ import annotations

from typing import Any

from megatron_prism.core import log
from megatron_prism.core.config import MergeConfig
from megatron_prism.merge.plan import plan
from megatron_prism.merge.write import write
from megatron_prism.parallel import allocator


def run(config: MergeConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Write the merge of a config's models, and return its figures. A dry run checks all but the weights' values, and writes nothing."""
    planned = plan(config)
    summary = {**planned.summary(), "notes": list(planned.notes), "out": str(config.out), "written": not dry_run}
    log.get().info(
        "%s: %s parameters in %d tensors, %.2f GB", config.out, f"{summary['parameters']:,}", summary["tensors"], summary["bytes"] / 1e9
    )
    for note in planned.notes:
        log.get().warning("%s", note)
    if not dry_run:
        allocator.keep_freed_memory()
        with log.ticking(len(planned.targets)) as tick:
            write(planned, tick)
    return summary
