"""`prism evaluate` before anything starts: what the command line means, and what is refused, all at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_prism.cli import gang, options
from megatron_prism.cli.entry import app
from megatron_prism.core.check.evaluate import check_evaluate, kind_of
from megatron_prism.core.config import EvaluateConfig, EvaluatedConfig, TaskConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, ResultFailure
from megatron_prism.core.load import build, load
from megatron_prism.eval import evaluation, folder, measured, summary
from megatron_prism.eval import model as models
from megatron_prism.eval.measured import Measured
from megatron_prism.eval.question import Result
from megatron_prism.jobs import evaluate
from tests.unit.eval.two_evaluations import result, scores, write

TASK = {"set": "file", "path": "set.jsonl"}
LOSSES = {"held_out": {"mixture": "m", "seq_length": 8}}


def config(**values: Any) -> EvaluateConfig:
    return build({"out": "out", "precision": "fp32", "model": {"hf": "hf"}, "tasks": {"mine": TASK}, **values}, EvaluateConfig, str)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{n}", "kind": "math", "prompt": f"{n} and", "gold": "1"}) + "\n" for n in range(5)))
    return path


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--hf", "m/a", "--tasks", "x=a.jsonl,y", "--limit", "3"], {"hf": "m/a", "out": "evaluations/a", "limit": 3}),
        (
            ["seed=4", "--ckpt", "runs/b", "--tasks", "x=a.jsonl,y", "--out", "o", "--num-samples", "2"],
            {"checkpoint": "runs/b", "out": "o", "seed": 4},
        ),
    ],
)
def test_the_options_are_a_config(words: list[str], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr(gang, "run", lambda job, kind, path, given, *rest: seen.append((path, load(path, kind, given))) or {})
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert result.exit_code == 0, result.exception
    ((path, made),) = seen
    assert path is None and {str(made.model.hf or made.model.checkpoint), str(made.out)} == {
        values.get("hf", values.get("checkpoint")),
        values["out"],
    }
    assert made.tasks["x"].path == Path("a.jsonl") and made.tasks["y"].set == "y" and made.tasks["y"].path is None
    assert made.seed == values.get("seed", 1234)
    assert {(one.limit, one.num_samples) for one in made.tasks.values()} == {(3, None) if "limit" in values else (None, 2)}


def test_a_path_of_the_options_is_no_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(gang, "run", lambda job, kind, path, given, *rest: seen.append(load(path, kind, given)) or {})
    words = ["--hf", "m #2", "--tasks", "x=a #1: b.jsonl, y=[c]", "--out", 'o "#3"', "--against", "1 #4"]
    assert CliRunner().invoke(app, ["evaluate", *words]).exit_code == 0
    (made,) = seen
    named = made.model.hf, made.tasks["x"].path, made.tasks["y"].path, made.out, made.against
    assert [str(path) for path in named] == ["m #2", "a #1: b.jsonl", "[c]", 'o "#3"', "1 #4"]


def test_two_models_and_no_task_are_named_each() -> None:
    raised = CliRunner().invoke(app, ["evaluate", "--hf", "a", "--ckpt", "b"]).exception
    assert isinstance(raised, InputError)
    assert [(one.where, one.found) for one in raised.problems] == [("--hf, --ckpt", "a and b"), ("--tasks", "no task")]


def test_a_task_that_is_named_twice_is_refused() -> None:
    assert "x twice" in str(CliRunner().invoke(app, ["evaluate", "--hf", "a", "--tasks", "x=a,x=b"]).exception)


def test_a_file_without_a_name_is_no_task() -> None:
    """A dot in it would make two keys of an override."""
    raised = CliRunner().invoke(app, ["evaluate", "--hf", "a", "--tasks", "math500,data/math500.jsonl,a.b=c"]).exception
    assert isinstance(raised, InputError)
    assert [(one.where, one.found) for one in raised.problems] == [("--tasks", "'data/math500.jsonl'"), ("--tasks", "'a.b=c'")]
    assert "NAME=FILE" in str(raised)


@pytest.mark.parametrize("is_run", [False, True])
def test_a_checkpoint_is_no_hugging_face_folder(is_run: bool, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Its weights would be read by shards that it does not have."""
    path = tiny_checkpoint
    if is_run:
        path = tmp_path / "run"
        shutil.copytree(tiny_checkpoint, path / "checkpoints" / "step_00000001")
    with pytest.raises(InputError) as raised:
        models.read(EvaluatedConfig(hf=path))
    (problem,) = raised.value.problems
    assert problem.where == str(path) and "Hugging Face" in problem.required


