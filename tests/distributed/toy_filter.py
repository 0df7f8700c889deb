"""The filter on a toy, on the ranks of a test's gang: killed at a named point or after some time, or unbroken."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from megatron_prism.core import resumable
from megatron_prism.core.config import FilterConfig
from megatron_prism.core.load import build
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.jobs import rl_filter
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import passes, rollout
from tests.distributed import toy_rl
from tests.distributed.toy_rl import is_right, sampler_off


class Toy(toy_rl.Toy):
    """As the run's toy; and each response to a problem whose gold is `fault` is a fault."""

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        """Return each item's outcome."""
        outcomes = {item.id: "fault" if item.gold == "fault" else "right" if is_right(item.response) else "wrong" for item in items}
        return {id: Graded(id=id, outcome=outcome) for id, outcome in outcomes.items()}  # type: ignore[arg-type]


def config(out: str, prompts: str, checkpoint: str, **changes: Any) -> FilterConfig:
    values = {
        "out": out,
        "prompts": prompts,
        "precision": "fp32",
        "init": {"checkpoint": checkpoint},
        "rollout": {"num_samples": 4, "max_tokens": 8, "num_rows": 8},
        "shard_prompts": 5,
        **changes,
    }
    return build(values, FilterConfig, str)


def die(by: str = "SIGKILL") -> None:
    os.kill(os.getpid(), signal.Signals[by])


POINTS: dict[str, tuple[Any, str, int, bool, int]] = {
    # a function, how often it is called before the call at which the process is killed, whether after that call, and the shards there then
    "described": (resumable, "write_json", 0, True, 0),
    "sampled": (rollout, "grade", 2, False, 2),
    "graded": (rollout, "agreed", 2, True, 2),
    "written": (passes.Folder, "write", 2, True, 3),
    "counted": (passes.Folder, "finish", 0, False, 5),
    "joined": (passes, "sha256_file", 0, False, 5),
    "sealed": (passes, "write_json", 0, True, 5),
    "removed": (passes.shutil, "rmtree", 0, True, 0),
}


@contextmanager
def killed(point: str | None, delay_s: float | None, by: str) -> Iterator[None]:
    """Within the block this process is killed at a point, or so long after it began to sample."""
    if delay_s is not None:
        kept_run = rl_filter.filter.run

        def timed(*args: Any) -> None:
            threading.Timer(delay_s, die).start()
            kept_run(*args)

        with mock.patch.object(rl_filter.filter, "run", timed):
            yield
        return
    if point is None:
        yield
        return
    owner, name, after, is_after, _ = POINTS[point]
    kept: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = kept(*args, **kwargs) if is_after or calls <= after else None
        if calls == after + 1:
            die(by)
        return result

    with mock.patch.object(owner, name, counted):
        yield


def run(
    groups: Groups,
    point: str | None = None,
    delay_s: float | None = None,
    by: str = "SIGKILL",
    off: bool = False,
    grid: dict[str, Any] | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Filter the toy on a gang; return the result. by: the signal at that point. off: the engine says another log-probability than the model."""
    given = config(parallel=grid or {}, **values)
    with mock.patch.object(rl_filter.grader, "Grader", Toy), killed(point, delay_s, by), sampler_off(0 if off else None):
        resolved = rl_filter.resolve(given, groups.world_size)
        return rl_filter.filter_in_gang(replace(resolved, config=given), groups)
