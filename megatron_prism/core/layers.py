"""A config's layers (YAML files with their bases, the layout for a world size, `a.b=c` overrides), and how they are merged.

A file, and an entry of a list, may inherit from others by `base:` (a path, or a list of paths, relative to the file). Later values win,
lists are replaced whole. `${a.b}` interpolates another key of the same config. `layouts:` maps a `world_size` to the keys that are tuned
for it. The matching entry overrides the file's keys; command-line overrides win over both. `layouts.N={}` adds an empty entry for N.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core import paths
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.scalars import LAYOUTS, entry, kind_at, quoted

Layer = tuple[str, dict[Any, Any]]  # (where it comes from, its keys)
OVERRIDE, BASE, WORLD_SIZE = "override", "base", "world_size"
# Of a YAML file with its aliases expanded: a few lines of aliases can expand to more than fits in memory.
MAX_VALUES, MAX_DEPTH = 20_000, 50


def config_layers(path: Path | None, cls: type, overrides: Sequence[str] = ()) -> list[Layer]:
    """Return the layers of a config in the order they are merged: the file's bases, the file, the layout for its world_size, overrides."""
    files, given = (
        read_layers(path, (), cls) if path is not None else [("the command line", {})],
        [parse_override(text, cls) for text in overrides],
    )
    if not any(item.name == WORLD_SIZE for item in dataclasses.fields(cls)):
        return [*files, *given]
    tuned = [(name, values.pop(LAYOUTS)) for name, values in [*files, *given] if isinstance(values.get(LAYOUTS), dict)]
    given = [(name, values) for name, values in given if values]  # without those of layouts alone
    if not tuned:
        return [*files, *given]
    world_size = next((values[WORLD_SIZE] for _, values in reversed([*files, *given]) if WORLD_SIZE in values), None)
    sizes = {str(size): layout for size, layout in _merged(tuned).items()}
    if not isinstance(layout := sizes.get(str(world_size)), dict):
        own = f"{LAYOUTS}.{world_size}={{}}, and the overrides that prism plan --gpus {world_size} --sweep prints"
        fix = f"{WORLD_SIZE}=N takes the layout for N; for another size add a layout: {own}"
        raise InputError(Problem(f"{path}:{WORLD_SIZE}", str(world_size), f"one of the sizes that {LAYOUTS} has: {', '.join(sizes)}", fix))
    return [*files, (f"{path}:{LAYOUTS}.{world_size}", layout), *given]


def read_layers(path: Path, above: tuple[Path, ...], kind: Any = None) -> list[Layer]:
    """Return the layers of a file, its bases first. kind: the section that the file holds; its texts are then read as they are written.

    Raises: InputError where a file is missing, is not a YAML mapping, or inherits from itself.
    """
    from omegaconf import OmegaConf

    try:
        if not path.is_file():  # a device or a pipe may have no end
            raise FileNotFoundError
        if path.resolve() in above:
            raise InputError(Problem(f"{path}:base", "a file that inherits from itself", "a chain of bases that ends"))
        text = path.read_text(encoding="utf-8")
        _refuse_bomb(text)
        values = _plain(OmegaConf.load(io.StringIO(quoted(text, kind))))
    except FileNotFoundError:
        raise InputError(absent(path)) from None
    except InputError:
        raise
    except Exception as error:  # yaml and OmegaConf raise many types: `!!timestamp x` is an AttributeError
        raise InputError(Problem(str(path), " ".join(str(error).split()), "a readable YAML file")) from None
    if not isinstance(values, dict):
        raise InputError(Problem(str(path), type(values).__name__, "a mapping of keys to values"))
    layers = _bases(values, path, BASE, above, kind)
    return [*layers, (str(path), typing.cast(dict[str, Any], _with_bases(values, path, above, kind)))]


def absent(path: Path) -> Problem:
    """Return the problem of a config's path that is no file."""
    found, fix = ("a folder", "name the file in it") if path.is_dir() else ("no such file", "")
    return Problem(str(path), found, "a YAML config file", fix)


