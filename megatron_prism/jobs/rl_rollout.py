"""`prism rl CONFIG --only rollout`: sample and grade each step with the weights that the run starts from, and train nothing.

Output: rollouts/step_N.jsonl and metrics.jsonl in the run folder; no checkpoint, so the folder can be trained in later.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from megatron_prism.checkpoint import folder, run_folder, saving, sharded
from megatron_prism.core.errors import Stopped
from megatron_prism.grade import grader
from megatron_prism.models import build
from megatron_prism.parallel.groups import Groups, agree, from_first, on_first
from megatron_prism.rl import figures, rollout
from megatron_prism.rl.rollout import Sampler
from megatron_prism.train import stop
from megatron_prism.train.metrics import Recorder
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_prism.jobs.rl import Resolved


def sample_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Sample on an existing rank grid: hold the run folder, build the model without an optimizer, and collect every step's groups.

    Raises: Stopped where the run was asked to stop.
    """
    config, is_first = resolved.config, groups.rank == 0
    begin = from_first(resolved.start)
    with ExitStack() as stack:
        request = stack.enter_context(StopRequest(config.limits.wall_clock_s))
        watchdog = stack.enter_context(Watchdog(config.limits.hang_timeout_s, groups.rank))
        if begin.weights is not None:
            sharded.require_whole(begin.weights)
        stack.enter_context(run_folder.begin(config, begin, (), resolved.figures, groups))
        kinds = {one.prompt.kind for one in resolved.prompts}
        grades = on_first(lambda: stack.enter_context(grader.Grader(config.grade, kinds)))
        chunks = build.build(begin.model, groups, config)
        newest = saving.newest(config.run_dir)
        if source := newest or begin.weights:
            sharded.load_weights(source, chunks)
        recorder = stack.enter_context(Recorder(config.run_dir, begin.step, config.steps, enabled=is_first))
        sampler = Sampler(config, rollout.engine(config, chunks, begin.model, begin.assets, groups), resolved.spec, grades)
        num_drawn = 0 if newest is None else int(folder.read(newest).facts["rl"]["num_drawn"])
        for step in range(begin.step + 1, config.steps + 1):
            watchdog.doing(f"sampling step {step}")
            rollouts = rollout.collect(sampler, resolved.prompts, num_drawn, step)
            num_drawn = rollouts.num_drawn
            if is_first:
                rollout.write(config.run_dir, step, rollouts.groups)
            recorder.record(step, figures.of_rollouts(rollouts))
            if (reason := agree([request.reason(0.0)])[0]) and step < config.steps:
                raise Stopped(f"stopped by {stop.name(reason)} after step {step}; its responses are in {rollout.FOLDER}/")
    return {"run_dir": str(config.run_dir), "rollouts": str(config.run_dir / rollout.FOLDER), "steps": config.steps}
