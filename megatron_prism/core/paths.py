r"""`~` and $VARIABLES in paths: in every path of a config, and in those of the command line. `\~` and `\$` stand for themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_prism.core.config.keys import bare, keys, section_of, values_of
from megatron_prism.core.errors import Problem

VARIABLE = re.compile(r"(\\*)\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
HOME = re.compile(r"(\\*)(~[^/]*)")
FIX = r"set the variable, or write the path out; \$ and \~ stand for themselves"
Place = tuple[str | int, ...]  # of a value in a config: its keys and indices


def expanded(text: str) -> str:
    """Return a path with its variables, and a `~` or `~user` at its beginning, replaced.

    Raises: ValueError where a variable is not set, or there is no such user.
    """

    def variable(match: re.Match[str]) -> str:
        slashes, name = match[1], match[2] or match[3]
        if len(slashes) % 2 == 0 and name not in os.environ:
            raise ValueError(f"{text!r}, where ${name} is not set")
        return slashes[: len(slashes) // 2] + (os.environ[name] if len(slashes) % 2 == 0 else match[0].lstrip("\\"))

    def home(match: re.Match[str]) -> str:
        if slashes := match[1]:
            return slashes[: len(slashes) // 2] + match[2]
        if (folder := os.path.expanduser(match[2])) == match[2]:
            raise ValueError(f"{text!r}, where {match[2]} is no user's home folder")
        return folder

    path = VARIABLE.sub(variable, text)
    return home(match) + path[match.end() :] if (match := HOME.match(path)) else path


def escaped(path: str) -> str:
    """Return the text that `expanded` makes this path of."""
    path = VARIABLE.sub(lambda match: match[1] * 2 + "\\" + match[0][len(match[1]) :], path)
    return HOME.sub(lambda match: match[1] * 2 + "\\" + match[2], path, count=1) if HOME.match(path) else path


def expand(values: Mapping[str, Any], cls: type, where: Callable[[Place], str]) -> tuple[dict[str, Any], list[Problem]]:
    """Return a config's plain values with all paths expanded, and the problems. `where` turns a key path into its place."""
    problems: list[Problem] = []

    def change(path: str, place: Place) -> str:
        try:
            return expanded(path)
        except ValueError as error:
            problems.append(Problem(where(place), str(error), "a path", FIX))
            return path

    return _changed(dict(values), cls, change), problems


def escape(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Return a config's plain values with all paths escaped, so that they are read as they are."""
    return _changed(dict(values), cls, lambda path, _: escaped(path))


def named(values: Mapping[str, Any], cls: type) -> list[str]:
    """Return the paths (or globs) that a config's plain values name."""
    texts: list[str] = []

    def note(path: str, place: Place) -> str:
        texts.append(path)
        return path

    _changed(dict(values), cls, note)
    return texts


def _changed(value: Any, kind: Any, change: Callable[[str, Place], str], is_path: bool = False, place: Place = ()) -> Any:
    """Return plain values of a type with each path changed."""
    kind, _ = bare(kind)
    inner = values_of(kind)
    if isinstance(value, list) and inner is not None:
        return [_changed(part, inner, change, is_path, (*place, index)) for index, part in enumerate(value)]
    if isinstance(value, dict) and inner is not None:
        return {name: _changed(part, inner, change, is_path, (*place, name)) for name, part in value.items()}
    if isinstance(value, dict) and section_of(kind) is not None:
        known = {key.name: key for key in keys(kind)}
        return {
            name: _changed(part, known[name].kind, change, known[name].is_path, (*place, name)) if name in known else part
            for name, part in value.items()
        }
    return change(value, place) if is_path and isinstance(value, str) and not is_address(value) else value


def is_address(text: str) -> bool:
    """Say whether a text is the address of a container's image, whose `$oauthtoken` is meant literally, and no path."""
    return "://" in text or re.match(r"[^/~]*#", text) is not None
