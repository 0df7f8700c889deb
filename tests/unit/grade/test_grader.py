"""The grader's promises: joined by id, faults never a 0, killed workers replaced, nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import BackendMissing, EnvironmentFault, InputError
from megatron_prism.grade import grader as module
from megatron_prism.grade.grader import Grader
from megatron_prism.grade.outcome import Item
from megatron_prism.grade.sandbox import choose as chooser
from megatron_prism.grade.workers import Workers

HARD = "\\cot x+1"  # not for the exact path


def an_item(id_: str, answer: str = "\\boxed{1+\\cot x}", gold: str = HARD) -> Item:
    return Item(id=id_, kind="math", gold=gold, response=f"<think>a</think> {answer}")


def workers_of(grader: Grader) -> list[psutil.Process]:
    return [psutil.Process(worker.process.pid) for worker in grader._workers._workers]


def test_a_failed_extraction_shifts_nothing() -> None:
    items = [an_item("a"), an_item("b", "no box"), an_item("c", "\\boxed{x}"), an_item("d", gold="\\frac{"), an_item("e")]
    with Grader() as grader:
        graded = grader.grade(items)
        assert list(graded) == ["a", "b", "c", "d", "e"]
        assert [one.outcome for one in graded.values()] == ["right", "no_format", "wrong", "fault", "right"]
        assert all(one.id == id_ for id_, one in graded.items())
        assert {id_: one.outcome for id_, one in grader.grade(items[::-1]).items()} == {id_: one.outcome for id_, one in graded.items()}


def test_an_id_that_stands_there_twice_is_refused() -> None:
    with Grader() as grader, pytest.raises(InputError, match="item 'a'"):
        grader.grade([an_item("a"), an_item("a")])


def test_a_killed_worker_is_replaced_and_its_item_is_graded() -> None:
    with Grader(GradeConfig(num_workers=1)) as grader:
        grader.grade([an_item("a")])
        (worker,) = workers_of(grader)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(10)
        assert grader.grade([an_item("b")])["b"].outcome == "right"
        assert [process.pid for process in workers_of(grader)] != [worker.pid]


def test_a_worker_outlives_the_thread_that_asked_for_it() -> None:
    with Grader(GradeConfig(num_workers=1)) as grader:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(grader.grade, [an_item("a")]).result()["a"].outcome == "right"
        (worker,) = workers_of(grader)
        time.sleep(0.2)  # the kernel kills a process that the thread itself started at once
        assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
        assert grader.grade([an_item("b")])["b"].outcome == "right" and workers_of(grader) == [worker]


def test_workers_that_were_killed_while_idle_cost_no_item_its_retry() -> None:
    with Workers(num_workers=2, cpu_limit_s=5, wall_limit_s=30.0) as workers:
        assert workers.compare([(HARD, "1+\\cot x"), (HARD, "x")]) == [True, False]
        for worker in workers._workers:
            worker.process.send_signal(signal.SIGKILL)
            psutil.Process(worker.process.pid).wait(10)
        assert workers.compare([(HARD, "1+\\cot x"), (HARD, "x")]) == [True, False]


def test_a_grader_that_ends_ends_what_it_grades() -> None:
    with ThreadPoolExecutor(1) as thread:
        with Grader(GradeConfig(num_workers=1, wall_limit_s=100.0)) as grader:
            grader.grade([an_item("a")])
            (worker,) = workers_of(grader)
            worker.suspend()
            grading = thread.submit(grader.grade, [an_item("b")])
            time.sleep(0.5)
        with pytest.raises(EnvironmentFault, match="was ended"):
            grading.result(10)
    assert not worker.is_running()


def test_a_slow_machine_is_a_fault_and_no_wrong_answer() -> None:
    with Grader(GradeConfig(num_workers=1, wall_limit_s=3.0)) as grader:
        grader.grade([an_item("a")])
        (worker,) = workers_of(grader)
        worker.suspend()  # no CPU for it, as on a machine that is too busy
        assert grader.grade([an_item("b")])["b"].outcome == "right"  # tried once more, by another worker
        assert not worker.is_running()


def test_a_fault_that_stays_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def compare(self: Workers, pairs: list[Any]) -> list[str]:
        tries.append(len(pairs))
        return ["a grading worker ended with code -9"] * len(pairs)

    monkeypatch.setattr(Workers, "compare", compare)
    with Grader() as grader:
        graded = grader.grade([an_item("a"), an_item("b", f"\\boxed{{{HARD}}}")])
    assert [graded[id_].outcome for id_ in "ab"] == ["fault", "right"]
    assert tries == [1, 1]


def test_a_defect_of_ours_is_one_items_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(answer: str, form: str) -> str:
        if "bad" in answer:
            raise ValueError("a defect")
        return "42"

    monkeypatch.setattr(module.math, "extract", extract)
    with Grader() as grader:
        graded = grader.grade([an_item("a", "bad", "42"), an_item("b", "good", "42")])
    assert [(one.outcome, one.why[:10]) for one in graded.values()] == [("fault", "ValueError"), ("right", "'42' for '")]


def test_nothing_is_left_running() -> None:
    with Grader() as grader:
        grader.grade([an_item(str(index), f"\\boxed{{x^2-{index}}}") for index in range(8)])
        workers = workers_of(grader)
        assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_end_with_a_process_that_is_killed() -> None:
    code = (
        "import sys, time\nfrom tests.unit.grade.test_grader import *\nwith Grader() as grader:\n"
        "    grader.grade([an_item('a')])\n    print(workers_of(grader)[0].pid, flush=True)\n    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    for _ in range(100):
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("a worker outlived the process that was killed")


def test_without_math_verify_nothing_is_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with Grader() as grader, pytest.raises(BackendMissing, match="math-verify"):
        grader.grade([an_item("a")])


def test_without_a_sandbox_code_is_refused_before_anything_is_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose() -> Any:
        raise EnvironmentFault("nothing contains it")

    monkeypatch.setattr(chooser, "choose", choose)
    with pytest.raises(EnvironmentFault, match="nothing contains it"), Grader(kinds=["math", "code"]):
        pytest.fail("the context is entered")
    with Grader(kinds=["math"]) as grader:
        assert grader.grade([an_item("a", f"\\boxed{{{HARD}}}")])["a"].outcome == "right"


def test_code_is_run_in_the_sandbox() -> None:
    tests = {"kind": "stdin", "cases": [{"input": "1", "output": "2"}]}
    items = [
        Item(id=name, kind="code", response=f"<think>a</think>\n```python\nprint(int(input()) + {add})\n```\n", tests=tests)
        for name, add in (("right", 1), ("wrong", 2))
    ]
    with Grader() as grader:
        try:
            graded = grader.grade(items)
        except EnvironmentFault as fault:
            if os.environ.get("PRISM_REQUIRE_SANDBOX") == "1":
                raise
            pytest.skip(f"no sandbox: {fault}")
    assert {id_: one.outcome for id_, one in graded.items()} == {"right": "right", "wrong": "wrong"}
