"""From a record to a prompt: its text, what grades an answer, its id. What depends on chance depends on the seed and the id alone."""

from __future__ import annotations

import hashlib
import json
import random
import re
from typing import Any

from megatron_prism.core.config import PartConfig, PromptSourceConfig
from megatron_prism.core.errors import Problem
from megatron_prism.data.prompts import Prompt
from megatron_prism.grade.asserts import asserts_when_run
from megatron_prism.grade.code import tests_problem
from megatron_prism.grade.number import MAX_EXPONENT, without_exponent
from megatron_prism.prepare import records
from megatron_prism.prepare.lines import TooLong
from megatron_prism.prepare.records import BadRecord
from megatron_prism.prepare.sources import Record

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROMPT = "{prompt}"  # in a format
ID_BYTES = 12


class Unsupported(Exception):
    """A record whose tests are of a kind that is not graded: left out and counted, and no fault of the record."""


def part_of(source: PromptSourceConfig) -> PartConfig:
    """Return a source as a part that reads all fields which a prompt needs: files and columns are those of `prism prepare`."""
    return PartConfig(path=source.path, keep=source.keep, text="".join(f"{{{name}}}" for name in fields(source)))


def fields(source: PromptSourceConfig) -> tuple[str, ...]:
    """Return the fields that a prompt is made of, each once."""
    names = [*records.PLACEHOLDER.findall(source.text), *filter(None, [source.gold, source.tests]), *source.choices]
    return tuple(dict.fromkeys(names))


def check_source(source: PromptSourceConfig, where: str) -> list[Problem]:
    """Return the problems between a source's keys. `where` is the source's key."""
    has = {"gold": bool(source.gold), "choices": bool(source.choices), "num_choices": bool(source.num_choices), "tests": bool(source.tests)}
    allowed = {
        "math": [{"gold"}],
        "choice": [{"choices"}, {"gold", "num_choices"}],
        "code": [{"tests"}],
    }[source.kind]
    named = {name for name, is_set in has.items() if is_set}
    problems = []
    if named not in allowed:
        required = " or ".join(" and ".join(sorted(names)) for names in allowed)
        problems.append(Problem(f"{where}.kind", f"{source.kind} with {' and '.join(sorted(named)) or 'nothing to grade by'}", required))
    if len(source.choices) == 1 or len(source.choices) > len(LETTERS):
        problems.append(Problem(f"{where}.choices", f"{len(source.choices)} fields", f"2 to {len(LETTERS)}"))
    if source.gold_after is not None and not source.gold:
        problems.append(Problem(f"{where}.gold_after", repr(source.gold_after), "a field, gold, to look in"))
    if not records.PLACEHOLDER.findall(source.text):
        problems.append(Problem(f"{where}.text", repr(source.text), "at least one {field} of the records"))
    wrong = [index for index, text in enumerate(source.formats) if text.count(PROMPT) != 1]
    problems += [Problem(f"{where}.formats.{index}", repr(source.formats[index]), f"one {PROMPT}") for index in wrong]
    if not source.path:
        problems.append(Problem(f"{where}.path", "an empty list", "at least one file or glob"))
    return problems


def prompt_of(record: Record, source: PromptSourceConfig, seed: int) -> tuple[Prompt, str] | None:
    """Return a record as a prompt, and the text of its problem alone. None: a condition of `keep` is not met.

    Raises: BadRecord where the record gives no prompt. Unsupported for tests that are not graded.
    """
    assert not isinstance(record, TooLong)
    try:
        row = records.row_of(record)
        if not records.is_kept(row, source.keep):
            return None
        row |= {name: value for name in fields(source) if name not in row and (value := _reached(row, name)) is not None}
        text = records.render(row, source.text).strip()
        text.encode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 ({error.reason})", "UTF-8 text") from None
    except UnicodeEncodeError:
        raise BadRecord("half a surrogate pair", "text that UTF-8 can spell") from None
    if not text:
        raise BadRecord("an empty prompt", "text other than white space")
    graded = _graded(row, source)
    function = (graded.get("tests") or {}).get("function")
    if function and not re.search(rf"\b{re.escape(function)}\b", text):
        raise Unsupported(f"the text does not name {function}, which the tests call")
    known = json.dumps([source.kind, text, sorted(graded.get("choices", ()))], ensure_ascii=False)
    id = hashlib.blake2b(known.encode("utf-8", "backslashreplace"), digest_size=ID_BYTES).hexdigest()
    asked = text
    if source.choices:
        right, shuffled = graded["choices"][0], _shuffled(graded["choices"], seed, id)
        graded = {"gold": LETTERS[shuffled.index(right)], "choices": tuple(shuffled)}
        asked = "\n".join([text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, shuffled, strict=False))])
    if source.formats:
        asked = random.Random(f"{seed}/format/{id}").choice(source.formats).replace(PROMPT, asked)
    said = ({"role": "user", "content": asked},) if source.chat else asked
    return Prompt(id=id, domain=source.domain, kind=source.kind, prompt=said, **graded), text


