"""The checks as a table in Markdown, under the machine and the versions that they ran with."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from typing import Any

PACKAGES = (
    "torch",
    "transformer-engine",
    "megatron-core",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
    "apex",
    "triton",
    "transformers",
)
WORDS = {True: "holds", False: "**fails**", None: "left out"}


def describe() -> dict[str, str]:
    """Return the date, the device and the versions."""
    import torch

    from megatron_prism.parallel import cudnn

    device, count = ("cpu", 0)
    if torch.cuda.is_available():
        device, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device if count < 2 else f"{count} x {device}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "cudnn": cudnn.version() or "none",
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def table(facts: dict[str, str], lines: list[dict[str, Any]]) -> str:
    """Return the Markdown."""
    rows = [
        f"| {line['part']} | {line['check']} | {WORDS[line['ok']]} | {_words(line['figures'])} | {line['seconds']:.0f} |" for line in lines
    ]
    head = ["  ".join(f"{name} {value}" for name, value in facts.items()), "", "| part | check | | figures | s |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _words(figures: dict[str, Any]) -> str:
    """Return figures as words; a cell of a table is one line, and a bar would end it."""
    text = ", ".join(f"{name} {value}" for name, value in figures.items())
    return " ".join(text.split()).replace("|", "/")[:400]
