"""`prism analyze responses`: length, certainty of right and wrong answers, solvability, flips beyond chance, and where the gain lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, Value
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Material, Result
from megatron_prism.report.sections.common import Paper, absent, analyses, from_paper, mean_at, seeds, slug

ID, TITLE = "responses", "Responses"
TEXT = (
    "The negative log-probability is a token's, in the mean over responses. A problem that is right half of the time flips between two draws of one model: chance is what two draws "
    "of the first model would flip. The gain by the first model's pass rate is measured with one half of its responses for the bin and the other for the gain, so that nothing "
    "regresses to the mean."
)
NATS = "nats a token"


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the paper's Table 15 with its errors, solvability beside its null, flips and the gain by pass rate."""
    groups = analyses(materials, "responses")
    if not groups:
        return absent(ID, TITLE, "No result of prism analyze responses was given.")
    tables: list[Table] = [
        Table(
            "responses",
            "Pass rate, length and certainty (the paper's Table 15)",
            _CORRECTNESS,
            tuple(row for group in groups for row in _correctness(group)),
            num_keys=2,
        ),
        Table(
            "responses_solvability",
            "Problems of which none, some or all responses are right, beside problems of one and the same chance",
            _SOLVED,
            tuple(row for group in groups for row in _solved(group)),
            num_keys=2,
        ),
        Table(
            "responses_flips",
            "Problems won and lost from a model to the next",
            _FLIPS,
            tuple(row for group in groups for row in _flips(group)),
            num_keys=2,
        ),
        Table(
            "responses_edge",
            "Where the gain lies: by the first model's pass rate on a problem",
            _EDGES,
            tuple(row for group in groups for row in _edges(group)),
            num_keys=3,
        ),
    ]
    used: set[str] = set()
    figures = [figure for group in groups for figure in _figures(group, used)]
    blocks: tuple[Table | Figure, ...] = (
        *(table for table in tables if table.rows),
        *figures,
        *from_paper(paper, "t15_correctness", "responses_paper"),
    )
    return Section(ID, TITLE, tuple(filter(None, (TEXT, seeds(materials)))), blocks)


_CORRECTNESS = (
    Column("task"),
    Column("model"),
    Column("pass rate", "%", ".1f"),
    Column("median length", "tokens", ".0f"),
    Column("neg. log-prob., all", NATS, ".3f"),
    Column("right", NATS, ".3f"),
    Column("wrong", NATS, ".3f"),
    Column("wrong less right, same problem", NATS, ".3f"),
    Column("with format", "%", ".1f"),
    Column("with steps", "%", ".1f"),
    Column("cut", "%", ".1f"),
    Column("responses"),
)
_SOLVED = (
    Column("task"),
    Column("model"),
    Column("none", "%", ".1f"),
    Column("some", "%", ".1f"),
    Column("all", "%", ".1f"),
    Column("null: none", "%", ".1f"),
    Column("null: all", "%", ".1f"),
    Column("problems"),
    Column("samples"),
)
_FLIPS = (
    Column("task"),
    Column("models"),
    Column("won", "%", ".1f"),
    Column("lost", "%", ".1f"),
    Column("won by half", "%", ".1f"),
    Column("chance", "%", ".1f"),
    Column("lost by half", "%", ".1f"),
    Column("chance of loss", "%", ".1f"),
    Column("lost beyond chance", "points", ".1f", signed=True),
    Column("problems"),
)
_EDGES = (
    Column("task"),
    Column("models"),
    Column("pass rate before"),
    Column("problems", "%", ".1f"),
    Column("gain", "points", ".1f", signed=True),
    Column("gain, naive", "points", ".1f", signed=True),
    Column("share of the whole gain", "%", ".0f"),
)


def _with_error(group: Sequence[Result], *keys: str, factor: float = 1.0) -> Measured | None:
    """Return a mean with the interval of its own error, of several studies with that of their spread."""
    return mean_at(group, *keys, "value", error=(*keys, "standard_error"), count=(*keys, "num"), factor=factor)


