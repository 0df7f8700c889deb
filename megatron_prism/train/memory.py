"""The fullest device's memory at logged steps, and a word where an allocator ran out of it: the run goes on, and is slow in silence."""

from __future__ import annotations

import torch

from megatron_prism.core import log
from megatron_prism.parallel import groups, host


class Memory:
    """Looks at the devices of a gang at logged steps. Retries before the first look, such as those of loading, are not counted."""

    def __init__(self) -> None:
        self._num_retries = host.num_alloc_retries()

    def metrics(self, step: int) -> dict[str, float]:
        """Return memory_gib, the most that a rank's device has held since the start, and alloc_retries since the last look where there were any.

        A retry is an allocation that found no room: the allocator waited for the device, gave back what it kept, and asked again. Every rank
        calls this. Nothing on a host. Source: torch.cuda.memory_stats, num_alloc_retries.
        """
        if not host.has_cuda():
            return {}
        before, self._num_retries = self._num_retries, host.num_alloc_retries()
        gib, num_retries = groups.agree([host.peak_memory_bytes() / 2**30, float(self._num_retries - before)])
        if not num_retries:
            return {"memory_gib": gib}
        if torch.distributed.get_rank() == 0:
            log.get().warning(
                "step %d: a device ran out of memory %d times since the last logged step and gave its cache back (alloc_retries): each time the "
                "rank, and all others with it, waits; a smaller batch.micro_size, recompute or logits_chunk_tokens leaves room",
                step,
                num_retries,
            )
        return {"memory_gib": gib, "alloc_retries": num_retries}
