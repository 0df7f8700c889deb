from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.core.config import KeepConfig, PartConfig, SampleConfig, SourceConfig, TurnsConfig
from megatron_prism.prepare import records

TURNS = PartConfig(turns=TurnsConfig())
PREFIXED = PartConfig(turns=TurnsConfig(prefix=True))


def text_of(record: object, part: PartConfig, is_plain: bool = False) -> tuple[str | None, str | None]:
    return records.text_of(json.dumps(record).encode() if isinstance(record, dict) else record, part, is_plain)  # type: ignore[arg-type]


def bad(record: object, part: PartConfig, is_plain: bool = False) -> records.BadRecord:
    with pytest.raises(records.BadRecord) as caught:
        text_of(record, part, is_plain)
    return caught.value


def as_columns(value: Any) -> Any:
    """Return a record as a columnar file gives it: every string as bytes, however deep."""
    if isinstance(value, dict):
        return {key: as_columns(item) for key, item in value.items()}
    return [as_columns(item) for item in value] if isinstance(value, list) else value.encode() if isinstance(value, str) else value


def keep(**operation: Any) -> PartConfig:
    return PartConfig(keep=(KeepConfig(field="f", **operation),))


def test_fields_are_what_is_read() -> None:
    conditions = (KeepConfig(field="meta.score", at_least=3), KeepConfig(field="q", equals="x"))
    assert records.fields(PartConfig(text="{q} {a.b} {q}", keep=conditions, sample=SampleConfig(field="lang", counts={"x": 1}))) == (
        "q",
        "a.b",
        "meta.score",
        "lang",
    )
    assert records.fields(PartConfig(turns=TurnsConfig(field="chat.turns"), keep=conditions)) == ("chat.turns", "meta.score", "q")
    assert records.fields(PartConfig()) == ("text",)


def test_template_reads_nested_fields_and_a_name_with_a_dot_first() -> None:
    record = {"q": "{a}", "a": {"b": 2.5}, "n.m": 7, "n": {"m": 8}}
    part = PartConfig(text="{q}|{a.b}|{n.m}|{}|{{q}}")
    assert text_of(record, part) == records.text_of(as_columns(record), part, False) == ("{a}|2.5|7|{}|{{a}}", None)


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (b"{broken", "a line that is not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["a list"]', "a JSON list"),
        (b'{"other": "x"}', "no field 'text'"),
        (b'{"text": null}', "field 'text' of type NoneType"),
        (b'{"text": true}', "of type bool"),
        (b'{"text": NaN}', "field 'text' nan"),
        ({"text": float("-inf")}, "field 'text' -inf"),
        (b'{"text": {"a": 1}}', "of type dict"),
        (b'{"text": " \\n "}', "an empty text"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        ({"text": b"\xff"}, "invalid UTF-8"),
        ({"text": None}, "of type NoneType"),
    ],
)
def test_bad_record_says_what_was_found(record: object, found: str) -> None:
    with pytest.raises(records.BadRecord) as caught:
        records.text_of(record, PartConfig(), False)  # type: ignore[arg-type]
    assert found in caught.value.found and caught.value.line == 0


def test_missing_field_says_for_what_and_which_there_are() -> None:
    assert bad({"a": 1, "b": 2}, PartConfig(text="{a}{c}")).required == "the fields of `text`; the record has 'a', 'b'"
    assert "`keep`" in bad({"text": "x"}, keep(equals="y")).required
    assert "no field 'a.c'" in bad({"a": {"b": 1}}, PartConfig(text="{a.c}")).found
    assert "no field 'a.b.c'" in bad({"a": {"b": 1}}, PartConfig(text="{a.b.c}")).found


def test_plain_text_is_itself_and_a_bad_byte_has_its_line() -> None:
    assert text_of(b'{"text": 1}', PartConfig(), is_plain=True) == ('{"text": 1}', None)
    assert bad(b"one\ntwo\nth\xffree", PartConfig(), is_plain=True).line == 2
    assert bad(b" \n", PartConfig(), is_plain=True).found == "an empty text"


BAD = "bad"


