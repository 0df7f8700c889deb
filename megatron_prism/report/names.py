"""Names of their own for results of one study that share one."""

from __future__ import annotations

import itertools
from collections.abc import Collection


def free(name: str, taken: Collection[str], mark: str = "") -> str:
    """Return a name that is not taken: the name itself, else with its mark, else with a number."""
    marked = f"{name} ({mark})" if mark else name
    numbered = (f"{marked} ({number})" for number in itertools.count(2))
    return next(one for one in itertools.chain([name, marked], numbered) if one not in taken)
