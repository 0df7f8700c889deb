"""`prism analyze landscape`: scores and losses of the models between base, mid-trained and RL: the path, the plane, and the largest changes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, Value, number_of
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Material, Result
from megatron_prism.report.sections.common import Paper, absent, analyses, from_paper, mean_at, seeds, slug

ID, TITLE = "landscape", "Landscape"
TEXT = (
    "A model of the path is base + a (mid - base) + b (RL - mid): a goes from 0 to 1, then b. All are scored by evaluation's own scorer. The null of the largest changes is a Gaussian update "
    "of RL's norm in each tensor."
)
PLACE = Column("place (0 base, 1 mid, 2 RL)", "", ".3g")
SCORE, LOSS = Column("score", "%", ".1f"), Column("held-out loss", "nats a token", ".4g")


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return, for each landscape, its path, plane and what the largest changes keep."""
    groups = analyses(materials, "landscape")
    if not groups:
        return absent(ID, TITLE, "No result of prism analyze landscape was given.")
    used: set[str] = set()
    blocks: list[Table | Figure] = []
    for group in groups:
        id = slug(group[0].name, used)
        blocks += [_path_table(group, id), *_kept(group, id), *_path_figures(group, id), *_planes(group, id)]
    said = {key: str(words) for group in groups for key, words in group[0].values["ambiguities"].items()}
    texts = tuple(
        filter(None, (TEXT, seeds(materials), *(f"{key.replace('_', ' ').capitalize()}: {words}." for key, words in said.items())))
    )
    return Section(ID, TITLE, texts, (*blocks, *from_paper(paper, "landscape_1d", "landscape_paper")))


def _points(group: Sequence[Result], *kinds: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the points of some kinds, each with its place in the result: studies of one config have the same points."""
    return [(place, point) for place, point in enumerate(group[0].values["points"]) if point["kind"] in kinds]


def _tasks(group: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(task for point in group[0].values["points"] for task in point["tasks"]))


def _score(group: Sequence[Result], place: int, task: str) -> Measured | None:
    at = ("points", place, "tasks", task)
    return mean_at(group, *at, "score", error=(*at, "standard_error"), count=(*at, "num_questions"), factor=100)


def _path_table(group: Sequence[Result], id: str) -> Table:
    rows: list[tuple[Value, ...]] = []
    for task in _tasks(group):
        at = ("largest_drop", task)
        drop = mean_at(group, *at, "drop", error=(*at, "standard_error"), factor=100)
        flags = [bool(result.values["monotonic"][task]) for result in group if task in result.values["monotonic"]]
        if not flags:  # a task that some point has no score of
            continue
        said = ("yes" if flags[0] else "no") if len(flags) == 1 else f"{flags.count(True)} of {len(flags)}"
        ends = [
            next((_score(group, place, task) for place, point in _points(group, "path") if point["name"] == name), None)
            for name in ("base", "mid", "rl")
        ]
        rows.append((task, *ends, said, drop))
    barriers = {leg: mean_at(group, "barrier", leg) for leg in ("base_to_mid", "mid_to_rl")}
    asked = {task: of.get("num_questions") for _, point in _points(group, "path") for task, of in point["tasks"].items()}
    sizes = [f"{task}: n {count} questions." for task, count in asked.items() if count is not None]
    known = [f"{leg.replace('_', ' ')}: {LOSS.shown(value)} nats a token" for leg, value in barriers.items() if value is not None]
    columns = (
        Column("task"),
        *(Column(name, "%", ".1f") for name in ("base", "mid", "RL")),
        Column("monotonic"),
        Column("largest drop", "points", ".1f"),
    )
    return Table(
        f"landscape_{id}",
        f"{group[0].name}: the path",
        columns,
        tuple(rows),
        " ".join((*sizes, *([f"Loss barriers: {'; '.join(known)}."] if known else []))),
    )


def _kept(group: Sequence[Result], id: str) -> Iterator[Table]:
    """Yield what each share of RL's largest changes keeps of its gain, beside the Gaussian nulls."""
    tasks, rows = _tasks(group), []
    for place, point in _points(group, "keep_largest", "null"):
        name = (
            f"largest {100 * point['keep_largest']:g} % of the changes"
            if "keep_largest" in point
            else f"Gaussian update {str(point['name']).rpartition('_')[2]}"
        )
        gains = [mean_at(group, "gain_kept", point["name"], task, factor=100) for task in tasks]
        rows.append((name, *(cell for task, gain in zip(tasks, gains, strict=True) for cell in (_score(group, place, task), gain))))
    columns = (
        Column("mid with"),
        *(column for task in tasks for column in (Column(task, "%", ".1f"), Column(f"{task}: gain kept", "%", ".0f"))),
    )
    if rows:
        yield Table(f"landscape_{id}_kept", f"{group[0].name}: what part of RL's update makes its gain", columns, tuple(rows))


def _path_figures(group: Sequence[Result], id: str) -> Iterator[Figure]:
    path = _points(group, "path")
    xs = tuple(float(point["a"]) + float(point["b"]) for _, point in path)
    series = [Series(task, xs, tuple(_score(group, place, task) for place, _ in path)) for task in _tasks(group)]
    if series:
        yield draw.lines(f"landscape_{id}_path", f"{group[0].name}: score from base over mid to RL", PLACE, SCORE, series)
    losses = tuple(mean_at(group, "points", place, "loss") for place, _ in path)
    if any(value is not None for value in losses):
        yield draw.lines(
            f"landscape_{id}_loss", f"{group[0].name}: held-out loss from base over mid to RL", PLACE, LOSS, [Series("loss", xs, losses)]
        )


def _planes(group: Sequence[Result], id: str) -> Iterator[Figure]:
    """Yield a plane a task: toward RL to the right, toward base upwards, mid at 0, 0."""
    plane = _points(group, "plane")
    right, up = (
        sorted({round(value, 6) for value in values})
        for values in ([float(p["b"]) for _, p in plane], [1 - float(p["a"]) for _, p in plane])
    )
    by_place = {(round(1 - float(point["a"]), 6), round(float(point["b"]), 6)): place for place, point in plane}
    used: set[str] = set()
    for task in _tasks(group) if plane else ():
        cells = [[_score(group, by_place[y, x], task) if (y, x) in by_place else None for x in right] for y in up]
        if any(number_of(value) is not None for row in cells for value in row):
            title = f"{group[0].name}, {task}: score on the plane around mid"
            yield draw.plane(
                f"landscape_{id}_{slug(task, used)}",
                title,
                Column("toward RL", "", ".3g"),
                Column("toward base", "", ".3g"),
                SCORE,
                right,
                up,
                cells,
            )