@pytest.mark.parametrize(
    ("operation", "value", "expected"),
    [
        ({"equals": "x"}, "x", True),
        ({"equals": "x"}, "X", False),
        ({"equals": "x"}, 1, BAD),
        ({"equals": ""}, "", True),
        ({"equals": 1}, 1.0, True),
        ({"equals": 1.0}, 1, True),
        ({"equals": 1}, True, BAD),
        ({"equals": True}, 1, BAD),
        ({"equals": 0}, 0, True),
        ({"equals": False}, False, True),
        ({"equals": False}, True, False),
        ({"equals": False}, None, BAD),
        ({"equals": -1}, "-1", BAD),
        ({"not_equals": -1}, 0.5, True),
        ({"not_equals": -1}, -1.0, False),
        ({"not_equals": -1}, "-1", BAD),
        ({"not_equals": "x"}, ["x"], BAD),
        ({"at_least": 3.0}, 3, True),
        ({"at_least": 3.0}, 2.99, False),
        ({"at_least": 3.0}, "4", BAD),
        ({"at_least": 0.0}, True, BAD),
        ({"at_least": 0.0}, 0, True),
        ({"at_least": 3.0}, float("nan"), BAD),
        ({"not_equals": 1}, float("nan"), BAD),
        ({"one_of": ("a", "b")}, "b", True),
        ({"one_of": ("a", "b")}, "c", False),
        ({"one_of": ("1",)}, 1, BAD),
        ({"starts_with": "gpt-4"}, "gpt-4-0314", True),
        ({"starts_with": "gpt-4"}, "my gpt-4", False),
        ({"starts_with": "4"}, 44, BAD),
        ({"starts_with": "a"}, {"a": 1}, BAD),
    ],
)
def test_condition(operation: dict[str, Any], value: object, expected: object) -> None:
    record, part = {"text": "t", "f": value}, keep(**operation)
    for given_as in (json.dumps(record).encode(), as_columns(record)):
        if expected is BAD:
            with pytest.raises(records.BadRecord):
                records.text_of(given_as, part, False)
        else:
            assert records.text_of(given_as, part, False) == (("t", None) if expected else (None, None))


def test_all_conditions_hold_and_what_is_left_out_is_not_rendered() -> None:
    part = PartConfig(keep=(KeepConfig(field="m.a", equals=1), KeepConfig(field="m.b", equals=2)))
    assert text_of({"m": {"a": 1, "b": 2}, "text": "t"}, part) == ("t", None)
    assert text_of({"m": {"a": 0, "b": 2}, "text": None}, part) == text_of({"m": {"a": 1, "b": 0}}, part) == (None, None)
    bad({"m": {"a": 0, "b": "2"}, "text": "t"}, part)  # the second condition is looked at, though the first already decides


def test_group_is_the_value_as_text() -> None:
    part = PartConfig(sample=SampleConfig(field="s.lang", counts={"7": 1}))
    assert text_of({"text": "t", "s": {"lang": 7}}, part) == ("t", "7")
    assert records.text_of({"text": b"t", "s": {"lang": b"py"}}, part, False) == ("t", "py")
    for value in (True, None, ["py"], "\ud800"):
        bad({"text": "t", "s": {"lang": value}}, part)


@pytest.mark.parametrize("keys", records.TURN_KEYS)
def test_turns_are_joined_with_one_line_break(keys: tuple[str, str]) -> None:
    said = [("system", ""), ("user", "Hi\n\nyou"), ("gpt", "Yes"), ("human", "Bye"), ("assistant", " Bye ")]
    record = {"messages": [dict(zip(keys, turn, strict=True)) | {"extra": None} for turn in said]}
    for given_as in (json.dumps(record).encode(), as_columns(record)):
        assert records.text_of(given_as, TURNS, False)[0] == "Hi\n\nyou\nYes\nBye\n Bye "
        assert records.text_of(given_as, PREFIXED, False)[0] == "User: Hi\n\nyou\nAssistant: Yes\nUser: Bye\nAssistant:  Bye "


