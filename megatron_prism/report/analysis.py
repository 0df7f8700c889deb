"""What `prism analyze` found (jobs/analyze.py), as tables for a terminal: a line a component."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NULLS = {
    "changed": "> 1 %",
    "changed_dense_null": "dense null",
    "changed_dense_null_stored": "as stored",
    "changed_shuffled_null": "shuffled",
}
SPECTRA = {
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "share_in_leading": "norm in leading",
    "share_on_principal": "norm on principal",
    "principal_angle_left_max": "largest angle",
    "singular_value_shift_mean": "value shift",
}
RESPONSES = (
    "pass",
    "tokens (quartiles)",
    "cut",
    "neg-LP",
    "right",
    "wrong",
    "wrong - right, same length",
    "solved 0",
    "some",
    "all",
    "steps",
    "format",
    "repeated",
)


def weights(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a component, kind and the total: the change, the share above 1 %, and what its nulls say."""
    has_cosine = "cosine" in result["total"]
    rows = [["component", "delta", "mean of tensors", *NULLS.values(), *(["cosine", "null +-"] if has_cosine else [])]]
    kinds = [(f"all {name}", figures) for name, figures in result["kinds"].items() if name not in result["components"]]
    named = [*result["components"].items(), *kinds, ("total", result["total"])]
    if masters := result.get("masters"):
        named += [("total, fp32 main weights", masters["total"])]
    for name, figures in named:
        shares = [f"{100 * figures[key]['0.01']:.2f} %" for key in NULLS]
        cosines = ["-", "-"] * has_cosine
        if figures.get("cosine") is not None:
            cosines = [f"{figures['cosine']:.3f}", f"{figures['cosine_null_std']:.1g}"]
        deltas = ["-" if figures[key] is None else f"{figures[key]:.3g}" for key in ("delta", "delta_mean_of_tensors")]
        rows.append([name, *deltas, *shares, *cosines])
    yield from _table(rows)


