"""Render messages with the chat template of a Hugging Face folder, as transformers' apply_chat_template does (jinja_sandbox.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import sha256_json
from megatron_prism.data import special_tokens, tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of templates
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message; templates read the first
DATE = datetime(2024, 7, 26)  # what a template's strftime_now gives, where prompts must be the same tomorrow; LLaMA-3.1's own default
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """A folder's chat templates by name (a single one is `default`), and the special tokens passed to them, by key."""

    folder: Path
    texts: Mapping[str, str]
    special_tokens: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """The hash of the templates and the special tokens. It identifies the rendering."""
        return sha256_json([self.texts, self.special_tokens])

    def text(self, name: str | None, has_tools: bool) -> str:
        """Return a template by name. Without a name, return the one that transformers chooses.

        Raises: InputError where there is no such template.
        """
        chosen = name or (WITH_TOOLS if has_tools and WITH_TOOLS in self.texts else DEFAULT)
        if chosen not in self.texts:
            raise InputError(
                Problem(f"chat template of {self.folder}", f"none named {chosen!r}", f"one of {', '.join(sorted(self.texts))}")
            )
        return self.texts[chosen]


def load(folder: Path) -> ChatTemplate:
    """Return a folder's chat templates: its .jinja files, else those of tokenizer_config.json.

    Raises: InputError where there is no template, or a template is malformed.
    """
    files = {DEFAULT: folder / FILE} if (folder / FILE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    try:
        with disk.reading(folder):
            texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()} or _configured(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(f"chat template of {folder}", str(error), "readable text")) from None
    if not texts:
        required = f"chat_template in {special_tokens.CONFIG}, or {FILE}"
        raise InputError(Problem(str(folder), "no chat template", required, "a base model has none: give it plain text, or add a template"))
    return ChatTemplate(folder, texts, special_tokens.spellings(folder))


def render(
    template: ChatTemplate,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    template_name: str | None = None,
    now: datetime = DATE,
    **variables: Any,
) -> str:
    """Return messages as the text that a model was trained on. `variables` are a template's further inputs, such as enable_thinking.

    now: the date that some templates write. The clock's would change the prompts of a run that goes on past midnight. Templates receive only JSON values.
    Raises: InputError where the template rejects the messages, fails on them, or does something forbidden.
    """
    from megatron_prism.data import jinja_sandbox

    where = f"chat template of {template.folder}"
    given = {"tools": tools, "documents": documents, **variables}
    try:
        plain = json.loads(json.dumps({"messages": [*map(dict, messages)], **given}))
    except (TypeError, ValueError) as error:
        raise InputError(Problem(where, f"messages that are no JSON ({error})", "a list of objects with role and content")) from None
    if not plain["messages"]:
        raise InputError(Problem(where, "no message", "at least one"))
    plain["messages"] = [_with_reasoning(message) for message in plain["messages"]]
    values = {**template.special_tokens, **plain, "add_generation_prompt": add_generation_prompt}
    text = template.text(template_name, has_tools=tools is not None)
    try:
        return jinja_sandbox.render(text, values, now)
    except Exception as error:  # third-party code may raise anything
        said = f"{type(error).__name__}: {error}"
        raise InputError(Problem(where, said, "messages that it takes, and a template that renders them")) from None


def encode(template: ChatTemplate, spec: TokenizerSpec, messages: Messages, **choices: Any) -> list[int]:
    """Return messages as tokens: `render` them (with its choices), then encode without added tokens, since the template writes BOS itself."""
    return tokenizer.encode_text(render(template, messages, **choices), spec)


def _configured(folder: Path) -> Mapping[str, str]:
    """Return the templates of tokenizer_config.json: one text, a list of {name, template}, or an object of texts."""
    value = special_tokens.read_object(folder / special_tokens.CONFIG).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise InputError(
            Problem(f"{folder / special_tokens.CONFIG}:chat_template", f"{value!r:.80}", "a template, or a list of {name, template}")
        )
    return value


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without null keys, with its reasoning under both names that templates read (as transformers 5.24 does)."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}
