"""`prism config`: the keys of a job's YAML, read from its dataclasses, or the JSON Schema with which an editor checks the YAML."""

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core.config import AlignerConfig, ClusterConfig, NemoRlConfig, PipelineConfig, PolicyConfig, StudyConfig
from megatron_prism.core.config.keys import Key, bare, bounds_of, options, section_of, sections, values_of, words
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.schema import schema as schema_of
from megatron_prism.launch.pipeline import CONFIGS

JOBS: dict[str, type] = {
    **CONFIGS,
    "cluster": ClusterConfig,
    "pipeline": PipelineConfig,
    "study": StudyConfig,
    "policy": PolicyConfig,
    "aligner": AlignerConfig,
    "nemo_rl": NemoRlConfig,
}
KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
INDENT, WIDEST = "    ", 140


def run(job: str) -> dict[str, Any]:
    """Return {"job", "sections"}: each section of a job's config once, with its description, all its places, and its keys.

    Raises: InputError for an unknown job.
    """
    by_section: dict[type, dict[str, Any]] = {}
    for place, section, keys in sections(_config_of(job)):
        if section in by_section:
            by_section[section]["places"].append(place.removesuffix("."))
        else:
            said = words(section)
            described = [_describe(place, key, said.get(key.name, "")) for key in keys]
            by_section[section] = {"places": [place.removesuffix(".")], "words": _paragraphs(section), "keys": described}
    return {"job": job, "sections": list(by_section.values())}


def schema(job: str) -> dict[str, Any]:
    """Return the JSON Schema of a job's config. Raises: InputError for an unknown job."""
    return schema_of(_config_of(job))


def _config_of(job: str) -> type:
    if job not in JOBS:
        raise InputError(Problem("JOB", repr(job), f"one of {', '.join(JOBS)}"))
    return JOBS[job]


def _describe(place: str, key: Key, said: str) -> dict[str, Any]:
    section = section_of(key.kind)
    has_default = not key.is_required and not (section and key.default is not None and values_of(key.kind) is None)
    return {
        "key": f"{place}{key.name}",
        "type": _kind(key.kind) + (" or null" if key.is_nullable else ""),
        "bounds": " and ".join(map(str, key.bounds)),
        **({"default": json.loads(json.dumps(key.default, default=str))} if has_default else {}),
        "is_required": key.is_required,
        "may_change": key.may_change,
        "words": said or (_paragraphs(section)[0] if section else ""),
    }


def _paragraphs(section: type) -> list[str]:
    return [" ".join(part.split()) for part in (inspect.getdoc(section) or "").split("\n\n")]


def _kind(kind: Any) -> str:
    """Return a type's name for a reader."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind)[:-1]) + f" or {typing.get_args(kind)[-1]}"
    if (inner := values_of(kind)) is not None:
        value, marks = bare(inner)
        bounds = "".join(f" ({bound})" for bound in bounds_of(marks))
        return f"{'list of' if typing.get_origin(kind) is tuple else 'mapping to'} {_kind(value)}{bounds}"
    if len(options(kind)) > 1:
        return " or ".join(map(_kind, options(kind)))
    return KINDS.get(kind, "section")


def show(config: Mapping[str, Any]) -> None:
    """Print the sections: one line per key with its default and facts, and its description below."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    for section in config["sections"]:
        print(f"\n{', '.join(section['places']) or config['job']}")
        for text in section["words"]:
            print(textwrap.fill(text, width))
        for key in section["keys"]:
            default = f" = {json.dumps(key['default'])}" if "default" in key else ""
            print(f"{INDENT}{key['key']}{default}  ({'; '.join(facts(key))})")
            print(textwrap.fill(key["words"], width, initial_indent=2 * INDENT, subsequent_indent=2 * INDENT))


def facts(key: Mapping[str, Any]) -> list[str]:
    """Return a key's facts beside its default: type, bounds, whether it is required, whether a resumed run may change it."""
    marks = ["required"] * key["is_required"] + ["a resumed run may change it"] * key["may_change"]
    return [key["type"], *filter(None, [key["bounds"]]), *marks]
