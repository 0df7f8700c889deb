"""Python's garbage collector at chosen steps: it stops a rank for a moment, and every other rank waits for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected(interval: int) -> Iterator[Callable[[int], None]]:
    """Within the block, collect garbage only where the yielded function is called for a multiple of `interval` steps: on all ranks at once.

    interval: 0 leaves it to Python. What stands before the block (modules, model, optimizer) is not looked at again.
    """
    if interval == 0 or not gc.isenabled():
        yield lambda step: None
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield lambda step: None if step % interval else _collect()
    finally:
        gc.unfreeze()
        gc.enable()


def _collect() -> None:
    gc.collect()
