"""From records to a prompt set: what each kind of record becomes, and that none is lost without being counted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import DecontaminateConfig, KeepConfig, PartConfig, PromptsConfig, PromptSourceConfig
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import load
from megatron_prism.data import prompts as prompt_set
from megatron_prism.grade.grader import Grader
from megatron_prism.grade.outcome import item_of
from megatron_prism.jobs import prompts
from megatron_prism.prepare import documents
from megatron_prism.prepare.prompts import prompt_of

MATH: dict[str, Any] = {"name": "math", "domain": "math", "kind": "math", "text": "{question}", "gold": "answer"}
CHOICE: dict[str, Any] = {
    "name": "stem",
    "domain": "science",
    "kind": "choice",
    "text": "{question}",
    "choices": ("right", "w1", "w2", "w3"),
}
CODE: dict[str, Any] = {"name": "code", "domain": "code", "kind": "code", "text": "{problem}", "tests": "tests"}
FORMATS = ("Answer with a letter.\n{prompt}", "{prompt}\nEnd with the letter.", "{prompt}\nWhich one?")


def source(path: Path, records: Sequence[Any], keys: dict[str, Any], **more: Any) -> PromptSourceConfig:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return PromptSourceConfig(path=(str(path),), **{**keys, **more})


def made(tmp_path: Path, records: Sequence[Any], keys: dict[str, Any], **more: Any) -> tuple[prompt_set.Prompt, ...]:
    config = PromptsConfig(out=tmp_path / "out", sources=(source(tmp_path / "records.jsonl", records, keys, **more),))
    prompts.run(config)
    return prompt_set.read(tmp_path / "out")


def stem(number: int) -> dict[str, str]:
    return {"question": f"What is fact {number}?", "right": f"r{number}", "w1": f"a{number}", "w2": f"b{number}", "w3": f"c{number}"}


def test_a_math_answer_stands_in_a_field_or_behind_a_marker(tmp_path: Path) -> None:
    (prompt,) = made(tmp_path, [{"question": "1 + 1?", "answer": "2 #### x\n#### 2 "}], MATH, gold_after="####")
    assert (prompt.kind, prompt.prompt, prompt.gold, prompt.tests) == ("math", "1 + 1?", "2", None)


def test_a_number_is_a_gold_of_plain_decimals(tmp_path: Path) -> None:
    golds = [1e-05, 1e22, "1e-05", "2E3", "x = 2e3", 0.5, 7]
    prompts_read = made(tmp_path, [{"question": f"{number}?", "answer": gold} for number, gold in enumerate(golds)], MATH)
    assert [prompt.gold for prompt in prompts_read] == ["0.00001", "1" + 22 * "0", "0.00001", "2000", "x = 2e3", "0.5", "7"]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [{"role": "user", "content": "1 + 1?"}], "reward": {"truth": '["2"]'}},
        {"prompt": '[{"content": "1 + 1?"}]', "reward": '{"truth": ["2"]}'},
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_field_lies_in_a_list_or_in_json_in_a_text(record: dict[str, Any], ending: str, tmp_path: Path) -> None:
    keys = {**MATH, "text": "{prompt.0.content}", "gold": "reward.truth.0"}
    one = source(tmp_path / "records.jsonl", [record], keys)
    if ending == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "records.parquet")
        one = dataclasses.replace(one, path=(str(tmp_path / "records.parquet"),))
    prompts.run(PromptsConfig(out=tmp_path / "out", sources=(one,)))
    (prompt,) = prompt_set.read(tmp_path / "out")
    assert (prompt.prompt, prompt.gold) == ("1 + 1?", "2")


def test_choices_are_shuffled_by_the_seed_and_the_letter_follows(tmp_path: Path) -> None:
    shuffled = made(tmp_path, [stem(number) for number in range(200)], CHOICE)
    for number, prompt in enumerate(shuffled):
        assert prompt.choices["ABCD".index(prompt.gold)] == f"r{number}"
        assert f"\n{prompt.gold}. r{number}" in str(prompt.prompt)
    letters = [prompt.gold for prompt in shuffled]
    assert all(25 < letters.count(letter) < 75 for letter in "ABCD")


def test_chance_depends_on_the_seed_and_the_problem_alone(tmp_path: Path) -> None:
    keys = {**CHOICE, "formats": FORMATS}
    whole = source(tmp_path / "a.jsonl", [stem(number) for number in range(60)], keys)
    reordered = source(tmp_path / "b.jsonl", [stem(number) for number in range(59, -1, -1)], keys)
    sets = {}
    for name, one, seed in (("a", whole, 1), ("b", reordered, 1), ("c", whole, 2)):
        prompts.run(PromptsConfig(out=tmp_path / name, sources=(one,), seed=seed))
        sets[name] = {prompt.id: prompt for prompt in prompt_set.read(tmp_path / name)}
    assert sets["a"] == sets["b"] != sets["c"]
    assert sets["a"].keys() == sets["c"].keys()  # an id is the problem's, whatever the seed asks it in
    asked = [str(prompt.prompt) for prompt in sets["a"].values()]
    assert 5 < sum(text.startswith("Answer with") for text in asked) < 40 and 5 < sum(text.endswith("one?") for text in asked) < 40


STDIN = {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3"}, {"input": "4", "output": "5"}]}


@pytest.mark.parametrize(
    ("tests", "graded"),
    [
        (json.dumps([{"input": "1 2\n", "output": "3", "type": "stdin_stdout"}, {"input": "4", "output": "5"}]), STDIN),
        ({"inputs": ["1 2\n", "4"], "outputs": ["3", 5]}, STDIN),
        (json.dumps({"inputs": ["1 2\n", ["4"]], "outputs": ["3", "5"]}), STDIN),
        (json.dumps(["assert f(1) == 2", "assert f(2) == 3"]), {"kind": "asserts", "code": "assert f(1) == 2\nassert f(2) == 3"}),
    ],
)
def test_each_sets_form_of_tests_becomes_ours(tests: Any, graded: dict[str, Any], tmp_path: Path) -> None:
    (prompt,) = made(tmp_path, [{"problem": "Add.", "tests": tests}], CODE)
    assert prompt.tests == graded


@pytest.mark.parametrize(
    ("keys", "record", "said"),
    [
        (MATH, "{not json", "not JSON"),
        (MATH, {"question": "x"}, "no field 'answer'; required the fields of `gold`"),
        (CHOICE, {"question": "x", "right": "a"}, "required the fields of `choices`"),
        (MATH, {"question": "x", "answer": " "}, "without an answer"),
        (MATH, {"question": " ", "answer": "1"}, "an empty prompt"),
        (MATH, {"question": "x", "answer": [1]}, "of type list"),
        (MATH, {"question": "x", "answer": float("nan")}, "'answer' nan"),
        (MATH, '{"question": "x", "answer": -1e999}', "'answer' -inf"),
        (MATH, {"question": "x", "answer": "1e999"}, "exponent above"),
        ({**MATH, "gold_after": "####"}, {"question": "x", "answer": "1"}, "without '####'"),
        (CHOICE, {**stem(1), "w1": "r1"}, "different choices"),
        ({**CHOICE, "choices": (), "gold": "right", "num_choices": 4}, stem(1), "one of A, B, C, D"),
        (CODE, {"problem": "x", "tests": "[1"}, "no JSON"),
        (CODE, {"problem": "x", "tests": []}, "without a test"),
        (CODE, {"problem": "x", "tests": {"inputs": ["1"], "outputs": []}}, "one length"),
        (CODE, {"problem": "x", "tests": ["print(1)"]}, "assert"),
        (CODE, {"problem": "x", "tests": ["def test():\n  assert f(1)"]}, "never run"),
        (CODE, {"problem": "x", "tests": ["assert f("]}, "no Python"),
        (CODE, {"problem": "x", "tests": [{"in": 1}]}, "another form"),
    ],
)
def test_a_bad_record_is_named_and_counted(keys: dict[str, Any], record: Any, said: str, tmp_path: Path) -> None:
    good = {"question": "1?", "answer": "#### 1", **stem(9), "problem": "y", "tests": ["assert 1"]}
    good = {**good, "right": "B"} if keys.get("num_choices") else good
    one = source(tmp_path / "records.jsonl", [good, record], keys)
    with pytest.raises(InputError, match=said) as raised:
        prompts.run(PromptsConfig(out=tmp_path / "out", sources=(one,)))
    assert raised.value.problems[0].where == f"{tmp_path / 'records.jsonl'}:2"
    assert not (tmp_path / "out").exists()
    result = prompts.run(PromptsConfig(out=tmp_path / "out", sources=(one,), on_bad_record="skip"))
    assert (result["prompts"], result["sources"][0]["left_out"]) == (1, {"bad": 1})


def test_every_record_is_a_prompt_or_counted(tmp_path: Path) -> None:
    words = "how many integers between one and a hundred are divisible by both two and three"
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"problem": words}) + "\n")
    records = [
        {"question": "a?", "answer": "1", "year": 2020},
        {"question": "a?", "answer": "1", "year": 2020},
        {"question": "b?", "answer": "1", "year": 2010},
        {"question": f"Tell me: {words.title()}!", "answer": "16", "year": 2020},
        {"question": "c" * 2000, "answer": "1", "year": 2020},
    ]
    one = source(tmp_path / "records.jsonl", records, MATH, keep=(KeepConfig(field="year", at_least=2015),))
    functions = source(tmp_path / "code.jsonl", [{"problem": "f", "tests": {"inputs": [], "outputs": [], "fn_name": "f"}}], CODE)
    against = DecontaminateConfig(against=(PartConfig(path=(str(tmp_path / "evaluation.jsonl"),), text="{problem}"),))
    config = PromptsConfig(out=tmp_path / "out", sources=(one, functions), decontaminate=against, max_record_bytes=1000)
    math, code = prompts.run(config)["sources"]
    assert math["left_out"] == {"dedup": 1, "keep": 1, "decontaminate": 1, "too_long": 1} and math["prompts"] == 1
    assert (code["prompts"], code["left_out"]) == (0, {"unsupported_tests": 1})
    assert prompts.run(config)["sources"] == [math, code]  # it is there already
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="decontaminated by an earlier rule of words"):
        patch.setattr(documents, "PLAIN_NAME", "a later one")
        prompts.run(config)
    (tmp_path / "records.jsonl").write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(InputError, match="input files changed"):
        prompts.run(config)


def test_of_many_bad_records_the_first_are_named_and_no_more_are_read_or_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A set of millions whose field has another name."""
    records = [{"question": "a?", "answer": "1"}, *({"problem": str(number), "answer": "1"} for number in range(50))]
    one = source(tmp_path / "records.jsonl", records, MATH)
    with pytest.raises(InputError) as caught:
        prompts.run(PromptsConfig(out=tmp_path / "out", sources=(one,)))
    *named, last = caught.value.problems
    assert len(named) == 20 and (last.found, last.fix) == ("20 bad records", "those behind them were not read")
    result = prompts.run(PromptsConfig(out=tmp_path / "out", sources=(one,), on_bad_record="skip"))
    assert result["sources"][0]["left_out"] == {"bad": 50}
    assert len(caplog.messages) == 21 and "30 bad records more" in caplog.messages[-1]


