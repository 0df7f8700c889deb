"""A job's result as lines of text for standard output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield one line per value, and one line per entry of a list."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield f"{key}: {'  '.join(f'{name} {_plain(part)}' for name, part in value.items())}"
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{key}:"
            yield from (f"  {'  '.join(f'{name} {_plain(part)}' for name, part in entry.items())}" for entry in value)
        else:
            yield f"{key}: {_plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
