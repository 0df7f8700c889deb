"""The parts of every config dataclass: the base class, the bounds of a key, and the mark of a key that may change in a resumed run.

A key is a line and a docstring: `lr: Annotated[float, Range(ge=0)] = 5e-5`. pydantic checks its type when a file is loaded.
core/check/bounds.py checks its bounds, so that they are reported together with the problems between keys.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final


class Section:
    """Base of all config dataclasses: an unknown key is an error."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Range:
    """The numbers that a key accepts: never NaN, and inf only if `finite` is false. `fix` goes into the message for a number out of range."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    ne: float | None = None
    finite: bool = True
    fix: str = ""

    def holds(self, value: float) -> bool:
        """Say whether a number is in the range."""
        return (
            value == value  # no NaN; math.isnan fails on an integer that is too large for a float
            and not (self.finite and abs(value) == math.inf)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (self.ne is None or value != self.ne)
        )

    def schema(self) -> dict[str, Any]:
        """Return the range as JSON Schema."""
        words = {"minimum": self.ge, "exclusiveMinimum": self.gt, "maximum": self.le, "exclusiveMaximum": self.lt}
        schema: dict[str, Any] = {word: bound for word, bound in words.items() if bound is not None}
        return schema if self.ne is None else {**schema, "not": {"const": self.ne}}

    def __str__(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"between {_number(self.ge)} and {_number(self.le)}"
        if self.ge == 0 and self.lt is None:
            return "0 or more"
        limits = {"at least": self.ge, "more than": self.gt, "at most": self.le, "below": self.lt, "a number other than": self.ne}
        return " and ".join(f"{words} {_number(bound)}" for words, bound in limits.items() if bound is not None) or "a finite number"


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2**{power}" if power > 16 and value == 2**power else f"{value:g}"


@dataclass(frozen=True)
class Pattern:
    """The texts that a key accepts: those that the regular expression matches as a whole. `words` describe them for a reader."""

    regex: str
    words: str
    fix: str = ""

    def holds(self, value: str) -> bool:
        """Say whether a text matches."""
        return re.fullmatch(self.regex, value, re.ASCII) is not None

    def schema(self) -> dict[str, Any]:
        """Return the pattern as JSON Schema."""
        return {"pattern": f"^(?:{self.regex})$"}

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class _MayChange:
    """A resumed run may change this key's value. On a section: each of its keys."""


MAY_CHANGE: Final = _MayChange()


@dataclass(frozen=True)
class _IsPath:
    """The texts of this key are paths, though not of type Path: globs, or a container's. `~` and $VARIABLES in them are replaced."""


IS_PATH: Final = _IsPath()
Bound = Range | Pattern
