"""From a record to its text: conditions, then a template or turns, and the field that names the sample group.

A dot in a field's name leads into a nested object, unless the record has a field with that whole name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prism.core.config import KeepConfig, PartConfig, SampleConfig, SourceConfig, TurnsConfig
from megatron_prism.core.errors import Problem

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
PLAIN_ENDINGS = (".txt", ".txt.gz", ".txt.zst")
SPEAKERS = {"user": "User: ", "human": "User: ", "assistant": "Assistant: ", "gpt": "Assistant: ", "system": None}
WITHOUT_FIELD = "all"  # the only group of a sample without a field
TURN_KEYS = (("role", "content"), ("from", "value"))
TEXT_PARTS = ("text", "input_text", "output_text")  # of chat completions, and of the responses API
CALLS = ("tool_calls", "function_call")
EMPTY = "an empty text"


class BadRecord(Exception):
    """A record that gives no document: the value found, what is required, and the line of it, counted from the record's first."""

    def __init__(self, found: str, required: str, line: int = 0):
        self.found, self.required, self.line = found, required, line


def fields(part: PartConfig) -> tuple[str, ...]:
    """Return the fields of a record that `part` reads, each once."""
    names = [part.turns.field] if part.turns else PLACEHOLDER.findall(part.text)
    names += [condition.field for condition in part.keep] + ([part.sample.field] if part.sample and part.sample.field else [])
    return tuple(dict.fromkeys(names))


def text_of(record: bytes | Mapping[str, object], part: PartConfig, is_plain: bool) -> tuple[str | None, str | None]:
    """Return a record's text and the value of the sample's field. The text is None where a condition of `keep` is not met.

    record: a line of JSON, a row with strings still as bytes, or (is_plain) the bytes of a text.
    Raises: BadRecord where there is no text, and where a condition cannot compare a value's type (such a record is never dropped silently).
    """
    group = None
    try:
        if is_plain:
            assert isinstance(record, bytes)
            text = record.decode()
        else:
            row = row_of(record)
            if not is_kept(row, part.keep):
                return None, None
            group = _group(row, part.sample) if part.sample else None
            text = _chat(row, part.turns) if part.turns else render(row, part.text)
        (text + (group or "")).encode()  # raises for half a surrogate pair, which a JSON escape can spell
    except UnicodeDecodeError as error:
        line = record.count(b"\n", 0, error.start) if isinstance(record, bytes) else 0
        raise BadRecord(f"invalid UTF-8 ({error.reason})", "UTF-8 text", line) from None
    except UnicodeEncodeError:
        raise BadRecord("half a surrogate pair", "text that UTF-8 can spell") from None
    if not text.strip():
        raise BadRecord(EMPTY, "text other than white space")
    return text, group


def check_part(part: PartConfig, where: str) -> list[Problem]:
    """Return the problems of a part's conditions, turns and sample. `where` is the part's key."""
    problems = []
    for index, condition in enumerate(part.keep):
        if len(names := list(_operations(condition))) != 1:
            found = " and ".join(names) or "no operation"
            problems.append(Problem(f"{where}.keep.{index}", found, "one of equals, not_equals, at_least, one_of, starts_with"))
    named = {f"keep.{index}": condition.field for index, condition in enumerate(part.keep)}
    named |= {"turns": part.turns.field} if part.turns else {}
    named |= {"sample": part.sample.field} if part.sample and part.sample.field is not None else {}
    problems += [Problem(f"{where}.{key}.field", repr(name), "a field's name") for key, name in named.items() if "" in name.split(".")]
    if part.sample:
        counts = part.sample.counts
        problems += [] if counts else [Problem(f"{where}.sample.counts", "no value", "a number of texts for each value")]
        wrong = {value: count for value, count in counts.items() if count < 1}
        problems += [Problem(f"{where}.sample.counts.{value}", str(count), "at least 1") for value, count in wrong.items()]
    if part.turns and part.text != PartConfig.text:
        problems.append(Problem(f"{where}.text", repr(part.text), "no `text` beside `turns`", "remove one of them"))
    paths = part.path + (part.valid_path if isinstance(part, SourceConfig) else ())
    if plain := next((path for path in paths if path.endswith(PLAIN_ENDINGS)), None):
        keys = [key for key in ("keep", "turns", "sample") if getattr(part, key)]
        problems += [Problem(f"{where}.{key}", f"{key} on {plain}", "files of records: a .txt file has no fields") for key in keys]
    return problems


def row_of(record: bytes | Mapping[str, object]) -> dict[str, Any]:
    """Return a record's fields. Raises: BadRecord for a line that is no JSON object. UnicodeDecodeError."""
    return _parse(record.decode()) if isinstance(record, bytes) else dict(record)


def is_kept(row: dict[str, Any], conditions: Sequence[KeepConfig]) -> bool:
    """Say whether all conditions hold. Every one is evaluated, so that a record that one cannot judge is named. Raises: BadRecord."""
    return all([_holds(condition, row) for condition in conditions])


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"a line that is not JSON ({error})", "one JSON object a line") from None
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__}", "one JSON object a line")
    return record


def value_of(record: dict[str, Any], name: str, key: str) -> object:
    """Return a field's value, decoded where a columnar file gave bytes. key: the config's key that names the field.

    Raises: BadRecord where there is no such field.
    """
    value: object = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadRecord(f"no field {name!r}", f"the fields of `{key}`; the record has {', '.join(map(repr, record)) or 'none'}")
        value = value[part]
    return _decoded(value)