def _tasks(group: Sequence[Result]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for model, of in group[0].values["models"].items():
        for task in of["tasks"]:
            yield task, model, ("models", model, "tasks", task)


def _correctness(group: Sequence[Result]) -> Iterator[tuple[Value, ...]]:
    for task, model, at in _tasks(group):
        certainty = (_with_error(group, *at, "neg_logprob", key) for key in ("all", "right", "wrong", "wrong_less_right_same_problem"))
        shares = (mean_at(group, *at, key, factor=100) for key in ("share_with_format", "share_with_steps", "share_cut"))
        count = group[0].values["models"][model]["tasks"][task]["num_responses"]
        yield (
            task,
            model,
            _with_error(group, *at, "pass_rate", factor=100),
            mean_at(group, *at, "tokens", "all", "median"),
            *certainty,
            *shares,
            count,
        )


def _solved(group: Sequence[Result]) -> Iterator[tuple[Value, ...]]:
    for task, model, at in _tasks(group):
        of = group[0].values["models"][model]["tasks"][task]["solvability"]
        last = str(of["num_samples"])
        keys = (("none",), ("some",), ("all",), ("null", "0"), ("null", last))
        yield (task, model, *(mean_at(group, *at, "solvability", *key, factor=100) for key in keys), of["num_problems"], of["num_samples"])


def _changes(group: Sequence[Result]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for pair, of in group[0].values["flips"].items():
        for task, one in of.items():
            if "not_compared" not in one:
                yield task, pair, ("flips", pair, task)


def _flips(group: Sequence[Result]) -> Iterator[tuple[Value, ...]]:
    keys = (
        ("gained",),
        ("lost",),
        ("gained_by_half", "share"),
        ("gained_by_half", "chance"),
        ("lost_by_half", "share"),
        ("lost_by_half", "chance"),
    )
    for task, pair, at in _changes(group):
        beyond = (*at, "lost_by_half")
        error = mean_at(group, *beyond, "beyond_chance", error=(*beyond, "standard_error"), factor=100)
        count = group[0].values["flips"][pair][task]["num_problems"]
        yield (task, pair.replace("->", " -> "), *(mean_at(group, *at, *key, factor=100) for key in keys), error, count)


def _edges(group: Sequence[Result]) -> Iterator[tuple[Value, ...]]:
    for task, pair, at in _changes(group):
        for name in group[0].values["flips"][pair][task]["edge"]:
            of = (*at, "edge", name)
            naive, whole, share = (mean_at(group, *of, key, factor=100) for key in ("gain_naive", "share_of_gain", "share"))
            yield (task, pair.replace("->", " -> "), name, share, _with_error(group, *of, "gain", factor=100), naive, whole)


def _figures(group: Sequence[Result], used: set[str]) -> Iterator[Figure]:
    """Yield, for each task, pass@k by model, and the gain by the pass rate before."""
    tasks = list(dict.fromkeys(task for task, _, _ in _tasks(group)))
    for task in tasks:
        series = []
        for model, of in group[0].values["models"].items():
            ks = list(of["tasks"].get(task, {}).get("pass_at", {}))
            values = tuple(mean_at(group, "models", model, "tasks", task, "pass_at", k, factor=100) for k in ks)
            series += [Series(model, tuple(map(float, ks)), values)] if len(ks) > 1 else []
        if series:
            yield draw.lines(
                f"pass_at_{slug(task, used)}", f"{task}: pass@k", Column("k", "responses"), Column("pass@k", "%", ".1f"), series
            )
    for task, pair, at in _changes(group):
        names = list(group[0].values["flips"][pair][task]["edge"])
        values = tuple(_with_error(group, *at, "edge", name, "gain", factor=100) for name in names)
        if sum(value is not None for value in values) > 1:
            title = f"{task}, {pair.replace('->', ' -> ')}: gain by the pass rate before"
            yield draw.dots(
                f"edge_{slug(f'{task}-{pair}', used)}",
                title,
                Column("gain", "points", ".1f", signed=True),
                names,
                [Series("gain", (), values)],
                "pass rate before",
            )
