"""Cost: the time of each stage, and the tokens and rank-hours of each run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report.document import Column, Measured, Section, Table, Value
from megatron_prism.report.material import Material, Run
from megatron_prism.report.sections.common import Paper, absent, over_studies, seeds

ID, TITLE = "cost", "Cost"
TEXT = (
    "Wall-clock and processor seconds are of all starts of a stage. Rank-hours are the steps' time times the ranks: GPU-hours where a rank has a GPU, else hours of a process. "
    "RL's tokens are those that were trained on, and those that were sampled; where not every step is logged, a logged one stands for those since the one before."
)


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the cost of stages and of runs."""
    blocks = [*_stages(materials), *_runs(materials)]
    if not blocks:
        return absent(ID, TITLE, "Neither a study nor a run was given.")
    return Section(ID, TITLE, tuple(filter(None, (TEXT, seeds(materials)))), tuple(blocks))


def _stages(materials: Sequence[Material]) -> Iterator[Table]:
    def read(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
        for stage in material.stages:
            for key, value in (("seconds", stage.seconds), ("cpu_s", stage.cpu_s)):
                if value is not None:
                    yield (stage.name, key), Measured(value)

    studies = [one for one in materials if one.stages]
    if studies:
        totals = over_studies(studies, lambda one: _total(one))
        values = over_studies(studies, read) | totals
        names = [*dict.fromkeys(stage.name for one in studies for stage in one.stages), "all stages"]
        rows = tuple((name, values.get((name, "seconds")), values.get((name, "cpu_s"))) for name in names)
        yield Table(
            "cost_stages",
            "Time of each stage",
            (Column("stage"), Column("wall clock", "s", ",.1f"), Column("processor", "s", ",.1f")),
            rows,
        )


def _total(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
    for key in ("seconds", "cpu_s"):
        known = [value for stage in material.stages if (value := getattr(stage, key)) is not None]
        if known:
            yield ("all stages", key), Measured(sum(known))


def _runs(materials: Sequence[Material]) -> Iterator[Table]:
    keys = ("tokens", "sampled", "ranks", "hours", "speed")

    def read(material: Material) -> Iterator[tuple[tuple[str, str], Measured]]:
        for run in material.runs:
            for key, value in zip(keys, _of_run(run), strict=True):
                if value is not None:
                    yield (run.name, key), Measured(value)

    values = over_studies(materials, read)
    if values:
        names = list(dict.fromkeys(name for name, _ in values))
        columns = (
            Column("model"),
            Column("trained", "tokens", ",.0f"),
            Column("sampled", "tokens", ",.0f"),
            Column("ranks", "", ".0f"),
            Column("time", "rank-hours", ".3g"),
            Column("speed", "tokens/s", ",.0f"),
        )
        rows: list[tuple[Value, ...]] = [(name, *(values.get((name, key)) for key in keys)) for name in names]
        yield Table("cost_runs", "Tokens and time of each run", columns, tuple(rows))


def _of_run(run: Run) -> tuple[float | None, float | None, float, float, float | None]:
    """Return the tokens trained on and sampled, the ranks, the rank-hours, and the tokens a second of the median step."""
    speeds = sorted(float(record["tokens_per_s"]) for record in run.records if record.get("tokens_per_s") is not None)
    speed = speeds[len(speeds) // 2] if speeds else None
    hours = run.seconds * run.world_size / 3600
    if not run.is_rl:
        of_step = run.plan.get("tokens_per_step")
        return (None if of_step is None else float(of_step) * run.step, None, run.world_size, hours, speed)
    sampled = (run.total("response_tokens") or 0.0) * float(run.plan["responses_per_step"])
    return run.total("trained_tokens"), sampled, run.world_size, hours, speed
