"""`prism rl filter`: how often a checkpoint's model answers each prompt of a set right, as a folder of pass counts (rl/passes.py).

Input: a checkpoint and a prompt set (`prism prompts`). Output: what `prism rl mix` selects prompts by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_prism.checkpoint import folder, integrity, sharded, start
from megatron_prism.checkpoint.folder import Checkpoint
from megatron_prism.core import log, manifest
from megatron_prism.core.check.filter import check_filter
from megatron_prism.core.check.gang import check_model_on_gang, data_parallel_size
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.check.train import check_extension
from megatron_prism.core.config import FilterConfig, ModelConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.core.load import build, changed, to_dict
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data import tokenizer
from megatron_prism.eval.evaluation import grader_versions
from megatron_prism.families import registry
from megatron_prism.generate import engines
from megatron_prism.generate.cached import unsupported
from megatron_prism.grade import grader
from megatron_prism.jobs import train
from megatron_prism.models import build as models
from megatron_prism.parallel import environment
from megatron_prism.parallel.groups import Groups, from_first, on_first
from megatron_prism.report.bars import bars
from megatron_prism.rl import encoded as encoded_sets
from megatron_prism.rl import filter, passes
from megatron_prism.rl.rollout import Encoded
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog


@dataclass(frozen=True)
class Resolved:
    """A filter before a process starts. identity: what the counts are of, which a filter that goes on must share."""

    config: FilterConfig
    checkpoint: Checkpoint
    model: ModelConfig
    spec: tokenizer.TokenizerSpec
    prompts: tuple[Encoded, ...]
    identity: Mapping[str, Any]
    figures: dict[str, Any]

    @property
    def folder(self) -> passes.Folder:
        """The folder of the counts."""
        return passes.Folder(self.config.out, [one.prompt.id for one in self.prompts], self.config.shard_prompts)


def resolve(config: FilterConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts. Nothing is written.

    Raises: InputError with every problem found.
    """
    raise_problems(check_filter(config, world_size))
    assert config.init.checkpoint is not None
    checkpoint, start_problems = start.attempt(partial(folder.read, config.init.checkpoint), "init.checkpoint")
    prompts, problems = start.attempt(partial(prompt_set.read, config.prompts), "prompts")
    begun, place_problems = start.attempt(partial(passes.begun, config.out))
    grid = config.parallel
    unable = unsupported(grid.vpp, grid.cp, config.fp8 is not None)
    raise_problems([*start_problems, *problems, *place_problems, *unable])
    assert checkpoint is not None and prompts is not None
    grader.require(prompt.kind for prompt in prompts)
    model = config.init.extend(checkpoint.model)
    room = model.max_position_embeddings - config.rollout.max_tokens
    spec, (encoded,), unfit = encoded_sets.encode({"prompts": prompts}, checkpoint.assets, model, room)
    identity = _identity(config, checkpoint)
    raise_problems(
        [
            *check_extension(config.init, checkpoint.model),
            *check_model_on_gang(model, config),
            *check_architecture(model),
            *engines.check(config.rollout, model, world_size, grid.tp, grid.pp),
            *unfit,
            *(_check_same(config, begun, identity) if begun is not None else []),
        ]
    )
    resolved = Resolved(config, checkpoint, model, spec, encoded, identity, {})
    resolved.figures.update(_figures(resolved, world_size))
    return resolved