@pytest.mark.parametrize(
    "words",
    [
        ["--tasks", "x"],
        ["a.yaml", "--tasks", "x"],
        ["a.yaml", "--limit", "3"],
        ["--hf", "a"],
        ["--hf", "a", "--ckpt", "b", "--tasks", "x"],
        ["a.yaml", "--hf", "a", "--tasks", "x"],
    ],
)
def test_two_ways_at_once_are_refused(words: list[str]) -> None:
    assert isinstance(CliRunner().invoke(app, ["evaluate", *words]).exception, InputError)


def test_every_problem_of_a_config_is_named() -> None:
    served = {"url": "ftp://a", "model": "m", "api": "chat"}
    tasks = {
        "a b": TASK,
        "ruler": {"held_out": {"mixture": "m", "seq_length": 8}},
        "lm_eval": {"num_samples": 3},
        "c": {**TASK, "top_p": 0.0},
        "d": {**TASK, "temperature": 1e-40},
    }
    made = config(model={"hf": "hf", "endpoint": served}, tasks=tasks, bos="one")
    assert [problem.where for problem in check_evaluate(made, 2)] == [
        "model.endpoint.url",
        "tasks.c.top_p",
        "model",
        "model.endpoint",
        "model.endpoint.api",
        "bos",
        "tasks",
        "tasks.a b",
        "tasks.lm_eval.lm_eval.names",
        "tasks.lm_eval.num_samples",
        "tasks.d.temperature",
    ]
    assert not check_evaluate(config(), 1)


def test_how_a_task_is_evaluated_follows_from_its_set_or_its_name() -> None:
    tasks = {
        "leaderboard_v1": {"lm_eval": {"files": {"": "x"}}},
        "words": {"lm_eval": {"names": ["lambada_openai"]}},
        "ruler": {},
        "long": {"set": "ruler"},
        "losses": {"held_out": {"mixture": "m", "seq_length": 8}},
        "math500": {"path": "a"},
    }
    made = config(tasks=tasks)
    assert not check_evaluate(made, 1)
    kinds = [kind_of(name, task) for name, task in made.tasks.items()]
    assert kinds == ["lm_eval", "lm_eval", "ruler", "ruler", "held_out", "questions"]
    assert Measured("leaderboard_v1", made.tasks["leaderboard_v1"], None, {}).names == ("leaderboard_v1",)


def test_a_verdict_that_fails_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "run", lambda *_: {"failure": "math500 fell"})
    raised = CliRunner().invoke(app, ["evaluate", "--hf", "a", "--tasks", "x", "--against", "b"]).exception
    assert isinstance(raised, ResultFailure) and raised.exit_code == 1 and "fell" in str(raised)


