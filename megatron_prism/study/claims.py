"""Claims judged on the results of a study's stages: pure functions. A figure is a number, or STAGE:KEY.KEY, a place in a stage's result."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from megatron_prism.core.check.study import parts_of
from megatron_prism.core.config import CheckConfig, ClaimConfig
from megatron_prism.core.student import t_quantile

HOLDS, FAILS, NOT_MET, NULL, NOT_MEASURED = "holds", "fails", "prerequisite not met", "no more than its null", "not measured"
RELATIONS = ("above", "below", "near")
Results = Mapping[str, Any]  # a stage's result, by name; of an array, its elements' by index


def judge(claims: Sequence[ClaimConfig], results: Results) -> list[dict[str, Any]]:
    """Return a row for each claim: its words, its state, the figures that it names, and each of its checks."""
    return [_judge(claim, results) for claim in claims]


def _judge(claim: ClaimConfig, results: Results) -> dict[str, Any]:
    checks = [
        _checked(part, check, results)
        for part, listed in (("requires", claim.requires), ("shows", claim.shows), ("null", claim.null))
        for check in listed
    ]
    figures: dict[str, float | None] = {}
    for check in checks:
        figures |= {name: check[f"{key}_number"] for key in ("value", "than") if isinstance(name := check[key], str)}
    return {
        "name": claim.name,
        "says": claim.says,
        "source": claim.source,
        "judged_at": claim.judged_at,
        "note": claim.note,
        "state": _state(checks),
        "figures": figures,
        "checks": checks,
    }


def _checked(part: str, check: CheckConfig, results: Results) -> dict[str, Any]:
    relation, than = next((name, value) for name in RELATIONS if (value := getattr(check, name)) is not None)
    value, bound = figure(check.value, results), figure(than, results)
    holds = None if value is None or bound is None else _holds(value, relation, bound, check.by)
    words = {"part": part, "value": check.value, "relation": relation, "than": than, "by": check.by}
    return {**words, "value_number": value, "than_number": bound, "holds": holds}


def _holds(value: float, relation: str, bound: float, by: float) -> bool:
    if relation == "near":
        return abs(value - bound) < by
    return value - bound > by if relation == "above" else bound - value > by


def _state(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return a claim's state. A part is looked at only where the one before it holds, so that a missing null does not hide a failure."""
    for part, failed in (("requires", NOT_MET), ("shows", FAILS), ("null", NULL)):
        held = [check["holds"] for check in checks if check["part"] == part]
        if False in held:
            return failed
        if None in held:
            return NOT_MEASURED
    return HOLDS


def figure(value: str | float, results: Results) -> float | None:
    """Return a figure's number; None where the stage has no result, or no finite number at that place. true counts 1, false 0."""
    if not isinstance(value, str):
        return float(value)
    stage, keys = parts_of(value)
    place: Any = results.get(stage)
    for key in keys:
        if isinstance(place, Mapping) and key in place:
            place = place[key]
        elif (
            isinstance(place, Sequence)
            and not isinstance(place, str)
            and re.fullmatch(r"-?\d+", key)
            and -len(place) <= int(key) < len(place)
        ):
            place = place[int(key)]
        else:
            return None
    return float(place) if isinstance(place, (int, float)) and math.isfinite(place) else None


def over_seeds(judged: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each claim of several studies of one graph (seeds): the state in each, and the mean and range of each figure.

    judged: the claims of each study, as `judge` or study.json has them. interval_95: Student's t over the studies; None for fewer than two.
    """
    by_name: dict[str, list[Mapping[str, Any] | None]] = {}
    for index, rows in enumerate(judged):
        for row in rows:
            by_name.setdefault(row["name"], [None] * len(judged))[index] = row
    return [_row(rows) for rows in by_name.values()]


def _row(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    first = next(row for row in rows if row is not None)
    states = [NOT_MEASURED if row is None else row["state"] for row in rows]
    names = dict.fromkeys(name for row in rows if row is not None for name in row["figures"])
    figures = {name: _spread([None if row is None else row["figures"].get(name) for row in rows]) for name in names}
    words = {key: first[key] for key in ("name", "says", "source", "judged_at", "note")}
    return {**words, "states": states, "num_holds": states.count(HOLDS), "num_studies": len(rows), "figures": figures}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return {"values", "mean", "min", "max", "interval_95"} of a figure over the studies that have it."""
    there = [value for value in values if value is not None]
    if not there:
        return {"values": list(values), "mean": None, "min": None, "max": None, "interval_95": None}
    mean = math.fsum(there) / len(there)
    return {"values": list(values), "mean": mean, "min": min(there), "max": max(there), "interval_95": _interval(there, mean)}


def _interval(values: Sequence[float], mean: float) -> list[float] | None:
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / freedom / len(values))
    half = spread * t_quantile(0.025, freedom)
    return [mean - half, mean + half]


def lines(rows: Sequence[Mapping[str, Any]], given: Collection[str] = ()) -> Iterator[str]:
    """Yield a table of judged claims: the state, the claim, and each check that decided. Claims without any figure yet are counted in one line.

    given: the stages that have a result. A figure that is not in it has a wrong name, or the stage did not measure it: such a claim is shown.
    """
    begun = [row for row in rows if not row["figures"] or any(_is_known(name, number, given) for name, number in row["figures"].items())]
    for row in begun:
        told = f" ({', '.join(filter(None, (row['source'], row['judged_at'])))})" if row["source"] or row["judged_at"] else ""
        yield f"{row['state']:<22}  {row['name']}: {row['says']}{told}"
        for check in row["checks"]:
            mark = {True: "yes", False: "no", None: "?"}[check["holds"]]
            by = f" by {check['by']:g}" if check["by"] else ""
            yield f"{'':<22}    {mark:<3} {check['part']}: {_said(check, 'value')} {check['relation']} {_said(check, 'than')}{by}"
    if num_left := len(rows) - len(begun):
        yield f"{NOT_MEASURED:<22}  {num_left} claim{'s' if num_left > 1 else ''} whose stages have given nothing yet"


def _is_known(name: str, number: float | None, given: Collection[str]) -> bool:
    return number is not None or parts_of(name)[0] in given


def lines_over(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table of claims over several studies: in how many each holds, else the states, and each figure's mean, range and interval."""
    for row in rows:
        states = "" if row["num_holds"] == row["num_studies"] else f" ({', '.join(row['states'])})"
        yield f"holds in {row['num_holds']} of {row['num_studies']}  {row['name']}: {row['says']}{states}"
        for name, of in row["figures"].items():
            if of["mean"] is None:
                yield f"    {name}: not there"
                continue
            interval = of["interval_95"]
            told = f"95 % of the mean {interval[0]:.4g} to {interval[1]:.4g}" if interval else "of 1 study"
            yield f"    {name}: mean {of['mean']:.4g}, {of['min']:.4g} to {of['max']:.4g}, {told}"


def _said(check: Mapping[str, Any], key: str) -> str:
    name, number = check[key], check[f"{key}_number"]
    told = "not there" if number is None else f"{number:.4g}"
    return f"{name} = {told}" if isinstance(name, str) else told