def test_functions_in_livecodebenchs_form_are_called(tmp_path: Path) -> None:
    def test(**other: Any) -> dict[str, Any]:
        named = {"func_name": "add"}
        return {"input": "[1, 2]\n3", "output": "6", "testtype": "functional", "metadata": named, **other}

    fit = [[test(), test(input="[]\n0", output="0")], json.dumps([test(metadata='{"func_name": "add"}')])]
    unfit = [
        [test(metadata=None)],
        [test(), test(metadata={"func_name": "other"})],
        [test(), {**test(), "testtype": "stdin"}],
        [test(input="no JSON")],
        [test(input=[1])],
    ]
    records = [{"problem": f"def add: {number}", "tests": tests} for number, tests in enumerate([*fit, *unfit])]
    records.append({"problem": "added up", "tests": [test()]})  # a name that the model is not told
    first, second = made(tmp_path, records, CODE)
    cases = [{"input": "[1, 2]\n3", "output": "6"}, {"input": "[]\n0", "output": "0"}]
    assert first.tests == {"kind": "call", "function": "add", "cases": cases}
    assert second.tests == {"kind": "call", "function": "add", "cases": cases[:1]}
    (counts,) = json.loads((tmp_path / "out/manifest.json").read_text())["sources"]
    assert counts["left_out"] == {"unsupported_tests": len(unfit) + 1}
    item = item_of(
        first, "r", "<think>a</think>```python\nclass Solution:\n    def add(self, a, b):\n        return sum(a) + b\n```", False
    )
    with Grader(GradeConfig(), ["code"]) as grader:
        assert grader.grade([item])["r"].outcome == "right"


