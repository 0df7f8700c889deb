"""From questions to requests: seeds, begin-of-text tokens, the context, plain text and chat, and what an end is."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config.grade import GradeLimits
from megatron_prism.core.errors import InputError
from megatron_prism.data import chat, tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.eval import evaluation, requests, summary
from megatron_prism.eval.cache import Kept
from megatron_prism.eval.judge import Judge
from megatron_prism.eval.question import Question
from megatron_prism.eval.sample import Local
from megatron_prism.eval.sets import own_file
from megatron_prism.eval.tasks import Task
from megatron_prism.generate.engine import Ending, Rollout, ids_of, logprobs_of
from megatron_prism.grade.grader import Grader

PROTOCOL = replace(own_file.PROTOCOL, num_samples=4, temperature=0.6, max_tokens=8)
WEIGHTS = {"sha256": "0"}


def task(*prompts: Any, **changes: Any) -> Task:
    questions = tuple(Question(id=f"q{n}", prompt=prompt, kind="math", gold="1") for n, prompt in enumerate(prompts))
    return replace(Task("t", "file", questions, PROTOCOL, False, {}), **changes)


@pytest.fixture(scope="module")
def spec(tiny_tokenizer: Path) -> TokenizerSpec:
    return tokenizer.load(tiny_tokenizer)


@pytest.fixture(scope="module")
def with_bos(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizerSpec:
    """Return the tokenizer with a post-processor that puts BOS before a text, as LLaMA's has."""
    folder = tmp_path_factory.mktemp("bos") / "tokenizer"
    shutil.copytree(tiny_tokenizer, folder)
    values = json.loads((folder / tokenizer.FILE).read_text())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / tokenizer.FILE).write_text(json.dumps(values))
    return tokenizer.load(folder)


def ask(one: Task, spec: TokenizerSpec, context: int = 64, overlong: Any = "shorten", bos: str = "tokenizer") -> tuple[requests.Asked, ...]:
    asked, problems = requests.ask(one, spec, None, context, overlong, bos)
    assert not problems
    return asked


def test_trap_1_each_sample_of_each_question_has_its_own_seed_and_key(spec: TokenizerSpec) -> None:
    one = task("a", "b", "a")
    made = list(requests.of_task(one, ask(one, spec), WEIGHTS, 7, spec.end_ids))
    assert len({request.seed for request in made}) == len({request.key for request in made}) == 12  # two questions with one prompt, too
    grown = replace(one, protocol=replace(PROTOCOL, num_samples=6), questions=one.questions[:1])
    more = list(requests.of_task(grown, ask(grown, spec), WEIGHTS, 7, spec.end_ids))
    assert [request.key for request in more[:4]] == [request.key for request in made[:4]]
    others = {
        "seed": requests.of_task(one, ask(one, spec), WEIGHTS, 8, spec.end_ids),
        "model": requests.of_task(one, ask(one, spec), {"sha256": "1"}, 7, spec.end_ids),
        "end tokens": requests.of_task(one, ask(one, spec), WEIGHTS, 7, (*spec.end_ids, 5)),
        "sampling": requests.of_task(replace(one, protocol=replace(PROTOCOL, temperature=0.7)), ask(one, spec), WEIGHTS, 7, spec.end_ids),
        "prompt": requests.of_task(one, ask(task("a ", "b ", "c"), spec), WEIGHTS, 7, spec.end_ids),
    }
    for what, other in others.items():
        assert not {request.key for request in other} & {request.key for request in made}, what


