"""From YAML files and `a.b=c` overrides to one frozen dataclass, and back to YAML. Every problem names its file and key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron_prism.core import paths
from megatron_prism.core.config.keys import bare, keys, section_of, walk
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.layers import absent, config_layers, merge, origin, split_key
from megatron_prism.core.scalars import entry

T = TypeVar("T")
UNKNOWN = "unexpected_keyword_argument"  # pydantic's name for the error


def load(path: Path | None, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Return `cls` built from a YAML file, its bases and the overrides; or from the overrides alone.

    `~` and $VARIABLES in its paths are replaced.
    Raises: InputError listing every unknown key (with the nearest known one), or if there is none, every missing key and wrong type.
    """
    layers = config_layers(path, cls, overrides)

    def where(key: tuple[Any, ...]) -> str:
        return f"{origin(layers, key)}:{'.'.join(map(str, key))}"

    values, problems = paths.expand(merge(layers), cls, where)
    config = build(values, cls, where)
    raise_problems(problems)
    return config


@contextmanager
def placed(path: Path | None, cls: type, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Within the block, add to each problem between keys the file (or override) that set the key."""
    try:
        yield
    except InputError as error:
        layers = config_layers(path, cls, overrides)
        names = {item.name for item in dataclasses.fields(cls)}

        def place(problem: Problem) -> Problem:
            key = split_key(problem.where.split(" ")[0])
            return dataclasses.replace(problem, where=f"{origin(layers, key)}:{problem.where}") if key[0] in names else problem

        raise type(error)([place(problem) for problem in error.problems]) from None


def closest(path: Path, classes: Sequence[type], overrides: Sequence[str] = ()) -> type:
    """Return the first class that a YAML loads as; if it loads as none, the one with the fewest problems.

    Raises: InputError where there is no such file.
    """
    if not path.is_file():
        raise InputError(absent(path))
    counts: dict[type, int] = {}
    for cls in classes:  # a YAML of many stages takes seconds to load: the others are not tried once it loads
        counts[cls] = _num_problems(path, cls, overrides)
        if counts[cls] == 0:
            return cls
    return min(classes, key=counts.__getitem__)


def _num_problems(path: Path, cls: type, overrides: Sequence[str]) -> int:
    try:
        load(path, cls, overrides)
    except InputError as error:
        return len(error.problems)
    return 0


def build(values: Mapping[str, Any], cls: type[T], where: typing.Callable[[tuple[Any, ...]], str]) -> T:
    """Return `cls` from plain values, strictly typed (but an int is accepted for a float, and a list for a tuple).

    Raises: InputError with one problem per wrong value. `where` turns a key path into its place.
    """
    from pydantic import ValidationError

    try:
        return _adapter(cls).validate_json(json.dumps(values, default=repr), strict=True)  # type: ignore[arg-type]  # a class is hashable
    except ValidationError as error:
        errors = error.errors(include_url=False)
    unknown = [item for item in errors if item["type"] == UNKNOWN]  # first: otherwise a misspelt key would also be reported as missing
    raise InputError([_problem(item, cls, where) for item in unknown or errors])


@functools.cache
def _adapter(cls: type) -> Any:
    """Return pydantic's validator of a class, cached: making one takes 20 ms, and shard manifests are read thousands of times."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def to_yaml(config: Any) -> str:
    """Return a config dataclass as YAML that `load` reads back to an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_escaped(paths.escape(to_dict(config), type(config)))))


def _escaped(value: Any) -> Any:
    """Return plain values with `${` in texts escaped, so that it is not an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flat(config: Any) -> dict[str, Any]:
    """Return a config dataclass as {dotted key: value}. None and lists count as values."""
    values: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                walk(getattr(value, item.name), f"{key}.{item.name}" if key else item.name)
        else:
            values[key] = value

    walk(config, "")
    return values


def changed(before: T, now: T) -> list[tuple[str, Any, Any]]:
    """Return (key, its value before, its value now) of each key that differs, and that a resumed job may not change (MAY_CHANGE)."""
    then, since = flat(before), flat(now)
    may_change = {name for name, key in walk(type(now)) if key.may_change}
    names = dict.fromkeys((*then, *since))  # a section that only one of them has gives keys that the other lacks
    return [(key, then.get(key), since.get(key)) for key in names if then.get(key) != since.get(key) and key not in may_change]


def _problem(item: Mapping[str, Any], cls: type, where: typing.Callable[[tuple[Any, ...]], str]) -> Problem:
    """Return pydantic's error for one key as a Problem."""
    key = tuple(part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-")))
    if item["type"] == UNKNOWN:
        known = _known(cls, key[:-1])
        near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
        return Problem(where(key), "an unknown key", f"one of {', '.join(known)}", f"did you mean {near[0]!r}?" if near else "")
    if item["type"] in ("missing", "missing_argument"):
        return Problem(where(key), "no value", "a value", "set this key")
    required = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ").replace("a valid array", "a list")
    if item["type"] == "dataclass_type" and (known := _known(cls, key)):
        required = f"a section with keys of its own: {', '.join(known)}"
    fix = "write it in quotes" if item["type"] in ("string_type", "path_type") and isinstance(item["input"], int | float) else ""
    if required == "a list" and isinstance(item["input"], str | int | float):
        fix = f"a list is written [{item['input']}]"
    return Problem(where(key), repr(item["input"]), required, fix)


def _known(cls: Any, key: tuple[Any, ...]) -> list[str]:
    """Return the keys of the section at a key path of `cls`."""
    kind: Any = cls
    for part in key:
        kind = entry(kind, part)
    section = section_of(bare(kind)[0])
    return sorted(one.name for one in keys(section)) if section else []
