"""The files of a report: report.html, which is whole by itself, report.md, tables/ as CSV, figures/ as PNG and SVG."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import write_text
from megatron_prism.report.document import Document
from megatron_prism.report.markdown import markdown
from megatron_prism.report.page import as_csv, page

PAGE, TEXT, TABLES, FIGURES = "report.html", "report.md", "tables", "figures"


def unfit(out: Path) -> list[Problem]:
    """Return why a report cannot be written to a folder: it is a file, or holds what no report wrote."""
    if not out.exists():
        return []
    if not out.is_dir():
        return [Problem("--out", f"{out}, a file", "a folder")]
    others = sorted(path.name for path in out.iterdir() if path.name not in (PAGE, TEXT, TABLES, FIGURES) and not path.name.startswith("."))
    ours = not any(out.iterdir()) or (out / PAGE).is_file()
    return (
        []
        if ours and not others
        else [Problem("--out", f"{out}, which holds {', '.join(others[:3]) or TABLES}", "a new folder, or an earlier report's")]
    )


def write(document: Document, out: Path) -> list[Path]:
    """Write a report in place of an earlier one, and return its files' paths, the page first. Raises: InputError, EnvironmentFault."""
    if problems := unfit(out):
        raise InputError(problems)
    with disk.writing(out):
        for name, folder in ((TABLES, out / TABLES), (FIGURES, out / FIGURES)):
            temporary = out / f".{name}.{os.getpid()}.tmp"
            temporary.mkdir(parents=True)
            if name == TABLES:
                for table in document.tables:
                    (temporary / f"{table.id}.csv").write_text(as_csv(table), encoding="utf-8")
            else:
                for figure in document.figures:
                    (temporary / f"{figure.id}.svg").write_text(figure.svg, encoding="utf-8")
                    (temporary / f"{figure.id}.png").write_bytes(figure.png)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        write_text(out / TEXT, markdown(document))
        write_text(out / PAGE, page(document))
    return [out / PAGE, out / TEXT, out / TABLES, out / FIGURES]
