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


def weights(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a component, kind and the total: the change, the share above 1 %, and what its nulls say."""
    has_cosine = "cosine" in result["total"]
    rows = [["component", "delta", "mean of tensors", *NULLS.values(), *(["cosine", "null +-"] if has_cosine else [])]]
    for name, figures in [*result["components"].items(), *result["kinds"].items(), ("total", result["total"])]:
        shares = [f"{100 * figures[key]['0.01']:.2f} %" for key in NULLS]
        cosines = [f"{figures['cosine']:.3f}", f"{figures['cosine_null_std']:.1g}"] if has_cosine else []
        deltas = ["-" if figures[key] is None else f"{figures[key]:.3g}" for key in ("delta", "delta_mean_of_tensors")]
        rows.append([name, *deltas, *shares, *cosines])
    yield from _table(rows)


def spectra(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a component: each figure, and that of its null."""
    rows = [["component", *(column for words in SPECTRA.values() for column in (words, "null"))]]
    for name, figures in result["components"].items():
        values = [figures[prefix + key] for key in SPECTRA for prefix in ("", "null_")]
        rows.append([name, *("-" if value is None else f"{value:.3g}" for value in values)])
    yield from _table(rows)


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


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        yield "  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))])
