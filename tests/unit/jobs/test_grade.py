"""`prism grade`: every bad line told at once, nothing half-written, every other key kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.jobs import grade as job

GOOD: list[dict[str, Any]] = [
    {"id": 1, "kind": "math", "gold": 42, "response": "<think>a</think> \\boxed{42}", "source": {"name": "caf\u00e9"}},
    {"id": "two", "kind": "math", "gold": "x+1", "response": "<think>a</think> \\boxed{1+x}"},
    {"id": "3", "kind": "choice", "gold": "B", "choices": ["a", "b"], "response": "<think>a</think> \\boxed{A}"},
    {"id": "4", "kind": "math", "gold": "7", "response": "<think>a", "is_truncated": True},
    {"id": "5", "kind": "math", "gold": "7", "response": "7\ud800"},
    {"id": "6", "kind": "strings", "gold": "all", "choices": ["one", "two"], "response": "Two", "is_truncated": True},
]


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_is_graded_in_its_order_with_all_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_ITEMS", 2)
    result = job.run(written(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl", GradeConfig())
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record.pop("outcome") for record in graded] == ["right", "right", "wrong", "truncated", "no_format", "wrong"]
    assert graded[-1].pop("score") == 0.5
    assert all(record.pop("why") for record in graded)
    assert graded == GOOD
    assert (result["graded"], result["right"], result["wrong"], result["no_format"], result["truncated"], result["fault"]) == (
        6,
        2,
        2,
        1,
        1,
        0,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_number_is_a_gold_of_plain_decimals(tmp_path: Path) -> None:
    golds = {1e-05: "0.00001", 1e22: "1" + 22 * "0", -2.5e-7: "-0.00000025", 0.5: "0.5", 3: "3"}
    assert [job.item_of({**GOOD[0], "gold": gold}).gold for gold in golds] == list(golds.values())
    lines = [{"id": index, "kind": "math", "gold": gold, "response": f"<think>a</think> \\boxed{{{text}}}"}
             for index, (gold, text) in enumerate(golds.items())]  # fmt: skip
    assert job.run(written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", GradeConfig())["right"] == len(golds)


def test_every_bad_line_is_told_at_once(tmp_path: Path) -> None:
    bad: list[Any] = [
        "{",
        "[]",
        {"id": 1, "kind": "math", "response": "a"},
        {"id": 2, "kind": "poem", "response": "a"},
        {"id": 3, "kind": "math", "gold": "1"},
        {"kind": "math", "gold": "1", "response": "a"},
        {"id": 5, "kind": "choice", "gold": "C", "choices": ["a", "b"], "response": "a"},
        {"id": 6, "kind": "choice", "gold": "A", "response": "a"},
        {"id": 7, "kind": "code", "tests": {"kind": "stdin", "cases": []}, "response": "a"},
        {"id": 8, "kind": "code", "tests": {"kind": "asserts"}, "response": "a"},
        {"id": 9, "kind": "math", "gold": True, "response": "a"},
        {"id": 10, "kind": "math", "gold": "1", "response": "a", "is_truncated": 1},
        {"id": 11, "kind": "math", "gold": float("nan"), "response": "a"},
        '{"id": 12, "kind": "math", "gold": 1e999, "response": "a"}',
        {"id": 13, "kind": "math", "gold": "1e999", "response": "a"},
        {"id": 14, "kind": "choice", "gold": "A", "choices": ["a", "a"], "response": "a"},
        {"id": 15, "kind": "math", "gold": "1", "response": "a", "outcome": "right"},
        {"id": 16, "kind": "math", "gold": "1", "response": "a", "why": ""},
        {"id": 17, "kind": "strings", "gold": "some", "choices": ["a"], "response": "a"},
        {"id": 18, "kind": "strings", "gold": "all", "choices": [], "response": "a"},
        {"id": 19, "kind": "strings", "gold": "all", "choices": ["a"], "response": "a", "score": 1},
    ]
    lines = [GOOD[0], *bad, "", {**GOOD[0], "id": "1"}]
    with pytest.raises(InputError) as caught:
        job.run(written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", GradeConfig())
    numbers = [int(problem.where.rsplit(" ", 1)[1]) for problem in caught.value.problems]
    assert numbers == [*range(2, 2 + len(bad)), 3 + len(bad)]
    assert "the id '1' of line 1" in caught.value.problems[-1].found
    assert not (tmp_path / "out.jsonl").exists()


def test_a_wrong_file_does_not_flood(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        job.run(written(tmp_path / "in.jsonl", [{"task": "aime24", "text": "42"}] * 915), tmp_path / "out.jsonl", GradeConfig())
    assert len(caught.value.problems) < 30
    assert caught.value.problems[-1].found == "915 bad lines in all"


def test_every_form_of_tests_that_is_documented_is_taken(tmp_path: Path) -> None:
    case = {"input": "1\n2", "output": "3"}
    forms = [
        {"kind": "stdin", "cases": [case], "time_limit_s": 2, "checker": "print(1)"},
        {"kind": "stdin", "packed_cases": json.dumps([case])},
        {"kind": "call", "function": "add", "cases": [case], "packed_cases": json.dumps([case])},
        {"kind": "call", "function": "add", "packed_cases": json.dumps([case])},
        {"kind": "asserts", "code": "assert add(1, 2) == 3", "entry_point": "add"},
    ]
    wrong = [
        {"kind": "call", "cases": [case]},
        {"kind": "stdin", "packed_cases": None},
        {"kind": "stdin", "packed_cases": ""},
        {"kind": "asserts", "code": "add(1, 2)"},
    ]
    lines = [{"id": number, "kind": "code", "tests": tests, "response": "none"} for number, tests in enumerate([*forms, *wrong])]
    with pytest.raises(InputError) as caught:
        job.run(written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", GradeConfig())
    assert [int(problem.where.rsplit(" ", 1)[1]) for problem in caught.value.problems] == [6, 7, 8, 9]


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", GOOD)
    with pytest.raises(InputError, match="--out"):
        job.run(path, path, GradeConfig())
    assert len(path.read_text().splitlines()) == len(GOOD)


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.Grader, "grade", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job.run(written(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl", GradeConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_killed_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{**line, "id": f"{number}/{line['id']}"} for number in range(3) for line in GOOD]
    path, out = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    monkeypatch.setattr(job, "BATCH_ITEMS", 4)
    whole = job.run(path, tmp_path / "whole.jsonl", GradeConfig())
    real, graded = job.Grader.grade, []

    def grade(self: Any, items: Any) -> Any:
        if len(graded) == 8:
            raise KeyboardInterrupt
        graded.extend(items)
        return real(self, items)

    monkeypatch.setattr(job.Grader, "grade", grade)
    with pytest.raises(KeyboardInterrupt):
        job.run(path, out, GradeConfig())
    (partial,) = tmp_path.glob(".out.jsonl.*.partial")
    with partial.open("ab") as stream:
        stream.write(b'{"id": "torn')  # what a kill, or a full disk, leaves of a line
    graded[:] = graded[:1]
    assert not out.exists()
    result = job.run(path, out, GradeConfig())
    assert len(graded) == 1 + len(lines) - 8  # none is graded twice
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {name: result[name] for name in job.OUTCOMES} == {name: whole[name] for name in job.OUTCOMES}
    assert not list(tmp_path.glob(".*"))


def test_what_another_run_left_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = written(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    partial = job.partial_of(out, GradeConfig())
    forged = {**GOOD[0], "response": "another", "outcome": "wrong", "why": "of another file"}
    written(partial, [forged, *GOOD])
    assert job.partial_of(out, GradeConfig(think="free")) != partial
    assert job.partial_of(out, GradeConfig(num_workers=7)) == partial  # which changes no outcome
    with monkeypatch.context() as later:
        later.setattr(job, "VERSION", "of later graders")
        assert job.partial_of(out, GradeConfig()) != partial
    assert job.run(path, out, GradeConfig())["right"] == 2
    assert json.loads(out.read_text().splitlines()[0])["outcome"] == "right"


def test_two_runs_into_one_file(tmp_path: Path) -> None:
    path, out = written(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, job.partial_of(out, GradeConfig())], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        try:
            with pytest.raises(EnvironmentFault, match="another process grades into it"):
                job.run(path, out, GradeConfig())
        finally:
            other.kill()


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = written(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    monkeypatch.setattr(job, "BATCH_ITEMS", 2)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom megatron_prism.core.config.grade import GradeConfig\nfrom megatron_prism.jobs import grade\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); grade.BATCH_ITEMS = 2\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\ngrade.run(Path(sys.argv[1]), Path(sys.argv[2]), GradeConfig())"
    )
    done = subprocess.run([sys.executable, "-c", code, path, out], capture_output=True, text=True, timeout=120)
    assert done.returncode and "EnvironmentFault" in done.stderr and "too large" in done.stderr, done.stderr
    assert not out.exists()
    assert job.run(path, out, GradeConfig())["graded"] == len(GOOD)


def test_the_command(tmp_path: Path) -> None:
    path, command = written(tmp_path / "in.jsonl", GOOD[:1]), [sys.executable, "-m", "megatron_prism.cli", "grade"]
    done = subprocess.run([*command, str(path), "--out", str(tmp_path / "o.jsonl")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "right: 1" in done.stdout) == (0, True), done.stderr
    done = subprocess.run([*command, str(path), "--out", str(tmp_path / "o.jsonl")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr, "--out" in done.stderr) == (2, False, True)
