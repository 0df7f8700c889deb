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
FILES = (PAGE, TEXT, TABLES, FIGURES)


def unfit(out: Path) -> list[Problem]:
    """Return why a report cannot be written to a folder: it is a file, or holds what no report wrote."""
    if not out.exists():
        return []
    if not out.is_dir():
        return [Problem("--out", f"{out}, a file", "a folder")]
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))  # hidden: what a report that was killed left
    others = [name for name in names if name not in FILES]
    if not others and (not names or (out / PAGE).is_file()):
        return []
    return [Problem("--out", f"{out}, which holds {', '.join((others or names)[:3])}", "a new folder, or an earlier report's")]


def write(document: Document, out: Path) -> list[Path]:
    """Write a report in place of an earlier one, and return its files' paths, the page first. Raises: InputError, EnvironmentFault."""
    if problems := unfit(out):
        raise InputError(problems)
    staged = out / f".report.{os.getpid()}.tmp"
    with disk.writing(out):
        try:
            _write_all(document, staged)
            for name in FILES:  # the page first: a folder that has it is known as a report's, whatever ends this between two of them
                if (out / name).is_dir():
                    shutil.rmtree(out / name)
                (staged / name).replace(out / name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return [out / name for name in FILES]


def _write_all(document: Document, folder: Path) -> None:
    for name in (TABLES, FIGURES):
        (folder / name).mkdir(parents=True)
    for table in document.tables:
        (folder / TABLES / f"{table.id}.csv").write_text(as_csv(table), encoding="utf-8")
    for figure in document.figures:
        (folder / FIGURES / f"{figure.id}.svg").write_text(figure.svg, encoding="utf-8")
        (folder / FIGURES / f"{figure.id}.png").write_bytes(figure.png)
    write_text(folder / TEXT, markdown(document))
    write_text(folder / PAGE, page(document))
