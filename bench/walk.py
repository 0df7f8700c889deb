"""The walk through a run of 26.2 billion tokens, sequence by sequence, stopped and begun again: what is skipped, what repeated, what it costs.

Run: python bench/walk.py [--steps N] [--resumes N] [--seed N]
No text: the sources are the paper's token counts (Table 1), its Math + Code + Science weights, its 25,000 steps of 128 x 8,192 tokens.
A resume is a new walk at a random step, which knows nothing but its config. Half of them change the number of data-parallel ranks.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import tracemalloc
from typing import Any

import numpy as np

from megatron_prism.core.config import BatchConfig
from megatron_prism.data.walk import Stream, Walk

SEQ_LENGTH, GLOBAL_SIZE = 8192, 128
# name: (weight in percent, billions of tokens), the paper's Table 1
SOURCES = {
    "megamath-web-pro": (20, 14.73),
    "starcoder2": (13.75, 432.73),
    "refinecode": (13.75, 186.44),
    "nemotron-pt-v1-math": (10, 35.93),
    "opencodereasoning-2": (10, 1.12),
    "openthoughts3-science": (7.75, 0.73),
    "mot-math": (7, 0.60),
    "chat": (5, 0.91),
    "dclm-edu": (5, 111.46),
    "mot-science": (4.75, 0.42),
    "mot-code": (3, 1.18),
}


def a_walk(seed: int, scale: int = 1) -> Walk:
    """Return the walk; `scale` makes every source that many times longer."""
    return Walk(tuple(Stream(name, weight, int(tokens * 1e9) * scale) for name, (weight, tokens) in SOURCES.items()), SEQ_LENGTH, seed)


def read(walk: Walk, step: int, dp: int, batch: BatchConfig, counted: list[np.ndarray]) -> None:
    """Read one step on all ranks, as data/loader.batches deals it out, and count each chunk that is read."""
    per_rank = batch.global_size // dp
    for rank in range(dp):
        for sequence in range(step * batch.global_size + rank * per_rank, step * batch.global_size + (rank + 1) * per_rank):
            source, epoch, offset = walk.place(sequence)
            counted[source][(epoch * walk.streams[source].num_tokens + offset) // SEQ_LENGTH] += 1


def measure(steps: int, resumes: int, seed: int) -> dict[str, Any]:
    """Walk all steps once, in pieces, and count."""
    draw, batch, walk = random.Random(seed), BatchConfig(global_size=GLOBAL_SIZE), a_walk(seed)
    counts = walk.counts(steps * GLOBAL_SIZE)
    # room for the epoch that each source ends in: its chunks come in an order of their own
    chunks = [
        -(-((count * SEQ_LENGTH // stream.num_tokens) + 1) * stream.num_tokens // SEQ_LENGTH)
        for count, stream in zip(counts, walk.streams, strict=True)
    ]
    found = [np.zeros(size, np.uint8) for size in chunks]
    ends = [*sorted(draw.sample(range(1, steps), resumes)), steps]
    start = time.process_time()
    first = 0
    for end in ends:
        walk, dp = a_walk(seed), draw.choice((1, 2, 8, 64))
        for step in range(first, end):
            read(walk, step, dp, batch, found)
        first = end
    cpu_s = time.process_time() - start
    whole = [
        -(-(count * SEQ_LENGTH // stream.num_tokens) * stream.num_tokens // SEQ_LENGTH)
        for count, stream in zip(counts, walk.streams, strict=True)
    ]
    return {
        "bench": "walk",
        "steps": steps,
        "tokens": steps * GLOBAL_SIZE * SEQ_LENGTH,
        "resumes": resumes,
        "seed": seed,
        "read": int(sum(part.sum() for part in found)),
        "planned": sum(counts),
        "repeated": int(sum((part > 1).sum() for part in found)),
        "skipped_in_whole_epochs": int(sum((part[:size] == 0).sum() for part, size in zip(found, whole, strict=True))),
        "cpu_s": cpu_s,
        "cpu_us_a_sequence": cpu_s / (steps * GLOBAL_SIZE) * 1e6,
        "peak_kib": {str(scale): peak_kib(scale, steps) for scale in (1, 1000)},
    }


def peak_kib(scale: int, steps: int) -> float:
    """Return the most memory that a walk holds over its first and last steps, with sources `scale` times as long."""
    tracemalloc.start()
    walk = a_walk(0, scale)
    for sequence in (*range(GLOBAL_SIZE), *range((steps - 1) * GLOBAL_SIZE * scale, (steps - 1) * GLOBAL_SIZE * scale + GLOBAL_SIZE)):
        walk.place(sequence)
    peak = tracemalloc.get_traced_memory()[1] / 1024
    tracemalloc.stop()
    return peak


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25_000)
    parser.add_argument("--resumes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1234)
    result = measure(**vars(parser.parse_args()))
    for key, value in result.items():
        print(
            f"{key:<26}{value:,.1f}"
            if isinstance(value, float)
            else f"{key:<26}{value:,}"
            if isinstance(value, int)
            else f"{key:<26}{value}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
