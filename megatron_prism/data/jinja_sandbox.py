"""The sandboxed jinja2 that renders chat templates. A template is third-party code; it gets what transformers would give it, without ENDLESS, and no more.

A template cannot reach Python internals. range() has jinja2's limit; repetition, products and the text have a maximum length. MAX_RENDER_S of processor
time is checked at each call and each pass of a loop: one call or filter is not interrupted. Other memory that a template takes is not limited. This
module is imported only where a template is rendered.
Source: transformers 5.24, utils/chat_template_utils.py, _cached_compile_jinja_template.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RENDER_S = 10.0  # of this thread's processor time: a busy machine refuses no template
MAX_CHARS = 10_000_000
MAX_BITS = 4096  # of a product of integers
ENDLESS = ("lipsum", "wordwrap", "slice")  # one call of these can take hours, and no chat has a use for them


def render(text: str, variables: Mapping[str, Any], now: datetime) -> str:
    """Render a template. now: what its strftime_now gives.

    Raises: jinja2's TemplateError, and anything else that the template's code raises.
    """
    sandbox, num_chars = Sandbox(now), 0
    parts: list[str] = []
    for part in Template.from_code(sandbox, _compiled(text), sandbox.make_globals(None)).generate(variables):
        parts.append(part)
        num_chars += len(part)
        if num_chars > MAX_CHARS:
            raise SecurityError(f"more than {MAX_CHARS} characters")
    return "".join(parts)


@lru_cache
def _compiled(text: str) -> CodeType:
    return Sandbox(datetime.min).compile(text)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering. Its clock starts at construction."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, now: datetime):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension])
        self._now, self._ends = now, time.thread_time() + MAX_RENDER_S
        self.filters["tojson"] = tojson
        for name in ENDLESS:
            self.globals.pop(name, None)
            self.filters.pop(name, None)
        self.globals |= {"raise_exception": raise_exception, "strftime_now": self.strftime_now, "dict": Dict(), "namespace": SafeNamespace}

    def strftime_now(self, format: str) -> str:
        """Return the date in the template's format."""
        return self._now.strftime(format)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template. Each call checks the time limit."""
        if time.thread_time() > self._ends:
            raise SecurityError(f"more than {MAX_RENDER_S:g} s of processor time")
        return super().call(context, function, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse access to Python's internals. (In transformers such a value is merely undefined.)"""
        if attribute.startswith("_"):
            raise SecurityError(f"access to the attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")
        return super().unsafe_undefined(obj, attribute)

    def loop_step(self) -> None:
        """Do nothing. Each pass of a loop calls this, and `call` checks the time limit."""

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compile a template, with a call added to each loop, since a loop may make no call itself."""
        for loop in list(source.find_all(nodes.For)):
            call = nodes.Call(nodes.EnvironmentAttribute("loop_step"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
        return super()._generate(source, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse an operator whose result would fill the memory, or take hours."""
        length, count = (left, right) if hasattr(left, "__len__") else (right, left)
        is_large = hasattr(length, "__len__") and isinstance(count, int) and len(length) * count > MAX_CHARS
        if isinstance(left, int) and isinstance(right, int):  # squares of squares
            is_large = left.bit_length() + right.bit_length() > MAX_BITS
        if operator == "**" or is_large:
            raise SecurityError(f"the operator {operator} on {left!r:.40} and {right!r:.40}")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """The tag `generation`, which marks the assistant's text. Its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the tag's body as a call block, which has its own scope."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(lineno)

    def body(self, caller: Macro) -> str:
        """Return the rendered body."""
        return caller()


class Dict:
    """`dict` for a template, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return dict.fromkeys(...)."""
        return dict.fromkeys(*args)


class SafeNamespace(Namespace):
    """`namespace` for a template, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # no name for self, which may be a key
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return JSON without jinja2's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    """Reject the messages with the template's own error text."""
    raise TemplateError(message)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace with the name {name!r}")
