"""Training curves: loss, learning rate, gradient norm of mid-training; reward, length and KL of RL. Over seeds: the mean and its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, Value
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Material, Run
from megatron_prism.report.sections.common import Paper, absent, over_studies, seeds, slug

ID, TITLE = "training", "Training"
MAX_POINTS = 120  # of a curve
MID = {
    "loss": Column("loss", "nats a token", ".4g"),
    "lr": Column("learning rate", "", ".3g"),
    "grad_norm": Column("gradient norm", "", ".3g"),
}
RL = {
    "reward": Column("mean reward", "", ".3g"),
    "response_tokens": Column("response length", "tokens", ".4g"),
    "kl": Column("KL to the reference", "nats a token", ".3g"),
    "entropy": Column("entropy", "nats a token", ".3g"),
    "grad_norm": Column("gradient norm", "", ".3g"),
    "truncated": Column("cut responses", "share", ".3g"),
}


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the curves and how far each run came."""
    runs = [run for one in materials for run in one.runs]
    if not runs:
        return absent(ID, TITLE, "No run was given.")
    figures = [*_curves(materials, False, MID, "mid"), *_validations(materials), *_curves(materials, True, RL, "rl")]
    return Section(ID, TITLE, tuple(filter(None, [seeds(materials)])), (_table(materials), *figures))


def _table(materials: Sequence[Material]) -> Table:
    """Return a row a model, with the steps of its run in each study."""
    runs = {(run.name, run.is_rl): run for one in materials for run in one.runs}
    by_study = [{(run.name, run.is_rl): run for run in one.runs} for one in materials]
    steps = [Column("step" if len(materials) == 1 else one.name) for one in materials]
    columns = (Column("model"), Column("kind"), Column("parameters"), *steps, Column("state"))
    rows = []
    for key, run in runs.items():
        own = [of.get(key) for of in by_study]
        have = ["finished" if one and one.step >= one.steps else "not finished" for one in own]
        state = have[0] if len(set(have)) == 1 else f"{have.count('finished')} of {len(have)} finished"
        shown = [None if one is None else f"{one.step:,} of {one.steps:,}" for one in own]
        rows.append((run.name, "RL" if run.is_rl else "training", run.plan.get("parameters"), *shown, state))
    return Table("training_runs", "Runs, and how far each came", columns, tuple(rows))


def _curves(materials: Sequence[Material], is_rl: bool, metrics: dict[str, Column], prefix: str) -> Iterator[Figure]:
    names = list(dict.fromkeys(run.name for one in materials for run in one.runs if run.is_rl is is_rl))
    for metric, column in metrics.items():
        values = over_studies(materials, lambda one, metric=metric: _points(one.runs, is_rl, metric))  # type: ignore[misc]
        series = [_series(name, {step: value for (of, step), value in values.items() if of == name}) for name in names]
        series = [one for one in series if one.x]
        if series:
            yield draw.lines(
                f"{prefix}_{metric}", f"{'RL' if is_rl else 'Training'}: {column.name} by step", Column("step"), column, series
            )


def _points(runs: Sequence[Run], is_rl: bool, metric: str) -> Iterator[tuple[tuple[str, int], Measured]]:
    for run in runs:
        if run.is_rl is is_rl:
            known = [(int(record["step"]), record[metric]) for record in run.records if isinstance(record.get(metric), int | float)]
            stride = -(-len(known) // MAX_POINTS) if known else 1
            yield from (((run.name, step), Measured(float(value))) for step, value in known[::-1][::stride][::-1])


def _series(name: str, values: dict[int, Measured]) -> Series:
    steps = sorted(values)
    ys: tuple[Value, ...] = tuple(values[step] for step in steps)
    return Series(name, tuple(map(float, steps)), ys)


def _validations(materials: Sequence[Material]) -> Iterator[Figure]:
    """Yield a figure a kind of validation: the held-out loss by source, RL's pass@1 by domain."""
    kinds = {
        "valid_loss/": ("valid_loss", Column("held-out loss", "nats a token", ".4g")),
        "/pass_at_1": ("valid_pass", Column("held-out pass@1", "share", ".3g")),
    }
    used: set[str] = set()
    for mark, (prefix, column) in kinds.items():
        for name in dict.fromkeys(run.name for one in materials for run in one.runs):
            values = over_studies(materials, lambda one, name=name, mark=mark: _validated(one.runs, name, mark))  # type: ignore[misc]
            sources = list(dict.fromkeys(source for source, _ in values))
            series = [_series(source, {step: value for (of, step), value in values.items() if of == source}) for source in sources]
            if any(len(one.x) > 1 for one in series):
                yield draw.lines(f"{prefix}_{slug(name, used)}", f"{name}: {column.name} by step", Column("step"), column, series)


def _validated(runs: Sequence[Run], name: str, mark: str) -> Iterator[tuple[tuple[str, int], Measured]]:
    for run in runs:
        for line in run.validations if run.name == name else ():
            for key, value in line.items():
                if mark in key and isinstance(value, int | float):
                    yield (key.replace(mark, "").removeprefix("valid/"), int(line["step"])), Measured(float(value))