def _plain(record: dict[str, Any], name: str, key: str) -> str | int | float:
    value = value_of(record, name, key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRecord(f"field {name!r} of type {type(value).__name__}", "a string or a number")
    if isinstance(value, float) and not math.isfinite(value):  # json takes NaN, which pandas writes for a value that is missing
        raise BadRecord(f"field {name!r} {value}", "a string or a finite number")
    return value


def _group(record: dict[str, Any], sample: SampleConfig) -> str:
    return WITHOUT_FIELD if sample.field is None else str(_plain(record, sample.field, "sample"))


def render(record: dict[str, Any], template: str, key: str = "text") -> str:
    """Return a template with the record's fields in place of `{field}`. key: the config's key that has the template.

    Raises: BadRecord for a field that is no text or number.
    """
    # The pieces of a template alternate between literal text and field names.
    pieces = PLACEHOLDER.split(template)
    return "".join(str(_plain(record, piece, key)) if index % 2 else piece for index, piece in enumerate(pieces))


def _operations(condition: KeepConfig) -> dict[str, object]:
    set_to = {name: getattr(condition, name) for name in ("equals", "not_equals", "at_least", "one_of", "starts_with")}
    return {name: value for name, value in set_to.items() if value is not None and value != ()}


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)) and value == value:
        return "a number"
    return "a string" if isinstance(value, str) else "nan" if isinstance(value, float) else type(value).__name__


def _holds(condition: KeepConfig, record: dict[str, Any]) -> bool:
    ((operation, operand),) = _operations(condition).items()
    value = value_of(record, condition.field, "keep")
    required = _kind(condition.one_of[0] if operation == "one_of" else operand)
    if _kind(value) != required:  # -1 never equals "-1": a wrong type in the config would keep, or drop, every record
        found = f"field {condition.field!r} of type {type(value).__name__}" if _kind(value) != "nan" else f"field {condition.field!r} nan"
        raise BadRecord(found, f"{required}, as `{operation}` is")
    match operation:
        case "equals":
            return value == operand
        case "not_equals":
            return value != operand
        case "at_least":
            return value >= operand  # type: ignore[operator]
        case "one_of":
            return value in condition.one_of
    return value.startswith(operand)  # type: ignore[attr-defined]


def _chat(record: dict[str, Any], turns: TurnsConfig) -> str:
    listed = value_of(record, turns.field, "turns")
    if not isinstance(listed, list):
        raise BadRecord(f"field {turns.field!r} of type {type(listed).__name__}", "a list of turns")
    utterances = []
    for number, turn in enumerate(listed, 1):
        which = f"turn {number} of {turns.field!r}"
        role, content_key = _role(turn, which)
        if (speaker := SPEAKERS[role]) is None:
            continue
        content = _utterance(turn, content_key, f"{which} by {role!r}")
        utterances.append(speaker + content if turns.prefix else content)
    if not utterances:
        raise BadRecord(f"no turn of a user or an assistant in {turns.field!r}", "at least one")
    return "\n".join(utterances)


def _role(turn: object, which: str) -> tuple[str, str]:
    """Return whose turn it is, and the key of what was said."""
    if not isinstance(turn, dict):
        raise BadRecord(f"{which} of type {type(_decoded(turn)).__name__}", "{role, content}, or {from, value}")
    with_role = [keys for keys in TURN_KEYS if turn.get(keys[0]) is not None]
    if not with_role:
        raise BadRecord(f"{which} without a role", "{role, content}, or {from, value}")
    role_key, content_key = next((keys for keys in with_role if keys[1] in turn), with_role[0])
    role = _decoded(turn[role_key])
    if not isinstance(role, str):
        raise BadRecord(f"{which} with a role of type {type(role).__name__}", f"one of {', '.join(SPEAKERS)}")
    if role not in SPEAKERS:
        raise BadRecord(f"{which} by {role!r}", f"one of {', '.join(SPEAKERS)}")
    return role, content_key


def _utterance(turn: dict[str, Any], key: str, which: str) -> str:
    """Return what a turn says: its text, or the texts of its parts, joined as chat templates join them, with nothing between.

    A call is part of what the model said, and has no spelling of its own: a turn with one is never read without it.
    """
    if calls := [name for name in CALLS if turn.get(name)]:
        raise BadRecord(f"{which} with {calls[0]}", "turns of text alone: a call has no text")
    content = turn.get(key)
    if isinstance(content, list):
        content = "".join([_part(part, f"{which}: part {number}") for number, part in enumerate(content, 1)])
    content = _decoded(content)
    if content is None:
        raise BadRecord(f"{which} {f'with {key} null' if key in turn else f'without {key}'}", "an utterance other than white space")
    if not isinstance(content, str):
        raise BadRecord(f"{which} with {key} of type {type(content).__name__}", "a text, or a list of {type: text, text} parts")
    if not content.strip():
        raise BadRecord(f"{which} without text", "an utterance other than white space")
    return content


def _part(part: object, which: str) -> str:
    required = "parts {type: text, text}: nothing else can be read"
    if not isinstance(part, dict):
        raise BadRecord(f"{which} of type {type(_decoded(part)).__name__}", required)
    kind, text = _decoded(part.get("type")), _decoded(part.get("text"))
    if kind not in TEXT_PARTS:
        raise BadRecord(f"{which} of type {kind!r}" if isinstance(kind, str) else f"{which} without a type", required)
    if not isinstance(text, str):
        raise BadRecord(f"{which} with text of type {type(text).__name__}", required)
    return text


def _decoded(value: object) -> object:
    """Return a value of a columnar file as JSON would have it."""
    return value.decode() if isinstance(value, bytes) else value