def _reached(row: dict[str, Any], name: str) -> Any:
    """Return what a dotted name leads to, through lists by number and through JSON that is written in a text. None: it leads nowhere."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value := _decoded(value), str):
            value = _parsed(value, name)
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return None  # records.py names the field that is missing, and those there are
    return value


def _shuffled(choices: tuple[str, ...], seed: int, id: str) -> list[str]:
    shuffled = sorted(choices)  # so that the order says nothing of the record's
    random.Random(f"{seed}/choices/{id}").shuffle(shuffled)
    return shuffled


def _graded(row: dict[str, Any], source: PromptSourceConfig) -> dict[str, Any]:
    """Return what grades an answer, as fields of Prompt. Choices come with the right one first."""
    if source.tests is not None:
        return {"tests": tests_of(records.value_of(row, source.tests, "tests"), source.tests)}
    if source.choices:
        texts = tuple(records.render(row, f"{{{name}}}", "choices").strip() for name in source.choices)
        if len(set(texts)) != len(texts) or not all(texts):
            raise BadRecord(f"choices {texts!r}", "different choices, none empty")
        return {"choices": texts}
    assert source.gold is not None
    gold = records.render(row, f"{{{source.gold}}}", "gold")
    if source.gold_after is not None:
        if source.gold_after not in gold:
            raise BadRecord(f"field {source.gold!r} without {source.gold_after!r}", "the answer behind it")
        gold = gold.rpartition(source.gold_after)[2]
    if not (gold := gold.strip()):
        raise BadRecord(f"field {source.gold!r} without an answer", "text other than white space")
    if source.num_choices is None:
        try:
            return {"gold": without_exponent(gold)}
        except ValueError as error:
            raise BadRecord(f"field {source.gold!r} with {error}", f"an exponent of at most {MAX_EXPONENT}") from None
    letters = tuple(LETTERS[: source.num_choices])
    if gold not in letters:
        raise BadRecord(f"field {source.gold!r} {gold!r}", f"one of {', '.join(letters)}")
    return {"gold": gold, "choices": letters}


def tests_of(value: object, name: str) -> dict[str, Any]:
    """Return a field's tests as graded (docs/GRADE.md): of kind stdin, call or asserts.

    Raises: BadRecord for none, or another form. Unsupported for tests that call a named function in another form than LiveCodeBench's.
    """
    value = _parsed(value, name)
    if isinstance(value, dict) and "inputs" in value and "outputs" in value:
        if value.get("fn_name"):
            raise Unsupported("fn_name")
        inputs, outputs = value["inputs"], value["outputs"]
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise BadRecord(f"field {name!r} whose inputs and outputs are no lists of one length", "as many outputs as inputs")
        value = [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]
    if not isinstance(value, list) or not value:
        raise BadRecord(f"field {name!r} {'of type ' + type(value).__name__ if value else 'without a test'}", "at least one test")
    if all(isinstance(test, str) for test in value):
        if wrong := [test for test in value if "assert" not in test]:
            raise BadRecord(f"field {name!r} with {wrong[0]!r:.80}", "assert statements")
        code = "\n".join(value)
        try:
            has_asserts = asserts_when_run(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise BadRecord(f"field {name!r}, which is no Python ({error})", "assert statements") from None
        if not has_asserts:
            raise BadRecord(f"field {name!r}, whose asserts never run", "an assert at the top, or in a function that is called there")
        return {"kind": "asserts", "code": code}
    if any(isinstance(test, dict) and test.get("testtype") == "functional" for test in value):
        return _calls_of(value, name)
    if any(isinstance(test, dict) and (test.get("fn_name") or str(test.get("type", "")).startswith("function")) for test in value):
        raise Unsupported("function calls")
    if not all(isinstance(test, dict) and "input" in test and "output" in test for test in value):
        raise BadRecord(f"field {name!r} with tests of another form", "{input, output}, or texts of assert statements")
    return {"kind": "stdin", "cases": [{"input": _text(test["input"], name), "output": _text(test["output"], name)} for test in value]}


def _calls_of(cases: list[Any], name: str) -> dict[str, Any]:
    """Return tests of a function in LiveCodeBench's form: {testtype: functional, input, output, metadata: {func_name}}.

    Raises: Unsupported where they name no function, not all the same one, or hold what is no JSON.
    """
    are_whole = all(isinstance(case, dict) and case.get("testtype") == "functional" for case in cases)
    metadata = [_parsed(case.get("metadata") or {}, name) for case in cases] if are_whole else []
    names = {str(of.get("func_name", "")) if isinstance(of, dict) else "" for of in metadata}
    tests = {
        "kind": "call",
        "function": names.pop() if len(names) == 1 else "",
        "cases": [{"input": case.get("input"), "output": case.get("output")} for case in cases if are_whole],
    }
    if problem := tests_problem(tests):
        raise Unsupported(problem)
    return tests


def _parsed(value: object, name: str) -> Any:
    """Return a value, with JSON that is written in a text parsed, and the bytes of columnar files decoded."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"field {name!r}, which is no JSON ({error})", "JSON") from None
    return _decoded(value)


def _decoded(value: object) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _decoded(part) for key, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


def _text(value: object, name: str) -> str:
    """Return what a program reads or writes. Some sets write the lines as a list."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRecord(f"field {name!r} with input or output of type {type(value).__name__}", "text")
    return str(value)
