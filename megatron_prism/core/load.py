"""From YAML files and `a.b=c` overrides to one frozen dataclass, with every problem named by file and key.

A file, and an entry of a list, may inherit from others by `base:` (a path, or a list of paths, relative to the file). Later values win,
lists are replaced whole. `${a.b}` interpolates another key of the same config. `layouts:` maps a `world_size` to the keys that are tuned
for it: those of the size that is asked for stand over the file's own, and under the overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron_prism.core.errors import InputError, Problem

T = TypeVar("T")
Layer = tuple[str, dict[Any, Any]]  # (where it comes from, its keys)
OVERRIDE, LAYOUTS, WORLD_SIZE = "override", "layouts", "world_size"
MAX_VALUES, MAX_DEPTH = 20_000, 50  # of a YAML file, its aliases written out: a few lines of them can stand for more than a memory holds


def load(path: Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Return `cls` built from a YAML file, its bases and the overrides.

    Raises: InputError listing every unknown key (with the nearest known one), missing key and wrong type.
    """
    layers = config_layers(path, cls, overrides)
    merged = merge(layers)
    problems = [*unknown_keys(merged, cls, (), layers)]
    if problems:  # unknown keys first: a misspelt key would else also be reported as missing
        raise InputError(problems)
    return build(merged, cls, lambda key: f"{origin(layers, key)}:{'.'.join(map(str, key))}")


@contextmanager
def placed(path: Path, cls: type, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Let the problems that checks find between keys name the file (or override) that set the key."""
    try:
        yield
    except InputError as error:
        layers = config_layers(path, cls, overrides)
        names = {item.name for item in dataclasses.fields(cls)}

        def place(problem: Problem) -> Problem:
            key = split_key(problem.where.split(" ")[0])
            return dataclasses.replace(problem, where=f"{origin(layers, key)}:{problem.where}") if key[0] in names else problem

        raise type(error)([place(problem) for problem in error.problems]) from None


def config_layers(path: Path, cls: type, overrides: Sequence[str] = ()) -> list[Layer]:
    """Return the layers of a config in the order they are merged: the file's bases, the file, the layout for its world_size, overrides."""
    files, given = read_layers(path, ()), [parse_override(text) for text in overrides]
    if not any(item.name == WORLD_SIZE for item in dataclasses.fields(cls)):
        return [*files, *given]
    tuned = [(name, values.pop(LAYOUTS)) for name, values in files if isinstance(values.get(LAYOUTS), dict)]
    if not tuned:
        return [*files, *given]
    world_size = next((values[WORLD_SIZE] for _, values in reversed([*files, *given]) if WORLD_SIZE in values), None)
    sizes = {str(size): layout for size, layout in _merged(tuned).items()}
    if not isinstance(layout := sizes.get(str(world_size)), dict):
        fix = f"{WORLD_SIZE}=N takes the layout for N; for another size copy the recipe and lay it out: prism plan --sweep"
        raise InputError(Problem(f"{path}:{WORLD_SIZE}", str(world_size), f"one of the sizes that {LAYOUTS} has: {', '.join(sizes)}", fix))
    return [*files, (f"{path}:{LAYOUTS}.{world_size}", layout), *given]


def build(values: Mapping[str, Any], cls: type[T], where: typing.Callable[[tuple[Any, ...]], str]) -> T:
    """Return `cls` from plain values, strictly typed (an int serves for a float, a list for a tuple).

    Raises: InputError with one problem a wrong value; `where` turns a key path into its place.
    """
    from pydantic import ValidationError

    try:
        adapter = _adapter(cls)  # type: ignore[arg-type]  # a class is hashable
        return adapter.validate_json(json.dumps(values, default=repr), strict=True)
    except ValidationError as error:
        raise InputError([_problem(item, where) for item in error.errors(include_url=False)]) from None


@functools.cache
def _adapter(cls: type) -> Any:
    """Return pydantic's validator of a class; making one takes 20 ms, and a shard of data is read thousands of times."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def to_yaml(config: Any) -> str:
    """Return a config dataclass as YAML that `load` reads back to an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_dict(config))))


