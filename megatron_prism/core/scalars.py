"""YAML whose plain scalars stay the text they were written as, where their key takes text.

YAML reads `24:00:00` as a number in base 60, `0123` as octal, `no` as false and `1_0` as ten. Where a key is a str, a Path or a choice of
texts, and for the keys of a mapping, the scalar's own characters count. `null` and `~` stay null, but for a section's key of that name.
Where a key takes texts and numbers, only what JSON would read alike is taken without quotes.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core.config.keys import bare, keys, options, section_of, values_of

LAYOUTS = "layouts"  # of a section that is a config file: its keys again, for each world size
STR, NULL, MERGE, *TYPED = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge", "bool", "int", "float"))
CLEAR = re.compile(r"true|false|[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?(e[-+]?[0-9]+)?", re.IGNORECASE)  # the same value, whoever reads it


def quoted(text: str, kind: Any) -> str:
    """Return a YAML text with quotes around the scalars that are text in a value of `kind`: a section, the type of a key, or None.

    Raises: yaml.YAMLError. ValueError where it is not clear whether a text is meant.
    """
    import yaml

    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if root is None or kind is None:
        return text
    return typing.cast(str, yaml.serialize(_Quoted().node(root, kind), Dumper=yaml.SafeDumper, width=float("inf")))


def entry(kind: Any, name: str | int) -> Any:
    """Return the type of an entry of a section, a mapping or a list. None: there is none of that name."""
    kind, _ = bare(kind)
    if (inner := values_of(kind)) is not None:
        return inner
    if kind is not None and section_of(kind) is kind:
        return next((key.kind for key in keys(kind) if key.name == name), None)
    return None


def kind_at(kind: Any, path: Sequence[str | int]) -> Any:
    """Return the type of the key at a path below a section. None: there is no such key."""
    for part in path:
        kind = entry(kind, part)
    return kind


def is_text(kind: Any) -> bool:
    """Say whether a key of this type takes text, and nothing that YAML has another type for."""
    kind, _ = bare(kind)
    return kind in (str, Path) or (typing.get_origin(kind) is Literal and all(isinstance(word, str) for word in typing.get_args(kind)))


class _Quoted:
    """Copies YAML nodes. A node that aliases repeat is copied once for each type that it stands for."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, str], Any] = {}

    def node(self, node: Any, kind: Any) -> Any:
        place = id(node), repr(kind)
        if place not in self._copies:
            self._copies[place] = self._copied(node, kind)
        return self._copies[place]

    def _copied(self, node: Any, kind: Any) -> Any:
        import yaml

        if isinstance(node, yaml.SequenceNode):
            return yaml.SequenceNode(node.tag, [self.node(item, entry(kind, "")) for item in node.value], flow_style=node.flow_style)
        if isinstance(node, yaml.MappingNode):
            return yaml.MappingNode(node.tag, [self._pair(key, value, kind) for key, value in node.value], flow_style=node.flow_style)
        if str in options(bare(kind)[0]) and not node.style and node.tag in TYPED and not is_text(kind) and not CLEAR.fullmatch(node.value):
            mark, required = node.start_mark, "in quotes as a text, or as true, false or a decimal number"
            raise ValueError(f"{node.value!r} in line {mark.line + 1}, column {mark.column + 1}, to be written {required}")
        return _in_quotes(node) if is_text(kind) else node

    def _pair(self, key: Any, value: Any, kind: Any) -> tuple[Any, Any]:
        import yaml

        if key.tag == MERGE:  # <<: *one, or <<: [*one, *other]
            return key, self.node(value, tuple[kind, ...] if value.id == "sequence" else kind)
        if key.value == LAYOUTS and kind is not None and section_of(kind) is kind:
            return key, self.node(value, dict[int, kind])
        if key.tag == NULL and entry(kind, key.value) is not None:  # a key of ours that YAML would take for null: a claim's `null`
            return yaml.ScalarNode(STR, key.value, style="'"), self.node(value, entry(kind, key.value))
        is_named_by_user = typing.get_origin(bare(kind)[0]) is dict and typing.get_args(bare(kind)[0])[0] is str
        return _in_quotes(key) if is_named_by_user else key, self.node(value, entry(kind, key.value if key.id == "scalar" else ""))


def _in_quotes(node: Any) -> Any:
    """Return a plain scalar as a quoted one; any other node as it is."""
    import yaml

    is_plain = isinstance(node, yaml.ScalarNode) and not node.style and node.tag != NULL
    return yaml.ScalarNode(STR, node.value, style="'") if is_plain else node