def test_of_more_than_its_limit_a_source_draws_by_lot_in_whatever_order(tmp_path: Path) -> None:
    records = [{"question": f"{number}?", "answer": str(number)} for number in [*range(40), *range(0, 40, 3)]]  # some twice
    first = made(tmp_path, records, MATH, limit=10)
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["sources"][0]
    assert (len(first), counts["records"], sum(counts["left_out"].values())) == (10, len(records), len(records) - 10)
    assert [int(prompt.gold) for prompt in first] == sorted(int(prompt.gold) for prompt in first) != list(range(10))
    (other := tmp_path / "other").mkdir()
    assert {prompt.id for prompt in made(other, records[::-1], MATH, limit=10)} == {prompt.id for prompt in first}
    rest = source(tmp_path / "rest.jsonl", records, MATH, name="rest")  # what was not drawn comes from another source
    config = PromptsConfig(out=tmp_path / "both", sources=(source(tmp_path / "records.jsonl", records, MATH, limit=10), rest))
    prompts.run(config)
    assert len(prompt_set.read(tmp_path / "both")) == 40


def test_the_same_problem_with_another_gold_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = [{"question": "a?", "answer": answer} for answer in ("1", "2", 1)]
    chosen = [stem(1), {**stem(1), "right": "a1", "w1": "r1"}, {**stem(1), "w1": "b1", "w2": "a1"}]
    math, stems = source(tmp_path / "math.jsonl", asked, MATH), source(tmp_path / "stem.jsonl", chosen, CHOICE)
    with caplog.at_level("WARNING"):
        result = prompts.run(PromptsConfig(out=tmp_path / "out", sources=(math, stems)))
    for of_source in result["sources"]:
        assert (of_source["prompts"], of_source["left_out"]) == (1, {"dedup": 1, "dedup_other_gold": 1})
    assert prompt_set.read(tmp_path / "out")[0].gold == "1"
    assert caplog.text.count("with another gold") == 2


