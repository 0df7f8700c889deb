"""Check the bounds declared at the keys of a config, whether it was loaded from a file or constructed in code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_prism.core.config.keys import bare, bounds_of, keys, values_of
from megatron_prism.core.config.section import Bound
from megatron_prism.core.errors import Problem


def check_bounds(config: Any, prefix: str = "") -> Iterator[Problem]:
    """Yield a problem for each value, also in sections and lists, that is outside its key's bounds. `prefix` is put before each key."""
    for key in keys(type(config)):  # type: ignore[arg-type]  # a class is hashable
        yield from check_value(
            getattr(config, key.name), key.kind, key.bounds, f"{prefix}{key.name}", ", or null" if key.is_nullable else ""
        )


def check_value(value: Any, kind: Any, bounds: Sequence[Bound], where: str, or_null: str = "") -> Iterator[Problem]:
    """Yield a problem for each part of a value that is outside its bounds, or outside those that its type holds; None has none."""
    if value is None:
        return
    for bound in bounds:
        if not bound.holds(value):
            yield Problem(where, repr(value) if isinstance(value, str) else str(value), f"{bound}{or_null}", bound.fix)
    if dataclasses.is_dataclass(value):
        yield from check_bounds(value, f"{where}.")
    elif isinstance(value, (tuple, dict)):
        inner, marks = bare(values_of(kind))
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from check_value(part, inner, bounds_of(marks), f"{where}.{name}")
