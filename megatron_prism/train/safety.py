"""What keeps a run's state good: a bad step is not applied, a run goes back where it must, and weights that are not finite are never saved.

Every loop that trains shares these calls, whatever its objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from megatron_prism.core import log
from megatron_prism.core.config import RunConfig
from megatron_prism.core.errors import ResultFailure
from megatron_prism.parallel import groups, launch
from megatron_prism.parallel.groups import Groups
from megatron_prism.train import optim
from megatron_prism.train.guard import Decision, Guard, Verdict
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.timers import Timers
from megatron_prism.train.watchdog import Watchdog


class Saver(Protocol):
    """What writes the run's checkpoints, one at a time. All ranks call begin, finish and rewind together."""

    longest_s: float  # the longest save so far
    num_rewinds: int  # how often the weights went back

    def begin(self, step: int, facts: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of this step; `facts` are kept with it."""

    def is_saving(self) -> bool:
        """Return whether a save was begun and is not finished."""

    def is_writing(self) -> bool:
        """Return whether this rank's child processes still write it."""

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it the newest."""

    def rewind(self) -> int | None:
        """Load the newest checkpoint into model and optimizer. Return its step, None where there is none."""


class Run(Protocol):
    """What these functions read of a loop's Run."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def groups(self) -> Groups: ...
    @property
    def chunks(self) -> Sequence[Any]: ...
    @property
    def saver(self) -> Saver: ...
    @property
    def guard(self) -> Guard: ...
    @property
    def watchdog(self) -> Watchdog: ...
    @property
    def stop(self) -> StopRequest: ...


def require_wanted(run: Run, first_step: int) -> None:
    """Leave before the first step of this start where a rank was asked to stop while the run was built or validated. Every rank calls this.

    Nothing has changed that would have to be saved. A run that has made all its steps only ends.
    Raises: Stopped.
    """
    if first_step < run.config.steps and (number := groups.agree([run.stop.asked()])[0]):
        raise launch.not_begun(int(number))


def remember(run: Run, step: int, loss: float | None, decision: Decision, timers: Timers) -> None:
    """Finish a checkpoint that every rank has written, and record the decision in the guard. loss: None where there was nothing to learn from."""
    if run.saver.is_saving() and not decision.is_writing:
        with timers.phase("save"):
            run.saver.finish()
    if decision.is_taken:
        if loss is not None:
            run.guard.took(loss)
    else:
        _pass_over(run, step, decision.verdict, decision.why)


def _pass_over(run: Run, step: int, verdict: Verdict, why: str) -> None:
    """Handle a step that was not applied. The next step reads the next batch.

    Raises: ResultFailure where the run is to stop.
    """
    run.guard.passed_over()
    if verdict is Verdict.SKIP:
        _say(run, f"step {step}: {why}: not taken")
        return
    run.saver.finish()  # what is being written was whole before this step
    if verdict is Verdict.STOP:
        raise ResultFailure(f"step {step}: {why}; the weights did not take it; what was saved before is good")
    with optim.settled(run.chunks, run.config.parallel):
        _rewind(run, step, why)


def _rewind(run: Run, step: int, why: str) -> None:
    back = run.saver.rewind()
    if back is None:
        raise ResultFailure(f"step {step}: {why}; there is no checkpoint to go back to")
    _say(run, f"step {step}: {why}: back to the weights of step {back}; the data up to here is passed over")


def _say(run: Run, text: str) -> None:
    if run.groups.rank == 0:
        log.get().warning("%s", text)


def save(run: Run, step: int, timers: Timers, wait: bool, facts: Callable[[], Mapping[str, Any]] = dict) -> None:
    """Begin to save a step, with the guard and other facts; wait until it is saved, or not. Weights that are not finite are never saved.

    facts: called on every rank once it is known whether the run goes back.
    """
    run.watchdog.doing(f"saving step {step}")
    with timers.phase("save"):
        run.saver.finish()  # the one before
        with optim.settled(run.chunks, run.config.parallel):
            if groups.agree([not optim.are_finite(run.chunks)])[0]:
                _never_save(run, step)
            run.saver.begin(step, {"guard": run.guard.state(), **facts()})
        if wait:
            run.saver.finish()


def save_and_validate(
    run: Run,
    step: int,
    timers: Timers,
    stop_reason: float,
    validate: Callable[[], None] | None,
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Validate after a step, unless validate is None, and save where it is due. Where the run stops it is saved first, and at once.

    A validation may take longer than Slurm leaves a run that it has told to stop. stop_reason: as in a Decision. facts: as for `save`.
    """
    config = run.config
    if stop_reason:
        save(run, step, timers, True, facts)
    if validate is not None:
        validate()
    if not stop_reason and due(step, config.save.interval, config.steps):
        save(run, step, timers, not config.save.background, facts)


def _never_save(run: Run, step: int) -> None:
    """Handle NaN or inf weights found before a save: reload the last checkpoint, or stop."""
    why = "weights that are not finite"
    if run.config.guard.on_nonfinite == "stop" or run.guard.num_events >= run.config.guard.max_events:
        raise ResultFailure(f"step {step}: {why}; they were not saved; what was saved before is good")
    run.guard.passed_over()
    _rewind(run, step, why)


def due(step: int, interval: int, steps: int) -> bool:
    """Say whether what is done every `interval` steps, and at the last, is done after this step. 0: at the last step only."""
    return step == steps or (interval > 0 and step % interval == 0)