def _escaped(value: Any) -> Any:
    """Return plain values in which a text's `${` is no interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flat(config: Any) -> dict[str, Any]:
    """Return a config dataclass as {dotted key: value}; what is None or a list counts as a value."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                walk(getattr(value, item.name), f"{key}.{item.name}" if key else item.name)
        else:
            found[key] = value

    walk(config, "")
    return found


def read_layers(path: Path, above: tuple[Path, ...]) -> list[Layer]:
    """Return the layers of a file, its bases first.

    Raises: InputError where a file is missing, is no YAML mapping, or inherits from itself.
    """
    from omegaconf import OmegaConf

    try:
        if not path.is_file():  # a device or a pipe may have no end
            raise FileNotFoundError
        if path.resolve() in above:
            raise InputError(Problem(f"{path}:base", "a file that inherits from itself", "a chain of bases that ends"))
        _refuse_bomb(path.read_text(encoding="utf-8"))
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise InputError(Problem(str(path), "no such file", "a YAML config file")) from None
    except InputError:
        raise
    except Exception as error:  # whatever yaml and OmegaConf make of it: `!!timestamp x` is an AttributeError
        raise InputError(Problem(str(path), " ".join(str(error).split()), "a readable YAML file")) from None
    if not isinstance(values, dict):
        raise InputError(Problem(str(path), type(values).__name__, "a mapping of keys to values"))
    layers = _bases(values, path, "base", above)
    return [*layers, (str(path), typing.cast(dict[str, Any], _with_bases(values, path, above)))]


def _refuse_bomb(text: str) -> None:
    """Raise ValueError where a YAML text stands for too many values, or nests them too deep. Looks at events: nothing here recurs."""
    import yaml

    anchors: dict[str | None, tuple[float, float]] = {}  # the values that an anchor stands for, and their depth
    opened: list[tuple[str | None, float, float]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            anchors[event.anchor] = math.inf, math.inf  # what it is within itself
            opened.append((event.anchor, 1, 1))
        elif isinstance(event, (yaml.CollectionEndEvent, yaml.ScalarEvent, yaml.AliasEvent)):
            anchor, values, depth = opened.pop() if isinstance(event, yaml.CollectionEndEvent) else (event.anchor, 1, 1)
            if isinstance(event, yaml.AliasEvent):
                values, depth = anchors.get(anchor, (0, 0))
            anchors[anchor] = values, depth
            above, more, deep = opened.pop()
            opened.append((above, more + values, max(deep, depth + 1)))
        if opened[-1][1] > MAX_VALUES or opened[-1][2] + len(opened) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_VALUES:,} values, or nested deeper than {MAX_DEPTH}, aliases written out")


def _bases(values: dict[Any, Any], path: Path, key: str, above: tuple[Path, ...]) -> list[Layer]:
    """Return the layers that the `base` of a mapping names, and take it out of there."""
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(Problem(f"{path}:{key}", repr(bases), "a path, or a list of paths"))
    return [layer for base in bases for layer in read_layers(path.parent / base, (*above, path.resolve()))]


