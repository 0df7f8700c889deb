"""`prism rl CONFIG --only rollout`: sample and grade each step with the weights that the run starts from, and train nothing.

Output: rollouts/step_N.jsonl and metrics.jsonl in the run folder; no checkpoint, so the folder can be trained in later. Started again, it
goes on after its last step (rollouts/progress.json).
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.checkpoint import folder, integrity, run_folder, saving, sharded
from megatron_prism.core import disk, log
from megatron_prism.core.config import RLConfig
from megatron_prism.core.errors import InputError, Problem, Stopped
from megatron_prism.core.load import changed, load
from megatron_prism.core.manifest import read_json, sha256_file, write_json
from megatron_prism.data.prompts import FILE
from megatron_prism.grade import grader
from megatron_prism.models import build
from megatron_prism.parallel.groups import Groups, agree, from_first, on_first
from megatron_prism.rl import figures, gate, rollout, scoring
from megatron_prism.rl.rollout import Sampler
from megatron_prism.train import garbage, stop
from megatron_prism.train.metrics import Recorder
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_prism.checkpoint.start import Start
    from megatron_prism.jobs.rl import Resolved

PROGRESS = Path(rollout.FOLDER) / "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far the sampling is: the steps done, the prompts drawn, and what they are of. It is written whole after each step's responses.

    weights_step, weights_sha256: the step of the weights, and the sum of their checkpoint's own sums (empty: weights made from the seed).
    """

    step: int
    num_drawn: int
    weights_step: int
    weights_sha256: str
    prompts_sha256: str


def read(run_dir: Path) -> Progress | None:
    """Return how far a run's sampling is, None where it has none. Raises: InputError for a file that says something else."""
    path = run_dir / PROGRESS
    try:
        return Progress(**read_json(path)) if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise InputError(Problem(str(path), str(error), "as a run wrote it", f"remove {path.parent} to sample anew")) from error


def forget(run_dir: Path) -> None:
    """Remove what says how far the sampling is: the folder is trained in, and the responses may become others."""
    with disk.writing(run_dir / PROGRESS):
        (run_dir / PROGRESS).unlink(missing_ok=True)


def check(config: RLConfig, begin: Start, prompts_sha256: str) -> list[Problem]:
    """Return what must not change where sampling goes on. Of a folder with checkpoints run_folder.check_resume says it."""
    done = read(config.run_dir)
    if done is None or begin.is_resumed or done.weights_step:
        return []
    fix = f"put it back; or remove {config.run_dir / rollout.FOLDER}; or another run_dir"
    required = f"that of the responses in {config.run_dir / rollout.FOLDER}"
    path = config.run_dir / run_folder.CONFIG
    pairs = changed(load(path, RLConfig), config) if path.is_file() else ()
    problems = [Problem(key, str(now), f"{then}, {required}", fix) for key, then, now in pairs]
    if done.weights_sha256 != _sum(begin.weights):
        problems.append(Problem("init.checkpoint", f"{begin.weights}, another one", required, fix))
    if done.prompts_sha256 != prompts_sha256:
        problems.append(Problem("prompts", f"{config.prompts}, another set", required, fix))
    return problems


def sample_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Sample on an existing rank grid: hold the run folder, build the model without an optimizer, and collect every step's groups.

    Raises: Stopped where the run was asked to stop. ResultFailure where the sampler is not the trainer's.
    """
    config, is_first = resolved.config, groups.rank == 0
    begin = from_first(resolved.start)
    with ExitStack() as stack:
        request = stack.enter_context(StopRequest(config.limits.wall_clock_s))
        watchdog = stack.enter_context(Watchdog(config.limits.hang_timeout_s, groups.rank))
        if begin.weights is not None:
            sharded.require_whole(begin.weights)
        stack.enter_context(run_folder.begin(config, begin, [config.prompts / FILE], resolved.figures, groups))
        kinds = {one.prompt.kind for one in resolved.prompts}
        grades = on_first(lambda: stack.enter_context(grader.Grader(config.grade, kinds)))
        chunks = build.build(begin.model, groups, config)
        newest = saving.newest_whole(config.run_dir)
        if source := newest or begin.weights:
            sharded.load_weights(source, chunks)
        sampler = Sampler(config, rollout.engine(config, chunks, begin.model, begin.assets, groups), resolved.spec, grades)
        collect_garbage = stack.enter_context(garbage.collected(config.gc_interval))
        watchdog.doing("comparing sampler and trainer")
        scoring.open_gate(sampler, chunks, resolved.prompts, gate.bound_of(config.precision, config.rollout), groups)
        done = from_first(_progress(resolved, newest, begin))
        recorder = stack.enter_context(Recorder(config.run_dir, done.step, config.steps, enabled=is_first))
        num_drawn, longest_s = done.num_drawn, 0.0
        for step in range(done.step + 1, config.steps + 1):
            watchdog.doing(f"sampling step {step}")
            started = time.monotonic()
            rollouts = rollout.collect(sampler, resolved.prompts, num_drawn, step, weights_step=done.weights_step)
            num_drawn = rollouts.num_drawn
            recorder.record(step, figures.of_rollouts(rollouts) | figures.by_domain(rollouts))
            if is_first:
                rollout.write(config.run_dir, step, rollouts.groups)
                _write(config.run_dir, replace(done, step=step, num_drawn=num_drawn))
            collect_garbage(step)
            longest_s = max(longest_s, time.monotonic() - started)
            if (reason := agree([request.reason(2 * longest_s)])[0]) and step < config.steps:
                where = f"its responses are in {rollout.FOLDER}/; the same command goes on from there"
                raise Stopped(f"stopped by {stop.name(reason)} after step {step}; {where}")
    return {"run_dir": str(config.run_dir), "rollouts": str(config.run_dir / rollout.FOLDER), "steps": config.steps}


def _progress(resolved: Resolved, newest: Path | None, begin: Start) -> Progress:
    """Return how far the sampling by these weights is: what rank 0 finds in the folder, or its beginning."""
    run_dir, facts = resolved.config.run_dir, folder.read(newest) if newest else None
    step, num_drawn = (facts.step, int(facts.facts["rl"]["num_drawn"])) if facts else (0, 0)
    own = Progress(step, num_drawn, step, _sum(newest or begin.weights), resolved.figures["prompts_sha256"]["prompts"])
    done = read(run_dir)
    if done is None or replace(done, step=step, num_drawn=num_drawn) != own:
        return own
    log.get().info("continuing after step %d", done.step)
    return done


def _sum(checkpoint: Path | None) -> str:
    sums = checkpoint / integrity.SUMS if checkpoint else None
    return sha256_file(sums) if sums and sums.is_file() else ""


def _write(run_dir: Path, progress: Progress) -> None:
    with disk.writing(run_dir / PROGRESS):
        write_json(run_dir / PROGRESS, asdict(progress))
