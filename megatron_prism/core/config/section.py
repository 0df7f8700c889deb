"""The base of all config dataclasses."""

from __future__ import annotations

from typing import ClassVar


class Section:
    """Base of all config dataclasses: an unknown key is an error."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