def trajectory(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a checkpoint: the change from the start and from the one before; as stored, and of the optimizer's fp32 main weights."""
    heads = ["delta", *NULLS.values(), "delta to last", "different"]
    has_masters = any(of["masters"] for of in result["checkpoints"].values())
    rows = [["step", *heads, *([*(f"fp32 {head}" for head in heads), "rounding"] if has_masters else [])]]
    for step, of in result["checkpoints"].items():
        cells = _trajectory_cells(of)
        if of["masters"]:
            cells += [*_trajectory_cells(of["masters"]), _number(of["masters"]["rounding"]["delta"])]
        rows.append([step, *cells, *["-"] * (len(rows[0]) - 1 - len(cells))])
    yield from _table(rows)


def _trajectory_cells(of: Mapping[str, Any]) -> list[str]:
    total, last = of["from_base"]["total"], of["from_previous"]["total"]
    shares = [_share(total[key]["0.01"]) for key in NULLS]
    return [_number(total["delta"]), *shares, _number(last["delta"]), _share(last["share_different"])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def spectra(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a component: each figure, and that of its null."""
    rows = [["component", *(column for words in SPECTRA.values() for column in (words, "null"))]]
    for name, figures in result["components"].items():
        values = [figures[prefix + key] for key in SPECTRA for prefix in ("", "null_")]
        rows.append([name, *("-" if value is None else f"{value:.3g}" for value in values)])
    yield from _table(rows)


def responses(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table a task as the paper's Table 15, a line a model; then the flips and the gain by pass rate, from each model to the next."""
    tasks = dict.fromkeys(task for model in result["models"].values() for task in model["tasks"])
    for task in tasks:
        rows = [[task, *RESPONSES]]
        for name, model in result["models"].items():
            if of := model["tasks"].get(task):
                rows.append([name, *_response_cells(of)])
        yield from _table(rows)
        yield ""
        flips = {pair: of[task] for pair, of in result["flips"].items() if task in of}
        yield from _flips(task, flips)


def _response_cells(of: Mapping[str, Any]) -> Iterator[str]:
    certain, tokens, solved = of["neg_logprob"], of["tokens"]["all"], of["solvability"]
    yield _share(of["pass_rate"]["value"], of["pass_rate"]["standard_error"])
    yield f"{tokens['median']:.0f} ({tokens['quartile_1']:.0f}-{tokens['quartile_3']:.0f})"
    yield _share(of["share_cut"])
    yield from (_plain(certain[key]) for key in ("all", "right", "wrong", "wrong_less_right_same_length"))
    yield from (_share(solved[key]) for key in ("none", "some", "all"))
    yield from (_share(of[key]) for key in ("share_with_steps", "share_with_format", "repetition"))


def _flips(task: str, flips: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the flips of a task by majority with their chance, and where along the first model's pass rate the gain lies."""
    rows, edges = [[f"{task}: flips", "0 -> 1", "1 -> 0", "0 -> 1 by half", "chance", "1 -> 0 by half", "chance"]], []
    for pair, of in flips.items():
        if "not_compared" in of:
            yield f"{task}: {pair} not compared: {'; '.join(of['not_compared'])}"
            continue
        halves = (_share(of[f"{way}_by_half"][key]) for way in ("gained", "lost") for key in ("share", "chance"))
        rows.append([pair, _share(of["gained"]), _share(of["lost"]), *halves])
        edges += [
            [
                f"{pair} {name} %",
                _share(edge["share"]),
                _share(edge["gain"]["value"], edge["gain"]["standard_error"]),
                _share(edge["gain_naive"]),
            ]
            for name, edge in of["edge"].items()
            if edge["gain"]["value"] is not None or edge["gain_naive"] is not None
        ]
    if len(rows) > 1:
        yield from _table(rows)
        yield ""
    if edges:
        yield from _table([[f"{task}: gain by pass rate before", "problems", "gain", "not split"], *edges])
        yield ""


def _share(value: float | None, error: float | None = None) -> str:
    spread = "" if error is None else f" +- {100 * error:.1f}"
    return "-" if value is None else f"{100 * value:.1f}{spread} %"


def _plain(mean: Mapping[str, Any]) -> str:
    spread = "" if mean["standard_error"] is None else f" +- {mean['standard_error']:.3f}"
    return "-" if mean["value"] is None else f"{mean['value']:.3f}{spread}"


def landscape(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a point: each task's score and its standard error, and the loss; then what the path and the smaller updates say."""
    tasks = list(result["largest_drop"])
    rows = [["point", "a", "b", *(column for name in tasks for column in (name, "+-")), "loss"]]
    for row in result["points"]:
        scores = [row["tasks"][name].get(key) for name in tasks for key in ("score", "standard_error")]
        shown = ["-" if value is None else f"{value:.3f}" for value in (*scores, row["loss"])]
        is_sum = row["kind"] in ("path", "plane")
        rows.append([row["name"], *(f"{row[key]:.3g}" if is_sum else "-" for key in ("a", "b")), *shown])
    yield from _table(rows)
    for name in tasks:
        fall = result["largest_drop"][name]
        error = "" if fall["standard_error"] is None else f" (+- {fall['standard_error']:.3f})"
        yield f"{name}: never falls along the path" if result["monotonic"][name] else f"{name}: falls by up to {fall['drop']:.3f}{error}"
    for leg, height in result["barrier"].items():
        yield f"loss barrier, {leg.replace('_', ' ')}: {'no held_out task' if height is None else f'{height:.4f}'}"
    for name, kept in result["gain_kept"].items():
        shares = ("-" if share is None else f"{100 * share:.0f} %" for share in kept.values())
        yield f"{name} has of the gain of rl over mid: {', '.join(f'{task} {share}' for task, share in zip(kept, shares, strict=True))}"


def cka(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a pair and distribution: the least alignment of a layer by both forms, and what its nulls say."""
    of_updates = any("null_update" in figures for of_pair in result["pairs"].values() for figures in of_pair.values())
    columns = ["CKA", "layer", "+-", "permuted", "gaussian", "ablated", *(["random update"] if of_updates else [])]
    for form in ("biased", "debiased"):
        rows = [[f"least {form}", "prompts", *columns]]
        for pair, of_pair in result["pairs"].items():
            for name, figures in of_pair.items():
                ablated = list(figures[f"min_{form}_ablated"].values())
                values = [
                    *(figures[f"min_{form}_subsampled"]["std"], figures[f"min_{form}_permutation_null"]["mean"]),
                    *(figures["gaussian_null"][form], ablated[-1] if ablated else None),
                    *([figures["null_update"][f"min_{form}"]] if of_updates else []),
                ]
                shown = ["-" if value is None else f"{value:.4f}" for value in values]
                rows.append([pair, name, f"{figures[f'min_{form}']:.4f}", str(figures[f"min_{form}_layer"]), *shown])
        yield from _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        yield "  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))])
