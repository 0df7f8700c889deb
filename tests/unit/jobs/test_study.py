"""A study of cheap scripts: what runs, what does not run again, what is refused; and its dry run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_prism.cli.entry import app
from megatron_prism.cli.submit import read_command
from megatron_prism.core.config import StudyConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, PrismError, Stopped
from megatron_prism.core.load import load
from megatron_prism.jobs import study as job
from megatron_prism.jobs import study_plan, study_stages
from megatron_prism.jobs.plan import Asked
from megatron_prism.study import claims, overview

SCRIPT = """
import json, os, sys
from pathlib import Path

out, *sources = sys.argv[1:]
total = "".join(Path(source).read_text() for source in sources if "/" in source) + Path(out).name
print("at work")
Path("order").open("a").write(Path(out).name + " ")
if Path(f"{out}.fails").exists():
    Path(out).write_text("half")
    sys.exit("it fails" if Path(f"{out}.fails").read_text() else 3)
Path(out).write_text(total)
Path(os.environ["PRISM_STUDY_RESULT"]).write_text(json.dumps({"length": len(total)}))
"""


def stage(name: str, *after: str, **more: Any) -> dict[str, Any]:
    words = ["work.py", f"run/{name}", *(f"run/{before}" for before in after)]
    return {"name": name, "kind": "python", "command": words, "after": list(after), "output": f"run/{name}", **more}


STAGES = [stage("a"), stage("b", "a"), stage("c", "a"), stage("d", "b"), stage("e", "c", "d")]
CLAIM = {"name": "long", "says": "It is long.", "shows": [{"value": "e:length", "above": 4}]}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work.py").write_text(SCRIPT)
    Path("run").mkdir()


def read(stages: list[dict[str, Any]], **more: Any) -> job.Study:
    claims = [CLAIM] if stages is STAGES else []
    Path("s.yaml").write_text(json.dumps({"name": "s", "run_dir": "run", "num_parallel": 1, "stages": stages, "claims": claims}))
    return job.read(load(Path("s.yaml"), StudyConfig), read_command, **more)


def run(stages: list[dict[str, Any]] = STAGES, **more: Any) -> tuple[list[str], dict[str, str]]:
    """Return which stages ran, in order, and the state of each."""
    Path("order").write_text("")
    result = job.run(read(stages, **more))
    assert {**result, "updated": ""} == {**json.loads(Path("run/study/study.json").read_text()), "updated": ""}
    return Path("order").read_text().split(), {name: stage["state"] for name, stage in result["stages"].items()}


def test_a_finished_study_runs_nothing_and_a_changed_input_runs_what_needs_it() -> None:
    order, states = run()
    assert sorted(order) == [*"abcde"] and set(states.values()) == {"done"} and Path("run/e").read_text() == "acabde"
    assert json.loads(Path("run/study/study.json").read_text())["claims"][0]["state"] == "holds"
    assert run() == ([], states)
    changed = [*STAGES[:3], stage("d", "b", command=["work.py", "run/d", "run/b", "more"]), STAGES[4]]
    assert read(changed).states == {"a": "done", "b": "done", "c": "done", "d": "changed", "e": "changed"}
    assert run(changed)[0] == ["d"]  # which gave the same, so that e need not run again
    Path("work.py").write_text(SCRIPT.replace("+ Path(out).name\n", "+ Path(out).name.upper()\n"))
    assert sorted(run(changed)[0]) == [*"abcde"]  # a script's contents are an input
    assert Path("run/e").read_text() == "ACABDE" and Path("run/e.old").read_text() == "acabde"


def test_a_corpus_outside_run_dir_is_an_input_also_by_a_glob() -> None:
    Path("texts").mkdir()
    for name in ("a", "b"):
        Path(f"texts/{name}.jsonl").write_text('{"text": "one"}\n')
    mixture = {"out": "run/data", "tokenizer": "tok", "sources": [{"name": "s", "path": ["texts/*.jsonl"], "weight": 100}]}
    Path("mixture.yaml").write_text(json.dumps(mixture))
    (one,) = (study := read([{"name": "data", "command": ["prepare", "mixture.yaml"]}])).stages.values()
    before = study_stages.inputs(one, study.stages, Path("run"), study.files)
    assert {"texts/a.jsonl", "texts/b.jsonl"} <= {*before}
    Path("texts/b.jsonl").write_text('{"text": "another"}\n')
    now = study_stages.inputs(one, study.stages, Path("run"), study.files)
    assert [name for name in now if now[name] != before[name]] == ["texts/b.jsonl"]


def test_what_is_not_there_any_more_runs_again() -> None:
    run()
    Path("run/b").unlink()
    assert read(STAGES).reasons["b"] == "its output or its result is not there any more"
    assert run()[0] == ["b"]
    Path("run/c").write_text("other")  # by hand: c is done, what reads it is not
    assert run()[0] == ["e"] and Path("run/e").read_text() == "otherabde"


def test_a_failure_stops_its_dependents_alone_and_is_tried_again() -> None:
    Path("run/b.fails").write_text("1")
    order, states = run()
    assert order == ["a", "b", "c"] and states == {"a": "done", "b": "failed", "c": "done", "d": "blocked", "e": "blocked"}
    kept = json.loads(Path("run/study/study.json").read_text())["stages"]
    assert (kept["b"]["failure"], kept["b"]["exit_code"], kept["d"]["reason"]) == ("it fails", 1, "needs b")
    assert Path("run/study/b/log.txt").read_text().splitlines() == ["at work", "it fails"] and not Path("run/d").exists()
    assert job.standing(read(STAGES))["stages"]["b"]["state"] == "failed"
    Path("run/b.fails").unlink()
    assert run()[0] == ["b", "d", "e"] and Path("run/e").read_text() == "acabde"


def test_a_gate_that_says_no_is_a_verdict_where_the_study_says_so() -> None:
    Path("run/b.fails").write_text("1")
    stages = [STAGES[0], stage("b", "a", on_failure="report"), *STAGES[2:]]
    order, states = run(stages)
    assert sorted(order) == [*"abcde"]
    assert states["b"] == "no-go" and states["e"] == "done"
    assert run(stages)[0] == []  # a verdict is not a failure: it is not tried again


def test_a_stage_that_stopped_by_itself_goes_on_in_the_next_start() -> None:
    Path("run/b.fails").write_text("")
    assert run()[1]["b"] == "stopped"
    Path("run/b.fails").unlink()
    assert run()[0] == ["b", "d", "e"]


def test_a_stage_that_begins_anew_ends_its_job_as_a_fault() -> None:
    """Code 3 says that its state is saved: Slurm would start a stage that is longer than the time limit for ever."""
    read(STAGES)
    Path("run/a.fails").write_text("")
    alone = CliRunner().invoke(app, ["study", "s.yaml", "--stage", "a"])
    assert isinstance(alone.exception, EnvironmentFault) and "a was stopped, and begins anew" in str(alone.exception)
    assert isinstance(CliRunner().invoke(app, ["study", "s.yaml", "--only", "a"]).exception, Stopped)


def test_seeds_are_put_together() -> None:
    run()
    one = job.standing(read(STAGES))
    other = {**one, "claims": [{**one["claims"][0], "state": "fails", "figures": {"e:length": 2.0}}]}
    Path("run2/study").mkdir(parents=True)
    Path("run2/study/study.json").write_text(json.dumps(other))
    (row,) = job.beside(one, [Path("run2")])["over_studies"]
    assert row["states"] == ["holds", "fails"] and row["figures"]["e:length"]["mean"] == 4.0
    assert next(claims.lines_over([row])).startswith("holds in 1 of 2  long: It is long. (holds, fails)")
    Path("run2/study/study.json").write_text(json.dumps({**other, "name": "t"}))
    with pytest.raises(InputError, match="run2/study/study.json: found the study t"):
        job.beside(one, [Path("run2")])
    with pytest.raises(InputError, match="^--beside: found run3: no such folder; required the run_dir of a study that has begun$"):
        job.beside(one, [Path("run3")])


def test_only_some_stages() -> None:
    assert run(only=["b"]) == ([], {"a": "to run", "b": "blocked", "c": "to run", "d": "to run", "e": "to run"})
    assert run(until=["d"])[0] == ["a", "b", "d"]
    assert run(only=["c"])[0] == ["c"]
    with pytest.raises(InputError, match="--only: found 'x'"):
        run(only=["x"])


def test_what_is_not_asked_for_is_left_out_of_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(overview, "progress", lambda text, *_: told.append(text) or 0.0)
    result = job.run(study := read(STAGES, until=["b"]))
    assert {text.split(",")[0] for text in told if text} <= {"0 of 2 done", "1 of 2 done"} and any(told)
    shown = [line.split()[0] for line in overview.lines(result, study.wanted)]
    assert shown == ["a", "b", "s:", "not"]
    *_, all_, claims_ = overview.lines(result, study.wanted)
    assert ": 2 done, 3 left out;" in all_ and claims_.endswith(" 1 claim whose stages have given nothing yet")
    done = CliRunner().invoke(app, ["study", "s.yaml", "--status", "--until", "d"])
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["a", "b", "d", "s:", "not"]


def test_the_elements_of_an_array_are_stages_of_their_own() -> None:
    array = {"name": "f", "kind": "python", "command": ["work.py"], "after": ["a"], "array": [["run/x"], ["run/y"]]}
    order, states = run([STAGES[0], array])
    assert sorted(order) == ["a", "x", "y"] and states == {"a": "done", "f/0": "done", "f/1": "done"}
    array["array"] = [["run/x"], ["run/z"]]
    assert run([STAGES[0], array])[0] == ["z"]


def test_an_output_that_the_study_did_not_make_is_not_touched() -> None:
    Path("run/c").write_text("mine")
    with pytest.raises(InputError, match="stage c: output: found run/c, which this study did not make"):
        run()
    assert not Path("run/a").exists() and Path("run/c").read_text() == "mine"


def test_an_output_outside_run_dir_is_neither_removed_nor_put_aside() -> None:
    Path("run/b.fails").write_text("1")
    outside = [stage("b", output="b")]
    run(outside)
    Path("b").write_text("half")
    Path("run/b.fails").unlink()
    assert run(outside) == ([], {"b": "failed"}) and Path("b").read_text() == "half"
    assert "b, unfinished or of other inputs" in json.loads(Path("run/study/study.json").read_text())["stages"]["b"]["reason"]


def test_two_at_once_are_refused() -> None:
    import subprocess
    import sys

    holder = (
        "import fcntl, sys\nlock = open('run/study/.lock', 'a+'); fcntl.lockf(lock, fcntl.LOCK_EX); print('', flush=True); sys.stdin.read()"
    )
    Path("run/study").mkdir()
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()
        with pytest.raises(PrismError, match="one prism study at a time"):
            run()
        other.stdin.close()
    assert len(run()[0]) == 5


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([stage("a"), stage("b", "a", after=[])], "stage b: after: found not a; required a, for it names run/a"),
        ([stage("a"), stage("b", output="run/a")], "stage b: output: found run/a, which holds that of a"),
        ([stage("a", output="run")], "which holds that of the study's records"),
        ([stage("a", output="run/study/study.json")], "run/study/study.json, which lies among the study's records"),
        ([stage("b", output="run/a.old"), stage("a")], "run/a.old, where what a gave before is put aside"),
        ([stage("study.json", output="run/b")], "stage study.json: name"),
        ([{"name": "a", "command": ["train", "--help"]}], "without --help"),
        ([stage("a", command=["no.py"])], "stage a: command: found no.py, which is no file"),
        ([{"name": "a", "command": ["nothing", "b"]}], "a job of prism and its arguments"),
        ([{"name": "a", "command": ["merge", "--no-such"]}], "No such option"),
        ([{"name": "a", "command": ["train", "t.yaml"]}], "t.yaml"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(stages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        read([*stages, {"name": "z", "command": ["nor", "this"]}])
    assert problem in str(caught.value) and "stage z: command" in str(caught.value)


TRAIN: dict[str, Any] = {
    "run_dir": "run/mid",
    "steps": 10,
    "data": {"prepared": "run/data", "seq_length": 64},
    "batch": {"global_size": 16},
    "init": {"tokenizer": "run/tok"},
    "model": {
        "family": "llama",
        **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8},
        **{"vocab_size": 384, "max_position_embeddings": 64},
    },
}
CHAIN = [
    {"name": "mid", "command": ["train", "train.yaml"]},
    {"name": "hf", "after": ["mid"], "command": ["convert", "export", "--ckpt", "run/mid", "--out", "run/hf"]},
    {"name": "eval", "after": ["hf"], "command": ["evaluate", "evaluate.yaml"]},
]
EVALUATE = {"model": {"hf": "run/hf"}, "out": "run/scores", "world_size": 2, "tasks": {"math500": {"num_samples": 2}}}


LANDSCAPE = {
    **{"out": "run/land", "world_size": 2, "tasks": {"math500": {"num_samples": 2}}},
    **{f"{name}_model": {"hf": f"{name}_hf"} for name in ("base", "mid", "rl")},
}
CKA = {
    "out": "run/cka",
    "models": [{"name": name, "hf": f"{name}_hf"} for name in ("base", "mid")],
    "distributions": {"a": {"path": ["a.jsonl"]}},
}
ANALYSES = [{"name": name, "command": ["analyze", name, f"{name}.yaml"]} for name in ("landscape", "cka")]


def test_an_analysis_goes_on_in_what_it_has_and_its_config_is_checked_before_anything_runs() -> None:
    Path("landscape.yaml").write_text(json.dumps(LANDSCAPE))
    Path("cka.yaml").write_text(json.dumps(CKA))
    Path("m.yaml").write_text(
        json.dumps({"models": [{"path": "base_hf", "weight": 0.5}, {"path": "mid_hf", "weight": 0.5}], "out": "run/merged"})
    )
    stages = read([*ANALYSES, {"name": "merge", "command": ["merge", "m.yaml"]}]).stages
    kept = [(name, one.resumes, one.grows) for name, one in stages.items()]
    assert kept == [("landscape", True, True), ("cka", True, True), ("merge", False, False)]
    Path("landscape.yaml").write_text(json.dumps({**LANDSCAPE, "engine": "vllm"}))
    Path("cka.yaml").write_text(json.dumps({**CKA, "models": []}))
    with pytest.raises(InputError) as caught:
        read([*ANALYSES, stage("a")])
    assert "stage landscape: landscape.yaml:engine: found vllm" in str(caught.value) and "stage cka: cka.yaml:models" in str(caught.value)


def test_a_dry_run_plans_what_follows_from_the_stages_before() -> None:
    Path("train.yaml").write_text(json.dumps({**TRAIN, "world_size": 2}))
    Path("evaluate.yaml").write_text(json.dumps(EVALUATE))
    plan = study_plan.run(read(CHAIN), Asked(usd_per_gpu_hour=2.0))
    stages = plan["stages"]
    assert (stages["mid"]["tokens"], stages["mid"]["ranks"]) == (10 * 16 * 64, 2)
    assert stages["eval"]["hours"] > 0, "the architecture follows from the training that the export is of"
    assert plan["gpu_hours"] == pytest.approx(sum(2 * stages[name]["hours"] for name in ("mid", "eval"))) == pytest.approx(plan["usd"] / 2)
    assert plan["longest_path"] == ["mid", "eval"] and stages["hf"]["storage_gib"] > 0
    assert [line.split()[0] for line in study_plan.lines(plan)][:3] == ["mid", "hf", "eval"]
    assert not Path("run/study").exists()


def test_a_dry_run_counts_and_promises_what_then_runs() -> None:
    Path("train.yaml").write_text(json.dumps({**TRAIN, "world_size": 2}))
    chain = [stage("a"), {**CHAIN[0], "after": ["a"]}, CHAIN[1], stage("z", "a")]
    plan = study_plan.run(read(chain, only=["z"]), Asked())
    assert {name: one["state"] for name, one in plan["stages"].items()} == {
        "a": "left out",
        "mid": "left out",
        "hf": "left out",
        "z": "blocked",
    }
    assert (plan["num_to_run"], plan["gpu_hours"], plan["storage_gib"], plan["gpus_max"], plan["longest_path"]) == (0, 0, 0, 0, [])
    job.run(read(chain, only=["a"]))
    plan = study_plan.run(read(chain, only=["z"]), Asked())
    assert plan["stages"]["z"]["state"] == "to run" and (plan["num_to_run"], plan["gpu_hours"]) == (1, 0)
    plan = study_plan.run(read(chain, until=["mid"]), Asked())
    assert plan["gpu_hours"] == 2 * plan["stages"]["mid"]["hours"] > 0 and plan["longest_path"] == ["mid"]
    Path("run/z").write_text("another's")
    with pytest.raises(InputError, match="which this study did not make"):
        study_plan.run(read(chain), Asked())


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["variables.sed=1"], "override:variables.sed"),
        (["--only", ""], "--only"),
        (["--only", "a", "--until", "b"], "--until"),
        (["--beside", "run2"], "--beside"),
        (["--status", "--dry-run"], "--status"),
        (["--stage", "filter"], "--stage"),
        (["--gpu", "h200"], "--gpu"),
        (["--status", "--gpu-hour-price", "0"], "--gpu-hour-price"),
        (["--cluster", "c.yaml", "--dry-run", "--gpu", "h100"], "--gpu"),
        (["--status", "--beside", "run"], "--beside"),
        (["--status", "--beside", "run2"], "run2/study/study.json"),
    ],
)
def test_options_that_clash_or_name_nothing_are_refused(words: list[str], where: str) -> None:
    read([{**stage("filter"), "output": None, "array": [["x"], ["y"]]}])
    Path("run2/study").mkdir(parents=True)
    Path("run2/study/study.json").write_text(json.dumps({"kind": "study", "name": "s", "claims": ["damaged"]}))
    done = CliRunner().invoke(app, ["study", "s.yaml", *words])
    assert isinstance(done.exception, InputError) and done.exception.problems[0].where == where
    assert not Path("run/study").exists()


def test_a_failure_is_the_last_line_of_its_own_start() -> None:
    Path("run/a.fails").write_text("yes")
    run([stage("a")])
    Path("work.py").write_text("raise SystemExit(7)")
    run([stage("a")])
    assert json.loads(Path("run/study/a/record.json").read_text())["failure"] == "exit code 7, and it printed nothing"


def test_a_run_of_a_shells_processes_is_not_planned_for_gpus() -> None:
    Path("train.yaml").write_text(json.dumps(TRAIN))
    plan = study_plan.run(read([{**CHAIN[0], "command": ["train", "train.yaml", "--nproc", "2"]}]), Asked())
    assert plan["stages"]["mid"]["ranks"] == 2 and "hours" not in plan["stages"]["mid"] and plan["gpu_hours"] == 0


def test_a_dry_run_names_the_problems_of_all_stages_with_exit_code_2() -> None:
    Path("train.yaml").write_text(json.dumps({**TRAIN, "steps": 0, "parallel": {"tp": 3}}))
    Path("evaluate.yaml").write_text(json.dumps({**EVALUATE, "tasks": {}}))
    Path("s.yaml").write_text(json.dumps({"name": "s", "run_dir": "run", "stages": CHAIN}))
    done = CliRunner().invoke(app, ["study", "s.yaml", "--dry-run"])
    assert isinstance(done.exception, InputError) and done.exception.exit_code == 2
    assert {"train.yaml:steps", "evaluate.yaml:tasks"} <= {problem.where.split(": ")[1] for problem in done.exception.problems}
