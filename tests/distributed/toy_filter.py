"""The filter on a toy, on the ranks of a test's gang: killed at a named point or after some time, or unbroken."""

from __future__ import annotations

from collections.abc import Sequence
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
from tests.distributed.killing import Point, killed
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


POINTS = {
    "described": Point(resumable, "write_json", 0, True),
    "sampled": Point(rollout, "grade", 2, False),
    "graded": Point(rollout, "agreed", 2, True),
    "written": Point(passes.Folder, "write", 2, True),
    "counted": Point(passes.Folder, "finish", 0, False),
    "joined": Point(passes, "sha256_file", 0, False),
    "sealed": Point(passes, "write_json", 0, True),
    "removed": Point(passes.shutil, "rmtree", 0, True),
}
SHARDS = {"described": 0, "sampled": 2, "graded": 2, "written": 3, "counted": 5, "joined": 5, "sealed": 5, "removed": 0}  # there then


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
    fate = killed(POINTS, point, (rl_filter.filter, "run"), delay_s, by)
    with mock.patch.object(rl_filter.grader, "Grader", Toy), fate, sampler_off(0 if off else None):
        resolved = rl_filter.resolve(given, groups.world_size)
        return rl_filter.filter_in_gang(replace(resolved, config=given), groups)