def test_a_set_that_was_changed_is_refused(tmp_path: Path) -> None:
    made(tmp_path, [{"question": "1?", "answer": "1"}], MATH)
    path = tmp_path / "out" / "prompts.jsonl"
    path.write_text(path.read_text().replace('"gold": "1"', '"gold": "2"'))
    with pytest.raises(InputError, match="as its manifest says"):
        prompt_set.read(tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({**MATH, "gold": None}, "nothing to grade by"),
        ({**MATH, "tests": "tests"}, "gold and tests"),
        ({**CHOICE, "choices": ("right",)}, "1 fields"),
        ({**CODE, "formats": ("no place",)}, "{prompt}"),
        ({**MATH, "text": "fixed"}, "{field}"),
    ],
)
def test_a_config_that_cannot_be_graded_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        made(tmp_path, [{"question": "1?", "answer": "1"}], keys)
    assert said in str(raised.value)


def test_a_chat_prompt_is_a_users_turn() -> None:
    one = PromptSourceConfig(path=("x",), chat=True, **MATH)
    prompt_and_text = prompt_of(json.dumps({"question": "1?", "answer": "1"}).encode(), one, seed=0)
    assert prompt_and_text is not None and prompt_and_text[0].prompt == ({"role": "user", "content": "1?"},)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[3] / "configs" / "prompts").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_papers_sets_are_valid_configs(path: Path) -> None:
    config = load(path, PromptsConfig)
    assert prompts._check(config) == [] and config.sources[0].hf_id and "UNVERIFIED" in path.read_text()