def test_parts_of_text_are_joined_as_chat_templates_join_them() -> None:
    parts = [{"type": "text", "text": "Look: "}, {"type": "text", "text": "one", "image_url": None}]
    said = [{"role": "system", "content": [{"type": "image"}]}, {"role": "user", "content": parts}]
    record = {"messages": [*said, {"role": "assistant", "content": "two", "tool_calls": []}]}
    for given_as in (json.dumps(record).encode(), as_columns(record)):
        assert records.text_of(given_as, PREFIXED, False)[0] == "User: Look: one\nAssistant: two"


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ("Hi", "field 'messages' of type str"),
        (None, "of type NoneType"),
        ([], "no turn of a user or an assistant"),
        ([{"role": "system", "content": "x"}], "no turn of a user or an assistant"),
        (["Hi"], "turn 1 of 'messages' of type str"),
        ([{"speaker": "user", "content": "x"}], "turn 1 of 'messages' without a role"),
        ([{"role": None, "content": "x"}], "without a role"),
        ([{"role": "user", "value": "x"}], "turn 1 of 'messages' by 'user' without content"),
        ([{"from": "gpt"}], "turn 1 of 'messages' by 'gpt' without value"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "turn 2 of 'messages' by 'tool'"),
        ([{"role": ["user"], "content": "x"}], "with a role of type list"),
        ([{"role": "user", "content": " \n"}], "turn 1 of 'messages' by 'user' without text"),
        ([{"role": "user", "content": None}], "with content null"),
        ([{"role": "user", "content": 7}], "with content of type int"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "with content of type dict"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "by 'assistant' with tool_calls"),
        ([{"role": "assistant", "content": "Let me see", "tool_calls": [{"function": {"name": "f"}}]}], "with tool_calls"),
        ([{"role": "assistant", "content": None, "function_call": {"name": "f"}}], "with function_call"),
        ([{"role": "user", "content": []}], "without text"),
        ([{"role": "user", "content": ["x"]}], "by 'user': part 1 of type str"),
        ([{"role": "user", "content": [{"text": "x"}]}], "part 1 without a type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part 1 with text of type NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}], "part 2 of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "x"}]}], "part 1 of type 'image'"),
        ([{"role": "user", "content": "\udfff"}], "half a surrogate pair"),
    ],
)
def test_bad_turns(turns: object, found: str) -> None:
    for part in (TURNS, PREFIXED):
        assert found in bad({"messages": turns}, part).found


def test_bytes_of_a_turn_are_decoded_strictly() -> None:
    assert "invalid UTF-8" in bad_columns([{"role": b"user", "content": b"\xff"}])
    assert "invalid UTF-8" in bad_columns([{"role": b"\xff", "content": b"x"}])


def bad_columns(turns: object) -> str:
    with pytest.raises(records.BadRecord) as caught:
        records.text_of({"messages": turns}, TURNS, False)
    return caught.value.found


def test_struct_with_both_spellings_takes_the_one_that_is_set() -> None:
    turn = {"role": None, "content": None, "from": "human", "value": "Hi"}
    assert text_of({"messages": [turn]}, TURNS) == ("Hi", None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "gpt", "system"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    JSON,
    JSON,
    st.sampled_from([TURNS, PREFIXED, PartConfig(text="{a.b}{messages}"), *(keep(**o) for o in ({"equals": 1}, {"starts_with": "u"}))]),
)
def test_any_record_gives_text_or_is_named_bad(first: object, second: object, part: PartConfig) -> None:
    record = {"messages": first, "a": second, "f": second, "text": "t"}
    outcomes = []
    for given_as in (json.dumps(record).encode(), as_columns(record)):
        try:
            outcomes.append(records.text_of(given_as, part, False))
        except records.BadRecord as error:
            outcomes.append(error.found)
    assert outcomes[0] == outcomes[1] and outcomes[0] != ("", None)


def test_check_names_every_key() -> None:
    def wheres(part: PartConfig) -> list[str]:
        return [problem.where for problem in records.check_part(part, "p")]

    fine = PartConfig(
        path=("a.jsonl", "b.txt.jsonl"),
        keep=(KeepConfig(field="a.b", not_equals=False), KeepConfig(field="b", at_least=0.0)),
        turns=TurnsConfig(),
        sample=SampleConfig(field="l", counts={"py": 1}),
    )
    assert wheres(fine) == []
    conditions = (
        KeepConfig(field="a"),
        KeepConfig(field="a", equals=0, at_least=0.0),
        KeepConfig(field="", one_of=("x",)),
        KeepConfig(field="a..b", equals=""),
    )
    assert wheres(PartConfig(keep=conditions)) == ["p.keep.0", "p.keep.1", "p.keep.2.field", "p.keep.3.field"]
    assert wheres(PartConfig(sample=SampleConfig(field="", counts={}), turns=TurnsConfig(field=""))) == [
        "p.turns.field",
        "p.sample.field",
        "p.sample.counts",
    ]
    assert wheres(PartConfig(sample=SampleConfig(field="l", counts={"a": 0, "b": 1, "c": -1}))) == [
        "p.sample.counts.a",
        "p.sample.counts.c",
    ]
    assert wheres(PartConfig(text="{q}", turns=TurnsConfig())) == ["p.text"]
    everything = {"keep": (KeepConfig(field="a", equals=1),), "turns": TurnsConfig(), "sample": SampleConfig(field="l", counts={"a": 1})}
    for name in ("d/*.txt", "a.txt.gz", "a.txt.zst"):
        assert wheres(PartConfig(path=("a.jsonl", name), **everything)) == ["p.keep", "p.turns", "p.sample"]
        assert wheres(SourceConfig(name="s", weight=1.0, valid_path=(name,), **everything)) == ["p.keep", "p.turns", "p.sample"]
    assert wheres(PartConfig(path=("a.txt",))) == []
