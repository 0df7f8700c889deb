"""The planner's memory and step time beside a run's own first steps, on a GPU: a run that is slower than planned says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from megatron_prism.core import log
from megatron_prism.core.config import ModelConfig, TrainConfig
from megatron_prism.models import build, shapes
from megatron_prism.parallel import groups, host
from megatron_prism.parallel.groups import Groups
from megatron_prism.planning import gpus, stage
from megatron_prism.planning.predict import Prediction, predict

WARM_UP, MEASURED = 5, 5  # steps of a start: the first compile kernels and choose algorithms
TOLERANCE = 0.15  # a larger difference is a warning


@dataclass(frozen=True)
class Comparison:
    """A step's time (the median of the measured steps) and the peak memory of the fullest rank, planned and measured."""

    step_s_planned: float
    step_s: float
    memory_gib_planned: float
    memory_gib: float

    @property
    def is_far(self) -> bool:
        """Whether one of the two is further from the plan than TOLERANCE."""
        pairs = ((self.step_s, self.step_s_planned), (self.memory_gib, self.memory_gib_planned))
        return any(abs(measured / planned - 1) > TOLERANCE for measured, planned in pairs)

    def __str__(self) -> str:
        parts = (
            f"{name} {measured:.3g} {unit}, planned {planned:.3g} ({measured / planned - 1:+.0%})"
            for name, unit, measured, planned in (
                ("step", "s", self.step_s, self.step_s_planned),
                ("memory", "GiB", self.memory_gib, self.memory_gib_planned),
            )
        )
        return ";  ".join(parts)


class AgainstPlan:
    """Measures the steps after a start, and compares them with a prediction once. None: there is nothing to compare with, as on a CPU."""

    def __init__(self, prediction: Prediction | None, first_step: int):
        self._prediction, self._first_step = prediction, first_step
        self._seconds: list[float] = []
        self.comparison: Comparison | None = None

    def record(self, step: int, seconds: float) -> None:
        """Add a step's time. After the last measured step compare and log; every rank calls this."""
        if self._prediction is None or self.comparison is not None or step <= self._first_step + WARM_UP:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < MEASURED:
            return
        used_gib, step_s = groups.agree([host.peak_memory_bytes() / 2**30, median(self._seconds)])
        planned = self._prediction
        self.comparison = Comparison(planned.time.step_s, step_s, max(planned.memory_gib), used_gib)
        if torch.distributed.get_rank() == 0:
            log.get().log(30 if self.comparison.is_far else 20, "against the plan: %s", self.comparison)

    def as_values(self) -> dict[str, float] | None:
        """Return the comparison as plain values for the manifest."""
        return None if self.comparison is None else asdict(self.comparison)


def prediction(model: ModelConfig, config: TrainConfig, chunks: Sequence[Any], states: shapes.States, grid: Groups) -> Prediction | None:
    """Return the planner's prediction for a gang, from the model it has built. None on a host: the planner knows GPUs alone.

    states: the chunks' sharded state (checkpoint/sharded.weights). Every rank calls this.
    """
    if not host.has_cuda():
        return None
    letters = stage.letters_of(model, sorted(build.stages(model, config.parallel)[grid.pp_rank]))
    mine = stage.of_sizes(shapes.sizes_of(chunks, states(chunks)), letters, grid.pp_rank == 0, grid.pp_rank == grid.pp - 1, config)
    held = groups.gather((grid.pp_rank, mine))
    stages = [max((each for rank, each in held if rank == number), key=lambda one: one.parameters) for number in range(grid.pp)]
    return predict(stages, model, config, grid.world_size, gpu=gpus.of_device(host.device_name()))
