"""`prism analyze cka`: how alike two models represent the same prompts, layer by layer, beside every null that near 1 must beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Section, Table, Value, number_of
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Material, Result
from megatron_prism.report.sections.common import Paper, absent, analyses, from_paper, mean_at, seeds, slug

ID, TITLE = "cka", "Representations (CKA)"
TEXT = (
    "The biased form is the paper's: of wide, independent representations it is near 1 already (the Gaussian null). The debiased form is near 0 there. The nulls: the prompts of one "
    "side in another order, two independent Gaussian matrices of the same shapes, and the first model beside itself after a random update of the other's norm. "
    "Ablated: without the directions of largest variance, which one outlier channel can fill."
)
FORMS = ("biased", "debiased")
CKA = Column("CKA", "", ".4f")


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return the least alignment of each pair on each kind of input, and a figure of its layers."""
    groups = analyses(materials, "cka")
    if not groups:
        return absent(ID, TITLE, "No result of prism analyze cka was given.")
    used: set[str] = set()
    rows = [row for group in groups for row in _rows(group)]
    nums = list(dict.fromkeys(num for group in groups for num in _ablated(group)))
    ablated = (Column(f"ablated, {num} direction{'s' * (num != '1')}", "", ".4f") for num in nums)
    nulls = (Column("prompts permuted: mean", "", ".4f"), Column("prompts permuted: most", "", ".4f"), Column("Gaussian null", "", ".4f"))
    keys = (Column("models"), Column("inputs"), Column("form"))
    columns = (
        *keys,
        Column("least CKA", "", ".4f"),
        Column("at layer"),
        Column("spread of subsamples", "std", ".2g"),
        *nulls,
        Column("random update", "", ".4f"),
        *ablated,
    )
    table = Table(
        "cka",
        "The layer where two models are least alike",
        columns,
        tuple((*row[0], *(row[1].get(num) for num in nums)) for row in rows),
        _prompts(groups),
        3,
    )
    figures = [figure for group in groups for figure in _figures(group, used)]
    tables = [table for name in ("cka_minimum", "cka_base_mid") for table in from_paper(paper, name, f"cka_paper_{name}")]
    return Section(ID, TITLE, tuple(filter(None, (TEXT, seeds(materials)))), (table, *figures, *tables))


def _prompts(groups: Sequence[Sequence[Result]]) -> str:
    of = {name: one["num_prompts"] for group in groups for name, one in group[0].values["distributions"].items()}
    return "; ".join(f"{name}: n {count} prompts" for name, count in of.items())


def _ablated(group: Sequence[Result]) -> list[str]:
    return [num for of in group[0].values["pairs"].values() for one in of.values() for num in one["min_biased_ablated"]]


def _rows(group: Sequence[Result]) -> Iterator[tuple[tuple[Value, ...], dict[str, Value]]]:
    """Yield for each pair, input and form the cells of a row, and those of its ablations by their number."""
    for pair, of in group[0].values["pairs"].items():
        for inputs, one in of.items():
            for form in FORMS:
                at = [mean_at(group, "pairs", pair, inputs, *keys) for keys in _keys(form)]
                layer = mean_at(group, "pairs", pair, inputs, f"min_{form}_layer")
                ablated: dict[str, Value] = {
                    num: mean_at(group, "pairs", pair, inputs, f"min_{form}_ablated", num) for num in one[f"min_{form}_ablated"]
                }
                shown = None if layer is None else int(layer.value) if layer.low in (None, layer.high) else f"{layer.value:.1f} (mean)"
                yield (pair.replace("|", " | "), inputs, form, at[0], shown, *at[1:]), ablated


def _keys(form: str) -> list[tuple[str, ...]]:
    permuted = f"min_{form}_permutation_null"
    return [
        (f"min_{form}",),
        (f"min_{form}_subsampled", "std"),
        (permuted, "mean"),
        (permuted, "max"),
        ("gaussian_null", form),
        ("null_update", f"min_{form}"),
    ]


def _figures(group: Sequence[Result], used: set[str]) -> Iterator[Figure]:
    for pair, of in group[0].values["pairs"].items():
        for inputs, one in of.items():
            places = [int(layer["layer"]) for layer in one["layers"]]
            by_series: dict[str, list[tuple[str | int, ...]]] = {
                "biased": [("layers", place, "biased") for place in range(len(places))],
                "debiased": [("layers", place, "debiased") for place in range(len(places))],
                "biased, permuted": [("layers", place, "permutation_null_biased", "mean") for place in range(len(places))],
                "biased, random update": [("null_update", "layers", place, "biased") for place in range(len(places))],
            }
            series = [
                Series(name, tuple(map(float, places)), tuple(mean_at(group, "pairs", pair, inputs, *key) for key in keys), "," in name)
                for name, keys in by_series.items()
            ]
            series = [line for line in series if any(number_of(value) is not None for value in line.y)]
            title = f"{pair.replace('|', ' | ')} on {inputs}: CKA by layer (0: the embedding)"
            yield draw.lines(f"cka_{slug(f'{pair}-{inputs}', used)}", title, Column("layer"), CKA, series)
