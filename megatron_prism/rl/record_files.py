"""Records on the disk: RUN/records/step_NNNNNNNN, a folder a step, whole or absent, sealed by SHA256SUMS.

step.json: platform and figures. trained.json: the numbers of the responses that were trained on, their advantages, the plan.
responses.jsonl: a line a response, as in rollouts/. log_probs.safetensors: those under the old weights and the reference of the trained ones
(fp32), end to end in their order. tensors.jsonl: a fingerprint a line.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import folder, integrity
from megatron_prism.checkpoint.fingerprint import Fingerprint
from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.manifest import write_json, write_text
from megatron_prism.rl import rollout
from megatron_prism.rl.record import Step

FOLDER, FORMAT = "records", 1
STEP, TRAINED, RESPONSES, LOG_PROBS, TENSORS = "step.json", "trained.json", "responses.jsonl", "log_probs.safetensors", "tensors.jsonl"


def path_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's record."""
    return run_dir / FOLDER / f"step_{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """Return the steps of which a run has a record, in order."""
    return [int(path.name.removeprefix("step_")) for path in folder.steps(run_dir / FOLDER)]


def begin(run_dir: Path, first_step: int) -> None:
    """Remove what a killed run has left: a record cut short, and those of steps that will be run again."""
    with disk.writing(run_dir / FOLDER):
        for path in (run_dir / FOLDER).glob(".step_*.tmp"):  # and nothing of the file system's own, as .nfs0001 or .snapshot
            shutil.rmtree(path)
        for step in steps(run_dir):
            if step > first_step:
                shutil.rmtree(path_of(run_dir, step))


def write(run_dir: Path, step: Step, keep_last: int) -> None:
    """Write a step's record, and remove the oldest beyond keep_last.

    Raises: EnvironmentFault where it cannot be written.
    """
    from safetensors.torch import save

    target = path_of(run_dir, step.step)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk.writing(target):
        temporary.mkdir(parents=True)
        facts = {"format": FORMAT, "step": step.step, "platform": step.platform, "figures": _plain(step.figures)}
        trained = {"trained": list(step.advantages), "advantages": list(step.advantages.values()), "plan": step.plan}
        write_json(temporary / STEP, facts)
        write_text(temporary / TRAINED, json.dumps(trained) + "\n")
        write_text(temporary / RESPONSES, rollout.to_lines([step.responses]))
        lines = ({"stage": stage, "name": name, **asdict(one)} for stage, part in step.tensors.items() for name, one in part.items())
        write_text(temporary / TENSORS, "".join(json.dumps(_plain(line)) + "\n" for line in lines))
        (temporary / LOG_PROBS).write_bytes(save(_log_probs(step)))
        integrity.seal(temporary)
        folder.publish(temporary, target)
        for old in steps(run_dir)[:-keep_last]:
            shutil.rmtree(path_of(run_dir, old))


def _log_probs(step: Step) -> dict[str, torch.Tensor]:
    parts = {"old": step.old_log_probs, "ref": step.ref_log_probs}
    return {name: torch.cat([values[number] for number in step.advantages]) for name, values in parts.items() if values}


def read(run_dir: Path, step: int) -> Step:
    """Read a step's record.

    Raises: InputError where there is none, or it is not what was sealed.
    """
    path = path_of(run_dir, step)
    if not path.is_dir():
        has = ", ".join(map(str, steps(run_dir))) or "none"
        raise InputError(Problem(str(path), "no record", f"a step of the run's records: {has}", "record.interval says which are kept"))
    raise_problems(integrity.check(path))
    return _read(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within the block, give what a damaged file raises the file's name.

    Raises: InputError.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise InputError(Problem(str(path), found, f"a file of a record of format {FORMAT}")) from error


def _read(path: Path) -> Step:
    from safetensors.torch import load_file

    with _reading(path / STEP):
        facts = _json(path / STEP)
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}")
        step, platform, figures = facts["step"], facts["platform"], _numbers(facts["figures"])
        _ = platform["world_size"], platform["num_threads"]  # what a replay reads of it
    with _reading(path / RESPONSES):
        groups = rollout.from_lines((path / RESPONSES).read_text(encoding="utf-8"), str(path / RESPONSES))
        responses = [response for group in groups for response in group]
    with _reading(path / TRAINED):
        trained = _json(path / TRAINED)
        numbers: Sequence[int] = trained["trained"]
        advantages, plan = dict(zip(numbers, trained["advantages"], strict=True)), trained["plan"]
        sizes = [len(responses[number].sample.token_ids) for number in numbers]
    with _reading(path / LOG_PROBS):
        flat = load_file(path / LOG_PROBS)
        if numbers and "old" not in flat:
            raise KeyError("old")
        for name, values in flat.items():
            if values.numel() != sum(sizes):
                raise ValueError(f"{name} of {values.numel()} tokens, and the trained responses have {sum(sizes)}")
        by_number = {name: dict(zip(numbers, flat[name].split(sizes), strict=True)) if name in flat else {} for name in ("old", "ref")}
    tensors: dict[str, dict[str, Fingerprint]] = {}
    with _reading(path / TENSORS):
        for line in _lines(path / TENSORS):
            stage, name = line.pop("stage"), line.pop("name")
            tensors.setdefault(stage, {})[name] = Fingerprint(**{**_numbers(line), "shape": tuple(line["shape"])})
    return Step(
        step=step,
        platform=platform,
        responses=responses,
        advantages=advantages,
        plan=plan,
        old_log_probs=by_number["old"],
        ref_log_probs=by_number["ref"],
        figures=figures,
        tensors=tensors,
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON has them: NaN and inf as texts."""
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with NaN and inf as numbers again."""
    return {name: float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value for name, value in values.items()}