def test_all_inputs_are_checked_before_anything_is_written(tmp_path: Path, tiny_checkpoint: Path, questions: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("not ours")
    tasks = {"absent": {"set": "file", "path": str(tmp_path / "no")}, "unknown": {}, "mine": {"set": "file"}}
    with pytest.raises(InputError) as raised:
        evaluate.resolve(config(out=str(tmp_path / "out"), model={"hf": str(tmp_path / "hf")}, tasks=tasks), 1)
    said = [problem.where for problem in raised.value.problems]
    assert len(said) == 5 and {"tasks.unknown.set", "tasks.mine.path", f"out ({tmp_path / 'out'})"} <= set(said)
    given = {"model": {"checkpoint": str(tiny_checkpoint)}, "out": str(tmp_path / "new"), "overlong": "refuse"}
    with pytest.raises(InputError, match="question q0: found a prompt of .* tokens, and responses of 100000"):
        evaluate.resolve(config(**given, tasks={"mine": {"set": "file", "path": str(questions), "max_tokens": 100000}}), 1)
    assert not (tmp_path / "new").exists()


def test_the_plan_counts_and_a_chat_without_a_template_is_refused(tmp_path: Path, tiny_checkpoint: Path, questions: Path) -> None:
    task = {"set": "file", "path": str(questions), "num_samples": 4, "limit": 3, "max_tokens": 7}
    given = {"out": str(tmp_path / "new"), "tasks": {"mine": task}}
    for model in ({"checkpoint": str(tiny_checkpoint)}, {"hf": str(tiny_checkpoint.parent / "hf")}):
        resolved = evaluate.resolve(config(model=model, **given), 1)
        assert resolved.figures["responses"] == 12 and resolved.figures["tasks"]["mine"]["max_response_tokens"] == 84
        assert resolved.figures["parameters"] > 0 and len(resolved.identity()["sha256"]) == 64
        with pytest.raises(InputError, match="no chat template"):
            evaluate.resolve(config(model=model, **{**given, "tasks": {"mine": {**task, "chat": True}}}), 1)
    ruler = {"num_questions": 2, "lengths": [128, 120], "sub_tasks": ["niah_single_1", "niah_multikey_3"]}
    given_ruler = {"out": str(tmp_path / "new"), "model": {"hf": str(tiny_checkpoint.parent / "hf")}}
    part = evaluate.resolve(config(**given_ruler, tasks={"ruler": {"ruler": ruler}}), 1).figures["tasks"]["ruler"]
    assert (part["responses"], part["max_response_tokens"], part["longest_prompt_tokens"]) == (8, 4 * 50 + 4 * 100, 78)
    with pytest.raises(InputError) as raised:  # said before anything is sampled: a question twice could not be graded
        evaluate.resolve(config(**given_ruler, tasks={"ruler": {"ruler": {"lengths": [64, 64], "sub_tasks": ["vt", "vt"]}}}), 1)
    assert [problem.found for problem in raised.value.problems] == ["64 2 times", "vt 2 times"]
    served = evaluate.resolve(config(model={"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}, **given), 1)
    assert served.reader is None and served.figures["responses"] == 12 and served.identity()["kind"] == "endpoint"


def test_the_plan_lists_what_is_measured_too(tmp_path: Path, tiny_checkpoint: Path, tiny_mixture: Path, questions: Path) -> None:
    losses = {"held_out": {"mixture": str(tiny_mixture), "seq_length": 32, "sequences": 6}}
    tasks = {"losses": losses, "mine": {"set": "file", "path": str(questions)}}
    figures = evaluate.resolve(config(out=str(tmp_path / "new"), model={"checkpoint": str(tiny_checkpoint)}, tasks=tasks), 1).figures
    assert list(figures["tasks"]) == ["losses", "mine"] and figures["responses"] == 5
    part = figures["tasks"]["losses"]
    assert (part["set"], part["sequences"], part["mixture"]) == ("held_out", 6, str(tiny_mixture)) and part["sources"]
    words = measured.figures(Measured("words", build({"lm_eval": {"names": ["a"]}}, TaskConfig, str), None, {}, {"a_1": "a", "a_2": "a"}))
    assert words == {"set": "lm_eval", "lm_eval_tasks": 2, "limit": None}


def test_what_keeps_a_verdict_from_being_made_is_said_before_sampling(
    tmp_path: Path, tiny_checkpoint: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model": {"checkpoint": str(tiny_checkpoint)}, "tasks": {"mine": {"set": "file", "path": str(questions), "num_samples": 2}}}
    resolved = evaluate.resolve(config(**given, out=str(tmp_path / "new")), 1)
    results = [result("mine", one.question.id, 1, sample, one.prompt_sha256) for one in resolved.asked["mine"] for sample in range(2)]
    as_asked = summary.settings_of(resolved.tasks["mine"], resolved.asked["mine"], "plain text", evaluation.grader_versions())
    old = write(tmp_path / "old", [*results, *scores("lm_eval/gsm8k", [1])], {"mine": as_asked})

    def said(policy: dict[str, Any], out: str = "new", **changed: Any) -> list[str]:
        tasks = {"mine": {**given["tasks"]["mine"], **changed}, "losses": LOSSES}
        try:
            evaluate.resolve(config(**{**given, "tasks": tasks}, out=str(tmp_path / out), against=str(old), policy=policy), 1)
        except InputError as error:
            return [f"{one.where}: {one.found}" for one in error.problems]
        return []

    monkeypatch.setattr(measured, "read", lambda name, task: Measured(name, task, None, {}))  # a loss has no responses
    assert said({}, out="new/../old")[-1].startswith("against: ")
    assert said({"max_drop": {"mine": 0.1}}) == [] and said({"max_drop": {"mine": 0.1}}, num_samples=4, limit=3) == []
    where = [one.partition(": ")[0] for one in said({"max_drop": {"mine": 0.1, "mnie": 0.1, "losses": 0.1, "math": 0.1}})]
    assert where == ["policy.max_drop.mnie", "policy.max_drop.losses", *["policy.max_drop.math"] * 3]
    assert said({"min_gain": {"lm_eval/gsm8k": 0.1}}) == [
        f"policy.min_gain.lm_eval/gsm8k: lm_eval/gsm8k: {tmp_path / 'new'} has no responses to it"
    ]
    (warmer,) = said({"max_drop": {"mine": 0.1}}, temperature=0.9)
    assert "protocol.temperature is 0.9, and was" in warmer and said({}, temperature=0.9) == []
    old = write(tmp_path / "other", scores("other", [1]))
    assert said({"max_drop": {"mine": 0.1}}) == [f"policy.max_drop.mine: mine: {old} has no responses to it"]
    twice = config(policy={"max_drop": {"a": 0.1}, "min_gain": {"a": 0.1}}, against="old")
    assert [one.where for one in check_evaluate(twice, 1)] == ["policy.min_gain.a"]


def test_a_bos_that_the_tokenizer_lacks_is_refused(tmp_path: Path, tiny_checkpoint: Path, questions: Path) -> None:
    model = tmp_path / "hf"
    shutil.copytree(tiny_checkpoint.parent / "hf", model)
    for path in model.glob("*config.json"):
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("bos")}))
    given = {"model": {"hf": str(model)}, "out": str(tmp_path / "new"), "tasks": {"mine": {"set": "file", "path": str(questions)}}}
    evaluate.resolve(config(**given), 1)
    with pytest.raises(InputError, match="bos: found one; required a tokenizer with a BOS"):
        evaluate.resolve(config(**given, bos="one"), 1)


def test_a_tokenizer_that_changed_answers_again(tmp_path: Path, tiny_checkpoint: Path, questions: Path) -> None:
    """The weights' sums do not know it, and a prompt's ids may be the same: its decoder wrote the texts that are kept."""
    model = tmp_path / "hf"
    shutil.copytree(tiny_checkpoint.parent / "hf", model)
    given = {"model": {"hf": str(model)}, "out": str(tmp_path / "new"), "tasks": {"mine": {"set": "file", "path": str(questions)}}}
    asked = []
    for decoder in ("as it was", {"type": "Fuse"}):
        if decoder != "as it was":
            values = json.loads((model / "tokenizer.json").read_text())
            (model / "tokenizer.json").write_text(json.dumps({**values, "decoder": decoder}))
        made = evaluate.resolve(config(**given), 1)
        with ExitStack() as stack:
            asked.append(evaluation.begin(made.config, made.identity(), made.reader, made.tasks, made.asked, stack).wanted)
    assert [one.asked.prompt_sha256 for one in asked[0]] == [one.asked.prompt_sha256 for one in asked[1]]
    assert not {one.key for one in asked[0]} & {one.key for one in asked[1]}


def test_a_result_does_not_overwrite_the_summary(tmp_path: Path) -> None:
    folder.finish(tmp_path, [], {"kind": folder.KIND, "tasks": {}})
    with pytest.raises(InputError, match="is no result"):
        options.finish({"score": 1}, tmp_path / folder.SUMMARY)
    assert folder.summary_of(tmp_path)["kind"] == folder.KIND


def test_two_evaluations_in_one_folder_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "out"
    holding = (
        "import sys, pathlib; from megatron_prism.eval import folder\n"
        "with folder.held(pathlib.Path(sys.argv[1]), lambda: {'kind': folder.KIND, 'model': {'sha256': '0'}}): print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", holding, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentFault, match="one prism evaluate at a time"), folder.held(root, dict):
            pass
        other.communicate("\n")
    with folder.held(root, lambda: {"kind": folder.KIND, "model": {"sha256": "0"}}):
        assert folder.begun(root)


def test_results_of_any_text_are_read_back(tmp_path: Path) -> None:
    made = Result(task="t", id="q\ud800", sample=0, seed=1, outcome="right", score=1.0, text="a\u2028b\r\n\x00")
    folder.finish(tmp_path, [made], {"kind": folder.KIND})
    assert (tmp_path / folder.RESULTS).read_text().count("\n") == 1 and json.loads((tmp_path / folder.RESULTS).read_text())[
        "text"
    ] == made.text


def test_a_summary_whose_results_are_others_is_refused(tmp_path: Path) -> None:
    folder.finish(tmp_path, [], {"kind": folder.KIND, "tasks": {}})
    assert folder.summary_of(tmp_path)["results_sha256"]
    (tmp_path / folder.RESULTS).write_text("{}\n")
    with pytest.raises(InputError, match=r"results.jsonl: found sha256 .*as summary.json says; start prism evaluate again"):
        folder.summary_of(tmp_path)


def test_one_of_lm_evals_tasks_is_asked_once() -> None:
    """Its results would stand twice under one name, which nothing can read."""
    board, own = (Measured(name, build({"lm_eval": {}}, TaskConfig, str), None, {}, {"gsm8k": "gsm8k", f"{name}_1": name}) for name in "ab")
    assert [*measured.check_names([board])] == []
    (problem,) = measured.check_names([board, own])
    assert problem.where == "tasks.b.lm_eval.names" and problem.found == "lm-eval's gsm8k, which tasks.a asks for too"


def test_what_was_measured_is_measured_again_with_another_tokenizer(tiny_checkpoint: Path, questions: Path) -> None:
    """A Hugging Face folder's sum is of its weights alone."""
    tasks = {"mine": {"set": "file", "path": str(questions)}}
    reader = evaluate.resolve(config(model={"checkpoint": str(tiny_checkpoint)}, tasks=tasks), 1).reader
    assert reader is not None
    one = Measured("words", build({"lm_eval": {"names": ["a"]}}, TaskConfig, str), None, {})
    others = [
        replace(reader, spec=replace(reader.spec, **changes)) for changes in ({}, {"sha256": "other"}, {"bos_id": None}, {"ends": ()})
    ]
    assert len({one.key(other, "weights") for other in others}) == 4 and one.key(reader, "weights") == one.key(others[0], "weights")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_alone_needs_lm_evals_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str) -> None:
    monkeypatch.setenv("RANK", rank)
    absent = build({"lm_eval": {"names": ["sst2"], "files": {"sst2": str(tmp_path / "not there")}}}, TaskConfig, str)
    if rank == "0":
        with pytest.raises(InputError, match="which is not there"):
            measured.read("words", absent)
    else:
        assert measured.read("words", absent).groups == {}
