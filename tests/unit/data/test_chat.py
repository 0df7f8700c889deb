"""Chat templates render as transformers renders them, text and tokens; what a template may not do is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.filters import do_tojson

from megatron_prism.core.errors import InputError
from megatron_prism.data import chat, jinja_sandbox, tokenizer

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|stop|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- eos_token }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one tool call at once") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|stop|>{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}" + eos_token }}
    {%- else %}
        {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant/user/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS]" }}{% for call in message.tool_calls %}{{ call.function|tojson }}{% if not loop.last %}, {% endif %}{% endfor %}{{ eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- "[TOOL_RESULTS]" ~ message.content ~ "[/TOOL_RESULTS]" }}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GRANITE = """{%- macro titled(documents) %}
{% for document in documents -%}
    {%- if document.title is none %}{% continue %}{% endif %}
Document {{ loop.index }} ({{ document['title'] }}):
{{ document['text'] }}
{% endfor %}
{%- endmacro %}
{%- set role = dict(user='user', assistant='assistant', system='system') %}
{%- if tools %}
<|start|>available_tools<|stop|>{{ tools | tojson(indent=2) }}{{ eos_token }}
{% endif %}
{%- if documents %}
<|start|>documents<|stop|>{{ titled(documents) }}{{ eos_token }}
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
<|start|>{{ role[message.role] }}<|stop|>
    {%- if thinking and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {%- generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}

    {%- else %}
<|start|>{{ role[message.role] }}<|stop|>{{ message['content'] }}{{ eos_token }}
    {%- endif %}

{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% if controls %} {{ controls | tojson }}{% endif %}<|stop|>{% endif %}
"""
CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are "helpful" & <kind>.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
    {% if message.content is string %}
{{ message.content }}<|im_end|>
    {% else %}{% for part in message.content if part.type == 'text' %}{{ part.text }}{% else %}nothing{% endfor %}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
SYSTEM, USER = {"role": "system", "content": " Be brief. "}, {"role": "user", "content": "2 + 2 = ?\n<b>\u00e9</b> & '\"'"}
ANSWER, AGAIN = {"role": "assistant", "content": " 4 ", "reasoning": "two and two"}, {"role": "user", "content": "Sure?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [1.5, None]}}}],
}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add <two> & more: \u00e9", "parameters": {"type": "object"}}}]
DOCUMENTS = [{"title": "Sums", "text": "2 + 2 is 4."}, {"title": None, "text": "left out"}, {"title": "Ends", "text": "</s>"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}]}, {"role": "assistant", "content": []}]
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "llama": (LLAMA3, [SYSTEM, USER, ANSWER, AGAIN], {"date_string": "26 Jul 2024", "add_generation_prompt": True}),
    "llama, the year": (LLAMA3, [USER], {}),
    "llama, tools": (LLAMA3, [USER, CALL, RESULT], {"tools": TOOLS, "date_string": "today"}),
    "mistral": (MISTRAL, [SYSTEM, USER, ANSWER, AGAIN], {}),
    "mistral, tools": (MISTRAL, [USER, CALL, RESULT, ANSWER, AGAIN], {"tools": TOOLS}),
    "granite": (GRANITE, [SYSTEM, USER, ANSWER], {"thinking": True}),
    "granite, documents": (
        GRANITE,
        [USER],
        {"documents": DOCUMENTS, "tools": TOOLS, "add_generation_prompt": True, "controls": {"length": "long"}},
    ),
    "chatml": (CHATML, [USER, ANSWER, AGAIN], {"add_generation_prompt": True}),
    "chatml, parts": (CHATML, PARTS, {}),
}
Make = Callable[..., Path]


@pytest.fixture
def make_folder(tiny_tokenizer: Path, tmp_path: Path) -> Make:
    """Return a function from chat_template, and other files by their name, to a folder with the tiny tokenizer."""

    def make(template: Any = None, **files: str) -> Path:
        folder = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **({} if template is None else {"chat_template": template})}))
        (folder / chat.FOLDER).mkdir()
        for name, text in files.items():
            (folder / (chat.FILE if name == "file" else f"{chat.FOLDER}/{name}.jinja")).write_text(text, newline="")
        return folder

    return make


def theirs(folder: Path, messages: list[dict[str, Any]], **choices: Any) -> tuple[str, list[int]]:
    """Return the text and the tokens that transformers makes."""
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tuple(oracle.apply_chat_template(messages, tokenize=tokenize, return_dict=False, **choices) for tokenize in (False, True))  # type: ignore[return-value]


def ours(folder: Path, messages: list[dict[str, Any]], **choices: Any) -> tuple[str, list[int]]:
    template = chat.load(folder)
    choices = {"now": datetime.now(), **choices}  # transformers' date
    return chat.render(template, messages, **choices), chat.encode(template, tokenizer.load(folder), messages, **choices)


@pytest.mark.parametrize("case", CASES)
def test_a_chat_is_that_of_transformers(make_folder: Make, case: str) -> None:
    template, messages, choices = CASES[case]
    folder = make_folder(template)
    text, tokens = ours(folder, messages, **choices)
    assert (text, tokens) == theirs(folder, messages, **choices)
    assert len(text) > 40  # no template renders nothing


@pytest.mark.parametrize(("setting", "case"), [("lstrip_blocks", "chatml"), ("trim_blocks", "chatml"), ("tojson", "llama, tools")])
def test_a_jinja_of_other_settings_renders_another_chat(
    make_folder: Make, monkeypatch: pytest.MonkeyPatch, setting: str, case: str
) -> None:
    """The negative control: the comparison sees a setting that differs."""
    template, messages, choices = CASES[case]
    begin = jinja_sandbox.Sandbox.__init__

    def altered(sandbox: jinja_sandbox.Sandbox, now: datetime | None) -> None:
        begin(sandbox, now)
        if setting == "tojson":
            sandbox.filters["tojson"] = do_tojson  # jinja2's own, which escapes HTML
        else:
            setattr(sandbox, setting, False)

    monkeypatch.setattr(jinja_sandbox.Sandbox, "__init__", altered)
    monkeypatch.setattr(jinja_sandbox, "_compiled", jinja_sandbox._compiled.__wrapped__)
    folder = make_folder(template)
    assert chat.render(chat.load(folder), messages, **choices) != theirs(folder, messages, **choices)[0]


NAMED = [{"name": "default", "template": "plain {{ eos_token }}"}, {"name": "tool_use", "template": "tools {{ pad_token }}|"}]


@pytest.mark.parametrize(
    ("template", "files", "choices"),
    [
        (NAMED, {}, {}),
        (NAMED, {}, {"tools": TOOLS}),
        ("config", {"file": "file\r\n{{ messages[0].content }}\r\n"}, {}),
        ("config", {"file": "file", "tool_use": "with tools"}, {"tools": TOOLS}),
        (NAMED, {"file": "file"}, {"tools": TOOLS}),
        (None, {"default": "of the folder", "rag": "rag"}, {}),
    ],
)
def test_the_template_is_the_one_that_transformers_chooses(make_folder: Make, template: Any, files: dict[str, str], choices: Any) -> None:
    folder = make_folder(template, **files)
    assert ours(folder, [USER], **choices) == theirs(folder, [USER], **choices)


def test_a_template_has_a_name(make_folder: Make) -> None:
    template = chat.load(make_folder(None, file="file", rag="rag"))
    assert chat.render(template, [USER], template_name="rag") == "rag"
    with pytest.raises(InputError, match="none named 'rap'; required one of default, rag"):
        chat.render(template, [USER], template_name="rap")
    assert template.sha256 != chat.ChatTemplate(template.folder, {"default": "file"}, template.special_tokens).sha256


def test_special_tokens_are_those_of_transformers(make_folder: Make) -> None:
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ unk_token }}"
    folder = make_folder(template)
    config = {"eos_token": {"__type": "AddedToken", "content": "<s>"}, "image_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>", "chat_template": template}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "</s>"}))
    assert ours(folder, [USER]) == theirs(folder, [USER])
    assert ours(folder, [USER])[0] == "<s>|</s>|</s>|<unk>|"


def test_the_date_can_be_fixed(make_folder: Make) -> None:
    template = chat.load(make_folder("{{ strftime_now('%d %b %Y') }}"))
    assert chat.render(template, [USER], now=datetime(2023, 1, 2)) == "02 Jan 2023"


def test_a_prompt_is_the_same_tomorrow(make_folder: Make) -> None:
    template = chat.load(make_folder("{{ strftime_now('%d %b %Y') }}"))
    assert chat.render(template, [USER]) == "26 Jul 2024"


TOO_LONG = "more than 0.3 s"
HOSTILE = {
    "class": ("{{ messages.__class__ }}", "unsafe"),
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "by filter": ("{{ (messages|attr('__class__')).mro() }}", "unsafe"),
    "by format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "globals of a function": ("{{ raise_exception.__globals__ }}", "unsafe"),
    "the environment": ("{{ strftime_now.__self__ }}", "unsafe"),
    "a change": ("{{ messages.append(1) }}", "unsafe"),
    "namespace": ("{{ namespace(__class__=1) }}", "__class__"),
    "dict": ("{{ dict.mro() }}", "no attribute 'mro'"),
    "range": ("{% for n in range(10**9) %}{% endfor %}", "operator"),
    "a long range": ("{% for n in range(1000000000) %}{% endfor %}", "too big"),
    "a file": ("{% include 'tokenizer.json' %}", "no loader"),
    "a power": ("{{ 10 ** 10 ** 10 }}", "operator"),
    "repetition": ("{{ 'a' * 1000000000000 }}", "operator"),
    "output": ("{% for n in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "characters"),
    "a number of a billion digits": (
        "{% set ns = namespace(x=9) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "operator",
    ),
    "a call without an end": ("{{ lipsum(n=100000000) }}", "lipsum"),
    "lines of one letter": ("{{ ('a' * 9000000)|wordwrap(1) }}", "wordwrap"),
    "a billion parts": ("{{ [1]|slice(1000000000)|list }}", "slice"),
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TOO_LONG),
    "loops without a call": (
        "{% set r = range(9999)|list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        TOO_LONG,
    ),
    "a recursion in two": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TOO_LONG),
    "a recursion without an end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "a fault": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "no name": ("{{ messages[0].contents.text }}", "UndefinedError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(make_folder: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, said = HOSTILE[name]
    if said == TOO_LONG:  # the others have all the time
        monkeypatch.setattr(jinja_sandbox, "MAX_RENDER_S", 0.3)
    folder = make_folder(text)
    with pytest.raises(InputError, match=said) as caught:
        chat.render(chat.load(folder), [USER])
    assert f"chat template of {folder}" in str(caught.value)


def test_messages_that_a_template_refuses_are_told_in_its_words(make_folder: Make) -> None:
    with pytest.raises(InputError, match="found TemplateError: roles must alternate user/assistant/user"):
        chat.render(chat.load(make_folder(MISTRAL)), [USER, USER])


@pytest.mark.parametrize(
    ("messages", "said"),
    [([], "no message"), (["2 + 2"], "no JSON"), ([{"role": "user", "content": {1, 2}}], "no JSON"), ([{"content": object()}], "no JSON")],
    ids=["none", "a text", "a set", "an object"],
)
def test_messages_that_are_none_are_refused(make_folder: Make, messages: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chat.render(chat.load(make_folder(CHATML)), messages)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template; required chat_template in"),
        (3, "chat_template: found 3"),
        ([{"name": "default"}], "found {'default': None}"),
    ],
)
def test_a_folder_without_a_template_is_refused(make_folder: Make, template: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chat.load(make_folder(template))


def test_text_that_is_not_utf8_is_refused(make_folder: Make) -> None:
    folder = make_folder()
    (folder / chat.FILE).write_bytes(b"\xff")
    with pytest.raises(InputError, match="utf-8"):
        chat.load(folder)
