"""Two evaluations are joined by task, question and sample, and what was asked, sampled or graded otherwise is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_prism.core.errors import InputError
from megatron_prism.eval.question import Result, to_line
from megatron_prism.eval.verdicts.paired import pair, read, told, unlike
from tests.unit.eval.two_evaluations import PROTOCOL, result, scores, write


def both(tmp_path: Path, old: list[Result], new: list[Result]) -> tuple:
    return read(write(tmp_path / "old", old)), read(write(tmp_path / "new", new))


def test_responses_are_joined_by_id_whatever_their_order(tmp_path: Path) -> None:
    old = [result("a", id, score, sample) for id, sample, score in (("x", 0, 1), ("x", 1, 0), ("y", 0, 0), ("y", 1, 0), ("z", 0, 1))]
    new = [result("a", id, score, sample) for id, sample, score in (("y", 1, 1), ("w", 0, 1), ("x", 1, 1), ("y", 0, 0), ("x", 0, 0))]
    pairs = pair("a", *both(tmp_path, old, new))
    assert pairs.keys == (("x", 0), ("x", 1), ("y", 0), ("y", 1)) and pairs.question.tolist() == [0, 0, 1, 1]
    assert (pairs.old.tolist(), pairs.new.tolist()) == ([1, 0, 0, 0], [0, 1, 0, 1])
    assert (pairs.only_old, pairs.only_new, pairs.num_masked, pairs.num_unpaired) == (("z",), ("w",), 0, 0)


def test_a_fault_of_either_masks_the_pair_and_more_samples_of_one_are_left_out(tmp_path: Path) -> None:
    old = [result("a", "x", score, sample) for sample, score in enumerate([1, None, 0, 1])] + [result("a", "y", None)]
    new = [result("a", "x", score, sample) for sample, score in enumerate([1, 1, None])] + [result("a", "y", 1)]
    pairs = pair("a", *both(tmp_path, old, new))
    assert pairs.keys == (("x", 0),) and pairs.ids == ("x",) and pairs.num_masked == 3 and pairs.num_unpaired == 1


CHANGED = [
    ({"protocol": {**PROTOCOL, "temperature": 1.0}}, "protocol.temperature is 1.0, and was 0.6"),
    ({"protocol": {**PROTOCOL, "think": "required"}}, "protocol.think is 'required', and was 'free'"),
    ({"protocol": {**PROTOCOL, "style": "chat template 1"}}, "protocol.style is 'chat template 1', and was 'plain text'"),
    ({"protocol": {**PROTOCOL, "grader": {"math-verify": "2"}}}, "protocol.grader.math-verify is '2', and was None"),
    ({"set": {"name": "a", "sha256": "b"}}, "set.sha256 is 'b', and was None"),
    ({"bos": "none"}, "bos is 'none', and was 'one'"),
]


@pytest.mark.parametrize(("summary", "reason"), CHANGED, ids=[reason for _, reason in CHANGED])
def test_a_setting_that_differs_is_a_reason(tmp_path: Path, summary: dict, reason: str) -> None:
    old = read(write(tmp_path / "old", scores("a", [1, 0])))
    assert unlike("a", old, read(write(tmp_path / "new", scores("a", [1, 0]), tasks={"a": summary}))) == [reason]
    accepted = unlike("a", old, read(tmp_path / "new"), accept_other_prompts=True)
    assert accepted == ([] if reason.startswith(("protocol.style", "bos")) else [reason])


def test_more_samples_are_no_other_protocol(tmp_path: Path) -> None:
    grown = {"a": {"protocol": {**PROTOCOL, "num_samples": 64}, "set": {"name": "a", "path": "elsewhere", "limit": 2}}}
    old, new = (read(write(tmp_path / name, scores("a", [1, 0]), tasks=of)) for name, of in (("old", {}), ("new", grown)))
    assert unlike("a", old, new) == []


def test_a_task_of_lm_eval_is_known_by_lm_evals_version_and_its_own_settings(tmp_path: Path) -> None:
    def figures(version: str, metric: str) -> dict:
        return {
            "board": {"lm_eval": {"version": version, "bos": "one", "chat": False, "tasks": {"b": {"metric": metric, "num_fewshot": 5}}}}
        }

    old, new = (
        read(write(tmp_path / version, scores("lm_eval/b", [1, 0]), tasks=figures(version, metric)))
        for version, metric in (("0.4.9", "acc"), ("0.4.13", "acc_norm"))
    )
    assert unlike("lm_eval/b", old, old) == []
    assert unlike("lm_eval/b", old, new) == ["lm_eval.version is '0.4.13', and was '0.4.9'", "b.metric is 'acc_norm', and was 'acc'"]


def test_a_changed_prompt_is_a_reason(tmp_path: Path) -> None:
    new = [dataclasses.replace(one, prompt_sha256="other") if one.id > "q0001" else one for one in scores("a", [1, 0, 1, 1, 0, 0])]
    evaluations = both(tmp_path, scores("a", [1, 0, 1, 1, 0, 0]), new)
    assert unlike("a", *evaluations) == ["the prompts of 4 of 6 questions differ (q0002, q0003, q0004, and 1 more)"]
    assert unlike("a", *evaluations, accept_other_prompts=True) == []


def test_other_ids_and_an_absent_task_are_reasons(tmp_path: Path) -> None:
    evaluations = both(tmp_path, scores("a", [1, 0]), [result("a", "p", 1), *scores("b", [1])])
    assert unlike("a", *evaluations) == ["no question has the same id in both"]
    assert unlike("b", *evaluations) == [f"{tmp_path / 'old'} has no responses to it"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ([*scores("a", [1]), *scores("a", [0])], "results.jsonl:2: found a q0000 sample 0 again"),
        ([result("a", "x", 1.5)], "results.jsonl:1: found score 1.5; required a share"),
        ([result("a", "x", float("nan"))], "results.jsonl:1"),
        ([dataclasses.replace(result("a", "x", 0), outcome="fault")], "outcome fault, score 0"),
        ([dataclasses.replace(result("a", "x", 0), score=None)], "outcome wrong, score None"),
    ],
    ids=["twice", "no share", "NaN", "a fault of 0", "no score"],
)
def test_a_folder_that_is_wrong_is_refused(tmp_path: Path, broken: list[Result], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(write(tmp_path / "a", broken))


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, said in ((tmp_path, "no summary.json"), (tmp_path / "nope", "no such folder"), (tmp_path / "file", "a file")):
        with pytest.raises(
            InputError, match=f"^{folder}: found {said}; required the folder of an evaluation .*; prism evaluate makes one$"
        ):
            read(folder)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(InputError, match=f"^{tmp_path}: found no summary.json; .*start prism evaluate again: it goes on$"):
        read(tmp_path)
    folder = write(tmp_path / "a", scores("a", [1]))
    (folder / "results.jsonl").write_text(to_line(result("a", "x", 0)))
    with pytest.raises(InputError, match="results.jsonl: found sha256"):
        read(folder)
    with pytest.raises(InputError, match="kind 'run'"):
        read(write(tmp_path / "b", [], kind="run"))
    path = write(tmp_path / "c", scores("a", [1])) / "summary.json"
    summary = json.loads(path.read_text())
    for name, value, said in (
        ("tasks", None, "AttributeError"),
        ("tasks", {"a": {"set": "math500"}}, "tasks.a: found a protocol or a set that is no object"),
        ("results_sha256", None, "results.jsonl: found sha256"),
        ("results_sha256", ..., "KeyError: 'results_sha256'"),
    ):
        path.write_text(json.dumps({key: part for key, part in (summary | {name: value}).items() if part is not ...}))
        with pytest.raises(InputError, match=said):
            read(path.parent)


def test_another_engine_is_told_and_no_reason(tmp_path: Path) -> None:
    old = read(write(tmp_path / "old", scores("a", [1, 0])))
    new = read(write(tmp_path / "new", scores("a", [1, 0]), engine="vllm"))
    assert unlike("a", old, new) == [] and told(old, new) == ["engine is 'vllm', and was 'cached'"] and told(old, old) == []


def test_responses_that_a_context_cuts_are_told(tmp_path: Path) -> None:
    """A model of 2k positions against one of 32k: the change may be the context alone."""
    old = read(write(tmp_path / "old", scores("a", [1, 0]), {"a": {"num_shortened": 2, "num_clipped": 0}}))
    new = read(write(tmp_path / "new", scores("a", [1, 0]), {"a": {"num_shortened": 0, "num_clipped": 0}}))
    assert unlike("a", old, new) == [] and told(old, new) == ["tasks.a.num_shortened is 0, and was 2"] and told(old, old) == []
