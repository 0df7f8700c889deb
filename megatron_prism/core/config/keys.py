"""The keys of a config dataclass as data: type, default, bounds, description and mark. Checks, schema and documents are made from them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import operator
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_prism.core.config.section import IS_PATH, MAY_CHANGE, Bound

PLACE = "N"  # in a dotted key, for a number in a list: sources.N.name


@dataclass(frozen=True)
class Key:
    """One key of a section. kind: its type, without None and marks. default: MISSING where a value must be given.

    is_path: texts that are paths, of whatever type.
    """

    name: str
    kind: Any
    is_nullable: bool
    bounds: tuple[Bound, ...]
    may_change: bool
    default: Any
    is_path: bool = False

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def required(self) -> str:
        """What a value must be, for a message; empty where any value will do."""
        return " and ".join(map(str, self.bounds)) + (", or null" if self.bounds and self.is_nullable else "")


@functools.cache
def keys(section: type) -> tuple[Key, ...]:
    """Return a section's keys: its own in their order, then those it inherits, the nearest class's first."""
    hints = typing.get_type_hints(section, include_extras=True)
    distance = {name: base for base in reversed(range(len(section.__mro__))) for name in inspect.get_annotations(section.__mro__[base])}
    fields = sorted(dataclasses.fields(section), key=lambda field: distance[field.name])
    return tuple(_key(field, hints[field.name]) for field in fields)


def _key(field: dataclasses.Field[Any], hint: Any) -> Key:
    kind, marks = bare(hint)
    kinds = options(kind)
    if is_nullable := types.NoneType in kinds:
        kind = functools.reduce(operator.or_, [option for option in kinds if option is not types.NoneType])
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Key(field.name, kind, is_nullable, bounds_of(marks), MAY_CHANGE in marks, default, IS_PATH in marks or kind is Path)


def bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split an Annotated type into the type and its marks."""
    return (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())


def bounds_of(marks: Sequence[Any]) -> tuple[Bound, ...]:
    """Return the bounds among a type's marks."""
    return tuple(mark for mark in marks if isinstance(mark, Bound))


def options(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union. Any other type is its own only option."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def values_of(kind: Any) -> Any:
    """Return the type, with marks, of a list's entries or a mapping's values. None: the type is neither."""
    of, kinds = typing.get_origin(kind), typing.get_args(kind)
    return kinds[0] if of is tuple else kinds[1] if of is dict else None


def sections(section: type, place: str = "", may_change: bool = False) -> Iterator[tuple[str, type, list[Key]]]:
    """Yield (place, section, its keys) of a section and of all below it. A place ends with a dot. A section's mark applies to all its keys."""
    own = [replace(key, may_change=key.may_change or may_change) for key in keys(section)]
    yield place, section, own
    for key in own:
        if inner := section_of(key.kind):
            yield from sections(inner, f"{place}{key.name}.{PLACE}." if values_of(key.kind) else f"{place}{key.name}.", key.may_change)


def walk(section: type) -> Iterator[tuple[str, Key]]:
    """Yield (dotted key, key) of a section and of all below it."""
    for place, _, own in sections(section):
        yield from ((f"{place}{key.name}", key) for key in own)


def section_of(kind: Any) -> type | None:
    """Return the section that a type is, or is a list of. None: it is neither."""
    inner = values_of(kind) or kind
    return inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None


@functools.cache
def words(section: type) -> dict[str, str]:
    """Return the docstrings under a section's keys, inherited ones too. They are parsed from the source, since Python does not keep them."""
    by_key: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(section.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for line, below in pairwise(typing.cast(ast.ClassDef, definition).body):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                by_key[ast.unparse(line.target)] = " ".join(ast.literal_eval(below.value).split())
    return by_key