def _with_bases(values: Any, path: Path, above: tuple[Path, ...], key: str = "") -> Any:
    """Return values in which the entries of lists have what their own `base` gives them."""
    if isinstance(values, dict):
        return {name: _with_bases(value, path, above, f"{key}.{name}" if key else str(name)) for name, value in values.items()}
    if not isinstance(values, list):
        return values
    found = []
    for index, entry in enumerate(values):
        place = f"{key}.{index}"
        if isinstance(entry, dict) and "base" in entry:
            layers = _bases(entry, path, f"{place}.base", above)
            entry = _merged([*layers, (str(path), entry)])
        found.append(_with_bases(entry, path, above, place))
    return found


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return whole layers merged in order, interpolations as they stand."""
    from omegaconf import OmegaConf

    return typing.cast(
        dict[str, Any], OmegaConf.to_container(OmegaConf.merge(*[OmegaConf.create(values) for _, values in layers]), resolve=False)
    )


def parse_override(text: str) -> Layer:
    """Return the layer of one `a.b=c` override; the value is read as YAML, a number in the key is a place in a list.

    Raises: InputError where there is no `=`.
    """
    from omegaconf import OmegaConf

    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(Problem(f"{OVERRIDE} {text!r}", "no key=value", "a.b=c"))
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except Exception as error:  # whatever yaml and OmegaConf make of it
        raise InputError(Problem(f"{OVERRIDE} {text!r}", " ".join(str(error).split()), "a.b=c with c as YAML")) from None
    for part in reversed(split_key(key)):
        values = {part: values}
    return OVERRIDE, values


def split_key(key: str) -> list[str | int]:
    """Return the parts of a dotted key, places in a list as numbers."""
    return [int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split(".")]


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the layers merged in order (files whole, overrides key by key), interpolations resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = layers[-1][0]
    try:
        whole = OmegaConf.merge(*[OmegaConf.create(values) for name, values in layers if name != OVERRIDE])
        for where, values in layers:
            if where == OVERRIDE:
                key, value = _only_leaf(values)
                where = f"{OVERRIDE}:{key}"
                OmegaConf.update(whole, key, value, merge=True, force_add=True)
        return typing.cast(dict[str, Any], OmegaConf.to_container(whole, resolve=True))
    except (OmegaConfBaseException, TypeError, ValueError, IndexError, RecursionError) as error:
        at = getattr(error, "full_key", None)
        raise InputError(Problem(f"{where}:{at}" if at else where, " ".join(str(error).split()), "values that merge and resolve")) from None


def _only_leaf(values: Any) -> tuple[str, Any]:
    parts: list[str] = []
    while isinstance(values, dict) and len(values) == 1:
        (part, values), *_ = values.items()
        parts.append(str(part))
    return ".".join(parts), values


def origin(layers: Sequence[Layer], key: Sequence[Any]) -> str:
    """Return the layer that set a key, or its nearest parent that is set."""
    for length in range(len(key), 0, -1):
        for name, values in reversed(layers):
            if _holds(values, key[:length]):
                return name
    return layers[-1][0] if layers else "config"


def _holds(values: Any, key: Sequence[Any]) -> bool:
    for part in key:
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            values = values[part]
        else:
            return False
    return True


def unknown_keys(values: Any, kind: Any, key: tuple[Any, ...], layers: Sequence[Layer]) -> Iterator[Problem]:
    """Yield a problem for each key that the dataclass does not have, with the nearest one it has."""
    for option in _options(kind):
        if dataclasses.is_dataclass(option) and isinstance(values, dict):
            known = typing.get_type_hints(option)
            hints = {item.name: known[item.name] for item in dataclasses.fields(option)}
            for name, value in values.items():
                if name in hints:
                    yield from unknown_keys(value, hints[name], (*key, name), layers)
                    continue
                near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
                place = ".".join(map(str, (*key, name)))
                yield Problem(
                    f"{origin(layers, (*key, name))}:{place}",
                    "an unknown key",
                    f"one of {', '.join(sorted(hints))}",
                    f"did you mean {near[0]!r}?" if near else "",
                )
        elif typing.get_origin(option) is tuple and isinstance(values, list):
            for index, value in enumerate(values):
                yield from unknown_keys(value, typing.get_args(option)[0], (*key, index), layers)


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _problem(item: Mapping[str, Any], where: typing.Callable[[tuple[Any, ...]], str]) -> Problem:
    key = tuple(part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-")))
    if item["type"] == "missing" or item["type"] == "missing_argument":
        return Problem(where(key), "no value", "a value", "set this key")
    return Problem(where(key), repr(item["input"]), item["msg"].removeprefix("Input should be ").removeprefix("Value error, "))
