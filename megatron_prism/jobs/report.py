"""`prism report RUN...`: what studies, runs, evaluations and analyses came to, as one HTML page, as Markdown, and as CSV and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core.errors import raise_problems
from megatron_prism.report import build, paper, read, write

PAPER = Path(__file__).parents[2] / "configs" / "studies" / "paper"  # in a checkout; an installed package has none


def run(places: Sequence[Path], out: Path, title: str | None, paper_tables: Path | None) -> dict[str, Any]:
    """Write the report of the places into `out`, and return its files, and which sections have something to show.

    Raises: InputError where a place holds nothing that a report knows, or `out` holds what no report wrote. BackendMissing without matplotlib.
    EnvironmentFault where the folder cannot be written.
    """
    raise_problems(write.unfit(out))
    materials = read.read(places)
    tables = paper.read(paper_tables or PAPER) if paper_tables or PAPER.is_dir() else {}
    document = build.build(materials, tables, title or f"Report: {', '.join(one.name for one in materials)}")
    files = write.write(document, out)
    return {
        "kind": "report",
        "out": str(out),
        "page": str(files[0]),
        "sections": [section.id for section in document.sections if not section.absent],
        "absent": {section.id: section.absent for section in document.sections if section.absent},
        "num_tables": len(document.tables),
        "num_figures": len(document.figures),
        "damaged": [line for one in materials for line in one.told],
    }