def _refuse_bomb(text: str) -> None:
    """Raise ValueError where a YAML text expands to too many values, or nests them too deep. It reads events, without recursion."""
    import yaml

    anchors: dict[str | None, tuple[float, float]] = {}  # the number of values under an anchor, and their depth
    opened: list[tuple[str | None, float, float]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            anchors[event.anchor] = math.inf, math.inf  # an alias to the anchor within itself is endless
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


def _bases(values: dict[Any, Any], path: Path, key: str, above: tuple[Path, ...], kind: Any) -> list[Layer]:
    """Remove the `base` of a mapping, and return the layers that it names."""
    bases = values.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(Problem(f"{path}:{key}", repr(bases), "a path, or a list of paths"))
    try:
        files = [_short(path.parent / paths.expanded(base)) for base in bases]
    except ValueError as error:
        raise InputError(Problem(f"{path}:{key}", str(error), "a path", paths.FIX)) from None
    return [layer for file in files for layer in read_layers(file, (*above, path.resolve()), kind)]


def _short(path: Path) -> Path:
    """Return a path without `..`, as messages name it. Behind a link that would be another file: then the path as it is."""
    short = os.path.normpath(path)
    return Path(short) if os.path.realpath(short) == os.path.realpath(path) else path


def _with_bases(values: Any, path: Path, above: tuple[Path, ...], kind: Any, key: str = "") -> Any:
    """Return the values, with each list entry merged onto its own `base`."""
    if isinstance(values, dict):
        return {
            name: _with_bases(value, path, above, entry(kind, name), f"{key}.{name}" if key else str(name))
            for name, value in values.items()
        }
    if not isinstance(values, list):
        return values
    entries, inner = [], entry(kind, "")
    for index, value in enumerate(values):
        place = f"{key}.{index}"
        if isinstance(value, dict) and BASE in value:
            layers = _bases(value, path, f"{place}.base", above, inner)
            value = _merged([*layers, (str(path), value)])
        entries.append(_with_bases(value, path, above, inner, place))
    return entries


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return whole layers merged in order, with interpolations unresolved."""
    from omegaconf import OmegaConf

    return _plain(OmegaConf.merge(*[OmegaConf.create(values) for _, values in layers]))


def _plain(config: Any) -> Any:
    """Return an OmegaConf config as plain values, with interpolations unresolved. Raises: TypeError for a key of bytes (YAML's !!binary)."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(config, resolve=False)
    json.dumps(values, default=repr)
    return values


def parse_override(text: str, cls: type) -> Layer:
    """Return the layer of one `a.b=c` override. The value is read as YAML, as in a file. A number in the key is an index of a list.

    Raises: InputError where there is no `=`.
    """
    from omegaconf import OmegaConf

    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(Problem(f"{OVERRIDE} {text!r}", "no key=value", "a.b=c"))
    try:
        value = quoted(value, kind_at(cls, split_key(key)))
        values = _plain(OmegaConf.from_dotlist([f"value={value}"]))["value"]
    except Exception as error:  # yaml and OmegaConf raise many types
        raise InputError(Problem(f"{OVERRIDE} {text!r}", " ".join(str(error).split()), "a.b=c with c as YAML")) from None
    for part in reversed(split_key(key)):
        values = {part: values}
    return OVERRIDE, values


def split_key(key: str) -> list[str | int]:
    """Return the parts of a dotted key, with list indices as numbers."""
    return [int(part) if re.fullmatch("0|[1-9][0-9]{0,8}", part) else part for part in key.split(".")]


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the layers merged in order (files whole, overrides key by key), with interpolations resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

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
        fix = "a variable of the environment is written $NAME, without braces" if isinstance(error, InterpolationKeyError) else ""
        required = "values that merge and resolve"
        raise InputError(Problem(f"{where}:{at}" if at else where, " ".join(str(error).split()), required, fix)) from None


def _only_leaf(values: Any) -> tuple[str, Any]:
    parts: list[str] = []
    while isinstance(values, dict) and len(values) == 1:
        (part, values), *_ = values.items()
        parts.append(str(part))
    return ".".join(parts), values


def origin(layers: Sequence[Layer], key: Sequence[Any]) -> str:
    """Return the layer that set a key, or else the nearest parent of the key."""
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
