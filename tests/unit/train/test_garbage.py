"""Garbage is collected at the steps that were asked for, and Python's own collector comes back."""

from __future__ import annotations

import gc
import weakref

from megatron_prism.train import garbage


class Cycle:
    """An object that only the garbage collector removes."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_goes_at_the_chosen_steps_only() -> None:
    with garbage.collected(3) as collect:
        left = []
        for step in range(1, 8):
            left.append(weakref.ref(Cycle()))
            [[] for _ in range(2000)]  # Python's own collector would run here
            collect(step)
            assert sum(each() is not None for each in left) == step % 3, step
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_without_an_interval_python_collects() -> None:
    with garbage.collected(0) as collect:
        assert gc.isenabled()
        collect(3)
