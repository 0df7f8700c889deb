"""What scores and losses say of the points of a landscape: a fall or a rise along the path, a barrier of the loss, what smaller updates keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_prism.analysis.landscape import Point

AMBIGUITIES = {
    "path": "the paper names 11 points, and not where they lie: 7 from base to mid and 4 more to rl are read from its picture",
    "plane": "the paper names a 5 x 5 plane, and not where it lies: centred at mid, from -0.3 to 1.3 toward rl and toward base, is read from its "
    "picture; in Equation 3 that is b, and 1 - a",
    "monotonic": "no score along the path is below an earlier one; largest_drop says by how much one is. Its standard error takes the two scores for "
    "independent, though they are of the same questions",
    "gain_kept": "the share of rl's gain over mid; null where that gain is not above twice its standard error",
    "barrier": "the largest excess of the held-out loss over the straight line between its values at a leg's ends (arXiv 1912.05671 takes their mean)",
}


def figures(points: Sequence[Point], scored: Mapping[str, Any]) -> dict[str, Any]:
    """Return each point's figures, and what those of the path say. scored: by a point's name, what its evaluation came to."""
    rows: list[dict[str, Any]] = [
        {
            "name": point.name,
            "kind": point.kind,
            "a": point.a,
            "b": point.b,
            **({"keep_largest": point.keep} if point.keep is not None else {}),
            "tasks": {
                name: {key: part[key] for key in ("score", "standard_error", "num_questions") if key in part}
                for name, part in scored[point.name]["tasks"].items()
                if part["score"] is not None
            },
            "loss": _loss(scored[point.name]["tasks"]),
        }
        for point in points
    ]
    along = [row for row, point in zip(rows, points, strict=True) if point.kind == "path"]
    by_name = {row["name"]: row for row in rows}
    tasks = [name for name in rows[0]["tasks"] if all(name in row["tasks"] for row in rows)]  # without one whose grader failed throughout
    drops = {name: _largest_drop(along, name) for name in tasks}
    return {
        "points": rows,
        "monotonic": {name: drop["drop"] == 0 for name, drop in drops.items()},
        "largest_drop": drops,
        "barrier": _barriers(along, by_name),
        "gain_kept": {
            row["name"]: {name: _gain_kept(row, by_name, name) for name in tasks}
            for row, point in zip(rows, points, strict=True)
            if point.kind in ("keep_largest", "null")
        },
    }


def _loss(tasks: Mapping[str, Any]) -> float | None:
    """Return the mean held-out loss a token, of all sources of all tasks that have one."""
    of_sources = [loss for part in tasks.values() for loss in part.get("losses", {}).values()]
    num_tokens = sum(loss["num_tokens"] for loss in of_sources)
    return sum(loss["loss"] * loss["num_tokens"] for loss in of_sources) / num_tokens if num_tokens else None


def _largest_drop(path: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    first, last = (path[place] for place in largest_drop([row["tasks"][name]["score"] for row in path]))
    drop = first["tasks"][name]["score"] - last["tasks"][name]["score"]
    return {"drop": drop, "from": first["name"], "to": last["name"], "standard_error": _error(first, last, name)}


def _error(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float | None:
    """Return the standard error of a difference of scores, taken for independent."""
    errors = [row["tasks"][name].get("standard_error") for row in (one, other)]
    return None if None in errors else math.hypot(*errors)


def _barriers(path: Sequence[Mapping[str, Any]], by_name: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the loss barrier of each leg of the path; None without a held-out loss."""
    at_mid = path.index(by_name["mid"])
    legs = {"base_to_mid": path[: at_mid + 1], "mid_to_rl": path[at_mid:]}
    if any(row["loss"] is None for row in path):
        return dict.fromkeys(legs)
    return {name: barrier([row["loss"] for row in leg]) for name, leg in legs.items()}


def _gain_kept(row: Mapping[str, Any], by_name: Mapping[str, Any], name: str) -> float | None:
    """Return the share of rl's gain over mid that a point has; None where that gain is not above twice its standard error."""
    mid, rl, own = (each["tasks"][name]["score"] for each in (by_name["mid"], by_name["rl"], row))
    return (own - mid) / (rl - mid) if rl - mid > 2 * (_error(by_name["mid"], by_name["rl"], name) or 0.0) else None


def barrier(losses: Sequence[float]) -> float:
    """Return the largest excess of a loss along a straight line over the line between its ends; 0 where none is above it.

    losses: at evenly spaced points. Source: linear mode connectivity, arXiv 1912.05671, whose error barrier takes the mean of the ends.
    """
    line = np.linspace(losses[0], losses[-1], len(losses))
    return float(max(0.0, (np.asarray(losses) - line).max()))


def largest_drop(scores: Sequence[float]) -> tuple[int, int]:
    """Return (from, to), the points between which a score falls most along a path: any point and any later one; equal ones where it never falls."""
    before = np.maximum.accumulate(scores)
    to = int((before - np.asarray(scores)).argmax())
    return int(np.asarray(scores[: to + 1]).argmax()), to
