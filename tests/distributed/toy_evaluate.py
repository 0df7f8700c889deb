"""An evaluation on a toy, on the ranks of a test's gang: killed at a named point or after some time, or unbroken. It logs what it pays for."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.checkpoint import sharded
from megatron_prism.checkpoint.plan import plan_import
from megatron_prism.core import resumable
from megatron_prism.core.config import EvaluateConfig, GangConfig
from megatron_prism.core.errors import CheckpointError
from megatron_prism.core.load import build
from megatron_prism.eval import folder, model, sample
from megatron_prism.eval.judge import Judge
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.jobs import evaluate
from megatron_prism.models import build as models
from megatron_prism.parallel.groups import Groups
from tests.distributed.toy_rl import sampler_off


class Toy:
    """Right: a response with at least three digits. A problem whose gold is `fault` has faults. Outcomes come in another order than the items."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Toy:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        """Return each item's outcome."""
        return {item.id: Graded(id=item.id, outcome=outcome_of(item), why=item.response) for item in reversed(items)}  # type: ignore[arg-type]


def outcome_of(item: Item) -> str:
    if item.gold == "fault":
        return "fault"
    return "right" if sum(character.isdigit() for character in item.response) >= 3 else "wrong"


def config(out: str, checkpoint: str, file: str, task: dict[str, Any] | None = None, **changes: Any) -> EvaluateConfig:
    asked = {"set": "file", "path": file, "num_samples": 3, "temperature": 1.0, "max_tokens": 8, **(task or {})}
    values = {
        "out": out,
        "precision": "fp32",
        "model": {"checkpoint": checkpoint},
        "tasks": {"sums": asked},
        "num_rows": 8,
        "shard_responses": 9,
        **changes,
    }
    return build(values, EvaluateConfig, str)


def die(by: str = "SIGKILL") -> None:
    os.kill(os.getpid(), signal.Signals[by])


POINTS: dict[str, tuple[Any, str, int, bool]] = {
    # a function, how often it is called before the call at which the process is killed, and whether after that call
    "described": (resumable, "write_json", 0, True),
    "sampled": (sample, "_keep", 1, False),
    "written": (sample, "_keep", 1, True),
    "graded": (Judge, "grade", 1, True),
    "joined": (folder, "sha256_file", 0, False),
    "sealed": (folder, "write_json", 0, True),
}


@contextmanager
def killed(point: str | None, delay_s: float | None, by: str) -> Iterator[None]:
    """Within the block this process is killed at a point, or so long after it began to sample."""
    if delay_s is not None:
        kept_run = sample.run

        def timed(*args: Any) -> None:
            threading.Timer(delay_s, die).start()
            kept_run(*args)

        with mock.patch.object(sample, "run", timed):
            yield
        return
    if point is None:
        yield
        return
    owner, name, after, is_after = POINTS[point]
    kept: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = kept(*args, **kwargs) if is_after or calls <= after else None
        if calls == after + 1:
            die(by)
        return result

    with mock.patch.object(owner, name, counted):
        yield


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within the block, log each response that is kept, and each that is graded, a line with its task, question and sample."""

    def log(what: str, requests: Sequence[Any]) -> None:
        with path.open("a") as stream:
            stream.writelines(json.dumps([what, one.task, one.asked.question.id, one.sample]) + "\n" for one in requests)

    keep, grade = sample._keep, Judge.grade

    def kept(work: Any, shard: Sequence[Any], *rest: Any) -> None:
        keep(work, shard, *rest)
        log("sampled", shard)

    def graded(judge: Judge, requests: Sequence[Any]) -> Any:
        counts = grade(judge, requests)
        log("graded", requests)
        return counts

    with mock.patch.object(sample, "_keep", kept), mock.patch.object(Judge, "grade", graded):
        yield


def run(
    groups: Groups,
    point: str | None = None,
    delay_s: float | None = None,
    by: str = "SIGKILL",
    off: bool = False,
    grid: dict[str, Any] | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Evaluate the toy on a gang; return the result. by: the signal at that point. off: the engine says another log-probability than the model."""
    given = config(parallel=grid or {}, **values)
    log = Path(f"{values['out']}.log")
    with mock.patch.object(evaluate.grader, "Grader", Toy), logged(log), killed(point, delay_s, by), sampler_off(0 if off else None):
        return evaluate.evaluate_in_gang(evaluate.resolve(given, groups.world_size), groups)


def differing(groups: Groups, hf: str, checkpoint: str, control: bool, grid: dict[str, Any]) -> list[str]:
    """Return the names of the weights that a Hugging Face folder and its checkpoint give this rank differently. control: one is changed."""
    given, plan = build({"precision": "fp32", "parallel": grid}, GangConfig, str), plan_import(Path(hf))
    loaded = []
    for read in (lambda chunks: model.load_hf(plan, chunks), lambda chunks: sharded.load_weights(Path(checkpoint), chunks)):
        chunks = models.build(plan.model, groups, given)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.fill_(7.0)
        read(chunks)
        loaded.append({name: value.clone() for name, value in chunks[0].state_dict().items() if isinstance(value, torch.Tensor)})
    if control:
        next(iter(loaded[0].values())).view(-1)[-1] += 1
    return [name for name, value in loaded[0].items() if not torch.equal(value, loaded[1][name])]


def refusal(groups: Groups, hf: str) -> str:
    """Return why a Hugging Face folder's weights are refused."""
    plan = plan_import(Path(hf))
    chunks = models.build(plan.model, groups, build({"precision": "fp32"}, GangConfig, str))
    try:
        model.load_hf(plan, chunks)
    except CheckpointError as error:
        return str(error)
    return ""
