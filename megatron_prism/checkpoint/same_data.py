"""Whether a run that resumes reads the data that it has read so far, wherever they lie now.

A run's manifest records each of its mixtures by its content (`segments.describe`). A run folder that an earlier version wrote has their paths, and
the sha256 of each manifest.json: there a mixture counts as the same where either agrees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prism.core import log
from megatron_prism.core.config import DataConfig, MixtureChange
from megatron_prism.core.errors import Problem
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import mixture

SHOWN_DIGITS = 12  # of a sha256


class _Read(NamedTuple):
    """A mixture that a run has read from, and the key that names it."""

    key: str
    step: int
    prepared: Path
    weights: Mapping[str, float] | None


def check(
    before: DataConfig, now: DataConfig, started: Mapping[str, Any], mixtures: Sequence[Mapping[str, Any]], step: int
) -> list[Problem]:
    """Return the problems of a run that stands at `step`.

    started: the entry of the run's last start in its manifest. mixtures: those of the config now, as `segments.describe` gives them.
    """
    other_run = "or start another run from this one: init.checkpoint, and another run_dir"
    then_read, now_read = _read(before, step), _read(now, step)
    if [(read.step, read.weights) for read in then_read[1:]] != [(read.step, read.weights) for read in now_read[1:]]:
        required = f"{_in_words(before.changes)}, as the run has read them up to step {step}"
        return [
            Problem("data.changes", _in_words(now.changes), required, f"a mixture may change from step {step} on; put it back; {other_run}")
        ]
    recorded = started.get("plan", {}).get("mixtures")
    if again := _read_again((recorded or ())[: len(then_read)]):
        found = f"source {again} comes back, and an earlier version of megatron_prism, which began this run, read it from its start again"
        return [Problem("data.changes", found, "a source that comes back to continue where it was", other_run)]
    problems: dict[Path, Problem] = {}
    for index, (then, here) in enumerate(zip(then_read, now_read, strict=True)):
        if recorded is None:
            is_same, found, required = (
                _is_alike(then.prepared, here.prepared, started),
                str(here.prepared),
                f"{then.prepared}, or a copy of it",
            )
        else:
            said, this = recorded[index], mixtures[index]
            is_same = said["sha256"] == this["sha256"]
            found = f"{here.prepared}, a mixture of other documents (sha256 {this['sha256'][:SHOWN_DIGITS]})"
            required = f"the mixture that the run has read (sha256 {said['sha256'][:SHOWN_DIGITS]}), which was at {said['prepared']}"
            if is_same and said["weights"] != this["weights"] and then.weights == here.weights:
                is_same, found, required = (
                    False,
                    f"{here.prepared} with weights {_weights(this['weights'])}",
                    f"{_weights(said['weights'])}, as the run has read it",
                )
        fix = f"name the folder where that mixture is now; to read another from here on, keep that one and add to data.changes {{step: {step}, "
        if not is_same:  # one that a later change keeps is named once
            problems.setdefault(here.prepared, Problem(here.key, found, required, f"{fix}prepared: {here.prepared}}}; {other_run}"))
    return list(problems.values())


def _read(data: DataConfig, step: int) -> list[_Read]:
    """Return the mixtures that a run's first `step` steps have read."""
    read = [_Read("data.prepared", 0, data.prepared, data.weights)]
    for index, change in enumerate(data.changes):
        if change.step < step:
            read.append(_Read(f"data.changes.{index}.prepared", change.step, change.prepared or read[-1].prepared, change.weights))
    return read


def _in_words(changes: Sequence[MixtureChange]) -> str:
    """Return mixture changes as a config has them."""
    words = []
    for change in changes:
        prepared = [f"prepared: {change.prepared}"] if change.prepared else []
        words.append(", ".join([f"step: {change.step}", *prepared, *([f"weights: {_weights(change.weights)}"] if change.weights else [])]))
    return f"[{', '.join(f'{{{one}}}' for one in words)}]"


def _weights(weights: Mapping[str, float]) -> str:
    return f"{{{', '.join(f'{name}: {weight:g}' for name, weight in weights.items())}}}"


def _read_again(recorded: Sequence[Mapping[str, Any]]) -> str:
    """Return a source that left the mixture and came back, where the record is of a version that did not know what was `taken` of it by then."""
    sources = [set(mixture["weights"]) for mixture in recorded]
    for index, names in enumerate(sources[1:], 1):
        back = (names & set().union(*sources[: index - 1])) - sources[index - 1]
        if back and "taken" not in recorded[index]:
            return min(back)
    return ""


def _is_alike(then: Path, now: Path, started: Mapping[str, Any]) -> bool:
    """Say whether the path agrees, or the manifest.json that a start of an earlier version recorded."""
    recorded = started.get("inputs", {}).get(str(then / mixture.FILE))
    is_unchanged = (now / mixture.FILE).is_file() and sha256_file(now / mixture.FILE) == recorded
    if then.resolve() == now.resolve() and recorded is not None and not is_unchanged:
        log.get().warning("%s was written again since this run began; the run does not know whether it is the mixture that it read", now)
    return is_unchanged or then.resolve() == now.resolve()