def _identity(config: FilterConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    sums = checkpoint.root / integrity.SUMS
    if not sums.is_file():
        raise_problems([Problem("init.checkpoint", f"{checkpoint.root} without {integrity.SUMS}", "a whole checkpoint")])
    return {
        "checkpoint": {"path": str(checkpoint.root), "step": checkpoint.step, "tokens": checkpoint.tokens, "sha256": sha256_file(sums)},
        "prompts": {"path": str(config.prompts), "sha256": sha256_file(config.prompts / prompt_set.FILE)},
        "config": to_dict(config),
        "grader": grader_versions(),
    }


def _check_same(config: FilterConfig, begun: Mapping[str, Any], identity: Mapping[str, Any]) -> list[Problem]:
    """A filter that goes on counts the same model's answers to the same prompts, sampled and graded in the same way."""
    fix = "put it back; or filter into another out"
    names = {"checkpoint": "init.checkpoint", "prompts": "prompts"}
    problems = [
        Problem(key, f"{identity[name]['path']}, another one", f"that of the counts in {config.out}: {begun[name]['path']}", fix)
        for name, key in names.items()
        if begun[name]["sha256"] != identity[name]["sha256"]
    ]
    is_ended, then = "sha256" in begun, begun.get("grader", identity["grader"])
    if not is_ended and then != identity["grader"]:
        other = f"{then}, as the counts in {config.out} have it"
        problems.append(
            Problem("the graders' versions", str(identity["grader"]), other, "that version of prism; or filter into another out")
        )
    before = build(begun["config"], FilterConfig, lambda key: f"{config.out / passes.MANIFEST}:config.{'.'.join(map(str, key))}")
    return problems + [
        Problem(key, str(now), f"{then}, as the counts in {config.out} have it", fix) for key, then, now in changed(before, config)
    ]


def _figures(resolved: Resolved, world_size: int) -> dict[str, Any]:
    config, prompts = resolved.config, resolved.prompts
    num_responses = len(prompts) * config.rollout.num_samples
    missing = resolved.folder.missing()
    return {
        "parameters": sum(registry.parameters(resolved.model).values()),
        "world_size": world_size,
        "data_parallel": data_parallel_size(config, world_size),
        "num_prompts": len(prompts),
        "domains": dict(sorted(Counter(one.prompt.domain for one in prompts).items())),
        "responses": num_responses,
        "max_response_tokens": num_responses * config.rollout.max_tokens,
        "prompt_tokens": sum(len(one.tokens) for one in prompts),
        "longest_prompt_tokens": max(len(one.tokens) for one in prompts),
        "shards": resolved.folder.num_shards,
        "shards_to_do": len(missing),
        "environment": environment.variables(config),
        "out": str(config.out),
    }


def run(resolved: Resolved) -> dict[str, Any]:
    """Filter; every rank of the gang calls this and returns the result.

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    raise_problems(engines.check_machine(resolved.config.rollout, resolved.model, resolved.config.precision))
    return train.on_gang(resolved, filter_in_gang)


def filter_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Filter on an existing rank grid: hold the folder, build the model, count.

    Raises: Stopped where the filter was asked to stop. EnvironmentFault, CheckpointError.
    """
    config, is_first = resolved.config, groups.rank == 0
    checkpoint = from_first(resolved.checkpoint)  # a run that goes on may have written another one meanwhile
    with ExitStack() as stack:
        stop_request = stack.enter_context(StopRequest(config.limits.wall_clock_s))
        watchdog = stack.enter_context(Watchdog(config.limits.hang_timeout_s, groups.rank))
        on_first(lambda: _hold(resolved, stack))
        missing = from_first(resolved.folder.missing() if is_first else [])
        if missing:
            kinds = {one.prompt.kind for one in resolved.prompts}
            grades = on_first(lambda: stack.enter_context(grader.Grader(config.grade, kinds)))
            chunks = models.build(resolved.model, groups, config)
            sharded.require_whole(checkpoint.root)
            sharded.load_weights(checkpoint.root, chunks)
            most = resolved.figures["longest_prompt_tokens"] + config.rollout.max_tokens
            engine = engines.engine_of(config.rollout, config.precision, most, chunks, resolved.model, checkpoint.assets, groups)
            place = resolved.folder
            work = filter.Filter(config, groups, chunks, resolved.prompts, place, engine, resolved.spec, grades, stop_request, watchdog)
            filter.run(work, missing)
        return from_first(_finish(resolved) if is_first else {})


def _hold(resolved: Resolved, stack: ExitStack) -> None:
    stack.enter_context(passes.held(resolved.config.out, partial(_describe, resolved)))
    begun = passes.begun(resolved.config.out)
    assert begun is not None
    raise_problems(_check_same(resolved.config, begun, resolved.identity))  # another filter may have begun since the look


def _describe(resolved: Resolved) -> dict[str, Any]:
    prompts = resolved.identity["prompts"]
    return manifest.describe(passes.KIND, {f"{prompts['path']}/{prompt_set.FILE}": prompts["sha256"]}, **resolved.identity)


def _finish(resolved: Resolved) -> dict[str, Any]:
    resolved.folder.finish()
    counts = list(resolved.folder.counts())
    domains = filter.by_domain((one.prompt for one in resolved.prompts), counts, resolved.config.rollout.num_samples)
    for domain, figures in domains.items():
        log.get().info(
            "%s: prompts by right answers of %d\n%s", domain, resolved.config.rollout.num_samples, "\n".join(bars(figures["histogram"]))
        )
    return {
        "out": str(resolved.config.out),
        "passes": str(resolved.config.out / passes.FILE),
        "prompts": len(counts),
        "responses": sum(one.num_samples for one in counts),
        "faults": sum(one.num_faults for one in counts),
        "domains": domains,
    }