def test_trap_4_how_many_begin_of_text_tokens_there_are_is_known(spec: TokenizerSpec, with_bos: TokenizerSpec) -> None:
    plain, spelled = task("a"), task("<s>a")
    words = {"none": ask(plain, spec), "one": ask(plain, with_bos), "two": ask(spelled, with_bos), "mixed": ask(task("a", "<s>a"), spec)}
    assert {word: summary.num_bos(asked) for word, asked in words.items()} == {word: word for word in words}
    for one in (plain, spelled):
        for own in (spec, with_bos):
            assert summary.num_bos(ask(one, own, bos="one")) == "one" and summary.num_bos(ask(one, own, bos="none")) == "none"
    assert ask(plain, with_bos, bos="none")[0].prompt_sha256 == ask(plain, spec)[0].prompt_sha256 != ask(plain, with_bos)[0].prompt_sha256


def test_a_prompt_of_no_tokens_is_refused(spec: TokenizerSpec) -> None:
    for bos, is_refused in (("none", True), ("tokenizer", False), ("one", False)):
        _, problems = requests.ask(task("", "a"), spec, None, 64, "shorten", bos)
        assert [(problem.where, problem.found) for problem in problems] == [("tasks.t question q0", "a prompt of 0 tokens")] * is_refused


def test_trap_7_a_chat_is_not_the_plain_text(tiny_tokenizer: Path, spec: TokenizerSpec, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(tiny_tokenizer, folder)
    (folder / chat.FILE).write_text("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ")
    plain, turns = task("Add 1."), ({"role": "user", "content": "Add 1."},)
    asked, _ = requests.ask(replace(plain, is_chat=True), spec, chat.load(folder), 64, "shorten", "tokenizer")
    (same,), _ = requests.ask(task(turns), spec, chat.load(folder), 64, "shorten", "tokenizer")
    assert tokenizer.decode(asked[0].tokens, spec) == "<s>[user] Add 1.\n[assistant] " and asked[0].num_bos == 1
    assert same.tokens == asked[0].tokens != ask(plain, spec)[0].tokens


def test_a_prompt_without_room_is_shortened_clipped_or_refused(with_bos: TokenizerSpec) -> None:
    long = task("and " * 20)
    (whole,) = ask(long, with_bos, context=100)
    size = len(whole.tokens)
    assert not whole.is_shortened and whole.num_clipped == 0
    (shortened,) = ask(long, with_bos, context=size + 3)
    assert shortened.is_shortened and shortened.room == 3 and shortened.tokens == whole.tokens
    (clipped,) = ask(long, with_bos, context=size + 3, overlong="clip")
    assert clipped.num_clipped == 5 and not clipped.is_shortened and clipped.num_bos == 1
    assert [*clipped.tokens] == [whole.tokens[0], *whole.tokens[6:]] and clipped.prompt_sha256 != whole.prompt_sha256
    for context, overlong in ((size + 3, "refuse"), (size, "shorten"), (size - 30, "refuse"), (7, "clip")):
        _, (problem,) = requests.ask(long, with_bos, None, context, overlong, "tokenizer")  # type: ignore[arg-type]
        assert problem.where == "tasks.t question q0" and f"at most the context of {context}" in problem.required
        assert ("overlong: clip" in (problem.fix or "")) == (overlong != "clip")  # the way out is not where the user stands


def test_shards_have_one_sampling_each_and_hold_every_request_once(spec: TokenizerSpec) -> None:
    one = task("a", "b b b b", "c c", "d")
    asked = [replace(part, max_tokens=8 if number % 2 else 4) for number, part in enumerate(ask(one, spec))]
    made = list(requests.of_task(one, asked, WEIGHTS, 7, spec.end_ids))
    shards = requests.shards(made, 3)
    assert sorted(request.key for shard in shards for request in shard) == sorted(request.key for request in made)
    assert all(len(shard) <= 3 and len({request.sampling for request in shard}) == 1 for shard in shards)
    assert requests.shards([], 3) == []


class Said:
    """An engine that says what it is told, each response with how it ended."""

    def __init__(self, *said: tuple[Sequence[int], Ending]) -> None:
        self.said = said

    def generate(self, prompts: Any, num_samples: int, sampling: Any, seeds: Any) -> list[Rollout]:
        return [Rollout(n, 0, 0, ids_of(ids), logprobs_of((-0.5,) * len(ids)), ended) for n, (ids, ended) in enumerate(self.said)]


def test_trap_8_any_end_token_ends_and_a_context_that_ends_in_thought_is_truncated(
    spec: TokenizerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_ends = replace(spec, ends=(("config.json", (2,)), ("generation_config.json", (2, 9))))
    one = task("a", "b", "c", protocol=replace(PROTOCOL, num_samples=1))
    made = list(requests.of_task(one, ask(one, two_ends), WEIGHTS, 7, two_ends.end_ids))
    assert made[0].sampling.end_ids == (2, 9)
    answer, thought = tokenizer.encode_text("so \\boxed{1}", spec), tokenizer.encode_text("<think> \\boxed{1}", spec)
    monkeypatch.setattr("megatron_prism.eval.sample.from_first", lambda value: value)
    engine: Any = Said(([*answer, 9], "end_token"), (thought, "max_context"), (answer, "max_tokens"))
    samples, faults = Local(engine, two_ends).sample(made)
    assert [one["text"] for one in samples.values()] == ["so \\boxed{1}", "<think> \\boxed{1}", "so \\boxed{1}"] and not faults
    kept = Kept(tmp_path / "samples")
    kept.write(samples)
    versions = evaluation.grader_versions()
    judge = Judge({"t": one}, GradeLimits(), kept, Kept(tmp_path / "grades"), lambda config: Grader(config), versions)
    assert judge.ungraded(made) == made
    judge.grade(made)
    assert [judge.result(one).outcome for one in made] == ["right", "truncated", "truncated"] and judge.ungraded(made) == []
    stricter = replace(judge, tasks={"t": replace(one, protocol=replace(one.protocol, think="required"))})
    assert stricter.ungraded(made) == made  # another way to grade is another grade
    monkeypatch.setattr("megatron_prism.grade.grader.VERSION", "another")
    assert replace(judge, versions=evaluation.grader_versions()).ungraded(made) == made  # so do graders of another version


def test_responses_of_an_engine_without_log_probabilities_are_kept(spec: TokenizerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Said):  # as vLLM's at a temperature of 0.6, or under top_p
        def generate(self, *asked: Any) -> list[Rollout]:
            return [replace(rollout, logprobs=()) for rollout in super().generate(*asked)]

    one = task("a", protocol=replace(PROTOCOL, num_samples=1))
    made = list(requests.of_task(one, ask(one, spec), WEIGHTS, 7, spec.end_ids))
    monkeypatch.setattr("megatron_prism.eval.sample.from_first", lambda value: value)
    engine: Any = Bare((tokenizer.encode_text("so \\boxed{1}", spec), "end_token"))
    samples, faults = Local(engine, spec).sample(made)
    assert [(one["text"], one["mean_logprob"]) for one in samples.values()] == [("so \\boxed{1}", None)] and not faults


def test_trap_6_outcomes_in_another_order_do_not_shift(spec: TokenizerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = task("a", "b", "c", protocol=replace(PROTOCOL, num_samples=1))
    made = list(requests.of_task(one, ask(one, spec), WEIGHTS, 7, spec.end_ids))
    kept = Kept(tmp_path / "samples")
    kept.write(
        {
            request.key: {"text": text, "num_tokens": 1, "ended": "end_token"}
            for request, text in zip(made, ["\\boxed{1}", "", "5"], strict=True)
        }
    )

    class Reversed(Grader):
        def grade(self, items: Any) -> Any:
            return dict(reversed(super().grade(items).items()))

    judge = Judge({"t": one}, GradeLimits(), kept, Kept(tmp_path / "grades"), lambda config: Reversed(config), {})
    judge.grade(made)
    assert [judge.result(request).outcome for request in reversed(made)] == ["wrong", "no_format", "right"]


def test_a_file_of_ones_own_names_every_wrong_line(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "kind": "math", "prompt": "1 + 1", "gold": "2"},
        {"id": "b", "kind": "choice", "prompt": "?", "gold": "C", "choices": ["x", "y"]},
        {"id": "a", "kind": "math", "prompt": "again", "gold": "2"},
        {"id": "c", "kind": "code", "prompt": "f"},
        {"id": "d", "kind": "math", "prompt": "?", "gold": " "},
        {"id": "e", "kind": "math", "prompt": "?", "gold": "1", "answer": "1"},
        {"id": "f", "kind": "poem", "prompt": "?"},
        {"id": "g", "kind": "strings", "prompt": "?", "gold": "all", "choices": ["x"]},
        {"id": "h", "kind": "strings", "prompt": "?", "gold": "x"},
        {"id": "i", "kind": "math", "prompt": "?", "gold": "1", "max_tokens": 0},
        {"id": "j", "kind": "math", "prompt": "?", "gold": "1", "max_tokens": -5},
        {"id": "k", "kind": "code", "prompt": "f", "tests": {"kind": "stdin", "cases": []}},
        {"id": "l", "kind": "code", "prompt": "f", "tests": {"kind": "asserts", "code": "assert f(1) == 2", "prompt": "def f(x):"}},
        {"id": "m", "kind": "math", "prompt": [{"role": "user", "text": "?"}], "gold": "1"},
        {"id": "n", "kind": "math", "prompt": [], "gold": "1"},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n\n")
    with pytest.raises(InputError) as raised:
        own_file.load(path)
    places = [problem.where.removeprefix(f"{path}:") for problem in raised.value.problems]
    assert places == [
        "2:gold",
        "3:id",
        "4:tests",
        "5:gold",
        "6:answer",
        "7:kind",
        "9:gold",
        "10:max_tokens",
        "11:max_tokens",
        "12:tests",
        "13:tests",
        "14:prompt",
        "15:prompt",
        "16",
    ]
    path.write_text(json.dumps(lines[0]))
    assert own_file.load(path)[0].gold == "2"
    path.write_text('{"text": "x"}\n' * 1000)  # another file
    with pytest.raises(InputError, match="000 problems in all") as raised:
        own_file.load(path)
    assert len(raised.value.problems) == 24 + 1


def test_ids_and_golds_of_a_file_of_ones_own_may_be_numbers(tmp_path: Path) -> None:
    (path := tmp_path / "set.jsonl").write_text(
        "".join(json.dumps({"id": id, "kind": "math", "prompt": "?", "gold": gold}) + "\n" for id, gold in enumerate((1e-05, 42, "x")))
    )
    assert [(one.id, one.gold) for one in own_file.load(path)] == [("0", "0.00001"), ("1", "42"), ("2", "x")]
    for wrong in ('{"id": 1, "kind": "math", "prompt": "?", "gold": NaN}', '{"id": true, "kind": "math", "prompt": "?", "gold": 1}'):
        path.write_text(wrong)
        with pytest.raises(InputError, match=f"{path}:1"):
            own_file.load(path)


def test_a_file_of_ones_own_may_be_packed_and_is_refused_where_it_is_one_document(tmp_path: Path) -> None:
    line = json.dumps({"id": "a", "kind": "math", "prompt": "1\u2028+ 1", "gold": "2"}, ensure_ascii=False).encode()
    for name, data in {"a.jsonl.gz": gzip.compress(line), "a.jsonl": b"\xef\xbb\xbf" + line + b"\r\n\r\n", "a.txt": line + b"\n"}.items():
        (tmp_path / name).write_bytes(data)
        assert [one.prompt for one in own_file.load(tmp_path / name)] == ["1\u2028+ 1"]
    for name, data, found in (
        ("b.jsonl", b"[\n" + line + b"]", "an array"),
        ("b.parquet", b"PAR1", "a .parquet file"),
        ("b.jsonl.gz", b"", "no "),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=found):
            own_file.load(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        own_file.load(tmp_path / "c.jsonl")
