"""An evaluation on a toy, on the ranks of a test's gang: killed at a named point or after some time, or unbroken. It logs what it pays for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.checkpoint import at_rest, sharded
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
from tests.distributed import toy_rl
from tests.distributed.killing import Point, killed
from tests.distributed.toy_rl import sampler_off


class Toy(toy_rl.Toy):
    """Right: a response with at least three digits. A problem whose gold is `fault` has faults. Outcomes come in another order than the items."""

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


POINTS = {
    "described": Point(resumable, "write_json", 0, True),
    "sampled": Point(sample, "_keep", 1, False),
    "written": Point(sample, "_keep", 1, True),
    "graded": Point(Judge, "grade", 1, True),
    "joined": Point(folder, "sha256_file", 0, False),
    "sealed": Point(folder, "write_json", 0, True),
}


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
    fate = killed(POINTS, point, (sample, "run"), delay_s, by)
    with mock.patch.object(evaluate.grader, "Grader", Toy), logged(log), fate, sampler_off(0 if off else None):
        return evaluate.evaluate_in_gang(evaluate.resolve(given, groups.world_size), groups)


def differing(groups: Groups, hf: str, checkpoint: str, control: bool, grid: dict[str, Any]) -> list[str]:
    """Return the names of the weights that a Hugging Face hf_folder and its checkpoint give this rank differently. control: one is changed."""
    given, hf_folder = build({"precision": "fp32", "parallel": grid}, GangConfig, str), at_rest.read(Path(hf))
    loaded = []
    for read in (lambda chunks: model.load_hf(hf_folder, chunks), lambda chunks: sharded.load_weights(Path(checkpoint), chunks)):
        chunks = models.build(hf_folder.model, groups, given)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.fill_(7.0)
        read(chunks)
        loaded.append({name: value.clone() for name, value in chunks[0].state_dict().items() if isinstance(value, torch.Tensor)})
    if control:
        next(iter(loaded[0].values())).view(-1)[-1] += 1
    return [name for name, value in loaded[0].items() if not torch.equal(value, loaded[1][name])]


def refusal(groups: Groups, hf: str) -> str:
    """Return why a Hugging Face hf_folder's weights are refused."""
    hf_folder = at_rest.read(Path(hf))
    chunks = models.build(hf_folder.model, groups, build({"precision": "fp32"}, GangConfig, str))
    try:
        model.load_hf(hf_folder, chunks)
    except CheckpointError as error:
        return str(error)
    return ""
