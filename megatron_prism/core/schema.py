"""A config dataclass as JSON Schema (draft 7), with which an editor completes and checks a YAML file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core.config.keys import PLACE, Key, bare, bounds_of, keys, options, section_of, sections, values_of, words
from megatron_prism.core.config.section import Bound
from megatron_prism.core.layers import BASE, WORLD_SIZE
from megatron_prism.core.scalars import LAYOUTS

DRAFT = "http://json-schema.org/draft-07/schema#"
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string"}
TEXT: dict[str, Any] = {"type": "string"}
# Texts in place of other values: ${a.b}, and 1_000, which is a number for us (YAML 1.1) and a text for an editor (YAML 1.2).
INTERPOLATION, NUMERAL = r"\$\{", r"^[-+]?[0-9]+(_[0-9]+)+$"
BASES: dict[str, Any] = {
    "description": "Files whose keys are inherited, their paths relative to this one. This file's own keys win.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def schema(cls: type) -> dict[str, Any]:
    """Return the JSON Schema of a job's config file.

    No key is required: a file may be a base, and may have keys from its bases, from a layout or from the command line.
    """
    places: dict[type, list[str]] = {}
    for place, section, _ in sections(cls):
        places.setdefault(section, []).append(place)
    definitions = {section.__name__: _section(section, is_entry=at[0].endswith(f"{PLACE}.")) for section, at in places.items()}
    top, more = definitions[cls.__name__], {BASE: BASES}
    if any(key.name == WORLD_SIZE for key in keys(cls)):
        described = "Keys that are tuned for a world_size, by size. The matching entry overrides the file's keys."
        more[LAYOUTS] = {"description": described, "type": "object", "additionalProperties": _ref(cls)}
    return {"$schema": DRAFT, **top, "properties": {**top["properties"], **more}, "$defs": definitions}


def _ref(section: type) -> dict[str, str]:
    return {"$ref": f"#/$defs/{section.__name__}"}


def _section(section: type, is_entry: bool) -> dict[str, Any]:
    described = words(section)
    properties = {key.name: _key(key, described.get(key.name, "")) for key in keys(section)}
    properties |= {BASE: BASES} if is_entry else {}
    return {"type": "object", "description": inspect.getdoc(section), "additionalProperties": False, "properties": properties}


def _key(key: Key, described: str) -> dict[str, Any]:
    section = section_of(key.kind)
    described = described or (inspect.getdoc(section) if section else None) or ""
    if key.bounds:
        described += f" Must be {key.required}."
    default = {} if key.is_required or section else {"default": json.loads(json.dumps(key.default, default=str))}
    return {"description": described, **default, **_value(key.kind, key.bounds, [{"type": "null"}] * key.is_nullable)}


def _value(kind: Any, bounds: Sequence[Bound], more: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the schema of a value of this type, or of a text in its place."""
    kinds = [*_kinds(kind, bounds), *more]
    if TEXT not in kinds:
        is_number = any(one.get("type") in ("integer", "number") for one in kinds)
        kinds.append({**TEXT, "pattern": f"{INTERPOLATION}|{NUMERAL}" if is_number else INTERPOLATION})
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _kinds(kind: Any, bounds: Sequence[Bound]) -> list[dict[str, Any]]:
    if dataclasses.is_dataclass(kind):
        return [_ref(typing.cast(type, kind))]
    if typing.get_origin(kind) is Literal:
        return [{"enum": list(typing.get_args(kind))}]
    if (inner := values_of(kind)) is not None:
        value, marks = bare(inner)
        values = _value(value, bounds_of(marks))
        return [
            {"type": "array", "items": values} if typing.get_origin(kind) is tuple else {"type": "object", "additionalProperties": values}
        ]
    if len(options(kind)) > 1:
        return [one for option in options(kind) for one in _kinds(option, bounds)]
    return [{"type": TYPES[kind], **{word: value for bound in bounds for word, value in bound.schema().items()}}]
