"""What a scan for evaluation sets found (jobs/contaminate.py), as a table: a row for each source and set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HEADER = ("source", "benchmark", "side", "hit", "whole", "of", "documents", "containment", "largest")


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the table, without its header: questions hit, those held whole, those looked for, documents that hold one, and the share of
    a question's n-grams that one document holds, in the mean and at most."""
    return [
        (
            row["source"],
            row["benchmark"],
            row["side"],
            f"{row['num_hit']:,}",
            f"{row['num_whole']:,}",
            f"{row['num_searched']:,}",
            f"{row['num_documents_hit']:,}",
            "-" if row["containment"] is None else f"{row['containment']:.2%}",
            f"{row['max_containment']:.0%}",
        )
        for row in result.get("table", ())
    ]


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the result for a terminal: what was looked for, what was read, the table."""
    for one in result["against"]:
        short = (
            f", {one['num_as_a_whole']:,} as a whole, {one['num_too_short']:,} too short"
            if one["num_too_short"] + one["num_as_a_whole"]
            else ""
        )
        yield f"{one['benchmark']} {one['side']}s: {one['num_texts']:,}, {one['num_ngrams']:,} n-grams of {result['ngram']} words{short}"
    for source in result["sources"]:
        if "num_documents" in source:
            bad = f", {source['num_bad_records']:,} records not read" if source["num_bad_records"] else ""
            yield f"{source['source']}: {source['num_documents']:,} documents, {source['num_bytes'] / 1e6:,.1f} MB{bad}"
    if table := rows(result):
        widths = [max(map(len, column)) for column in zip(HEADER, *table, strict=True)]
        for cells in (HEADER, *table):
            padded = [
                cell.ljust(width) if place < 3 else cell.rjust(width) for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            yield "  ".join(padded)
    if "out" in result:
        yield f"out: {result['out']}"
