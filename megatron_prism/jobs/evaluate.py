"""`prism evaluate`: a model's scores on tasks, as a folder with every response (eval/folder.py). Started again, it goes on, or grows.

Input: a checkpoint, a run, a Hugging Face folder or an endpoint, and the sets' files. Output: results.jsonl, summary.json.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_prism.checkpoint import start
from megatron_prism.core import log, manifest
from megatron_prism.core.check.evaluate import check_evaluate
from megatron_prism.core.check.gang import check_model_on_gang, data_parallel_size
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.config import EvaluateConfig, SamplingConfig
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.data import chat, tokenizer
from megatron_prism.eval import folder, requests, sample, summary, tasks
from megatron_prism.eval import model as models_at_rest
from megatron_prism.eval.cache import Kept
from megatron_prism.eval.judge import Judge
from megatron_prism.eval.model import Evaluated
from megatron_prism.eval.requests import Asked, Request
from megatron_prism.eval.tasks import Task
from megatron_prism.families import registry
from megatron_prism.generate import engines
from megatron_prism.generate.cached import unsupported
from megatron_prism.generate.engine import Engine, Sampling
from megatron_prism.grade import grader
from megatron_prism.jobs import train
from megatron_prism.models import build as models
from megatron_prism.parallel import environment
from megatron_prism.parallel.groups import Groups, from_first, on_first
from megatron_prism.rl import gate
from megatron_prism.rl.batches import Shape
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog

GATE_TOKENS = 2048  # of a prompt: the gate looks at the model, and a long prompt's own pass would need training's memory
GATE_PROMPTS = 64  # of which the gate takes the longest
SHOWN = ("score", "standard_error", "num_questions", "num_samples", "num_faults")


@dataclass(frozen=True)
class Resolved:
    """An evaluation before a process starts. asked: the questions of each task as the model reads them."""

    config: EvaluateConfig
    evaluated: Evaluated
    spec: tokenizer.TokenizerSpec
    template: chat.ChatTemplate | None
    tasks: Mapping[str, Task]
    asked: Mapping[str, tuple[Asked, ...]]
    figures: dict[str, Any]


def resolve(config: EvaluateConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts. Nothing is written.

    Raises: InputError with every problem found.
    """
    raise_problems(check_evaluate(config, world_size))
    evaluated, model_problems = start.attempt(partial(models_at_rest.read, config.model), "model")
    read = {name: start.attempt(partial(tasks.read, name, task)) for name, task in config.tasks.items() if tasks.is_sampled(name, task)}
    _, place_problems = start.attempt(partial(folder.begun, config.out))
    grid = config.parallel
    unable = unsupported(grid.vpp, grid.cp, config.fp8 is not None)
    raise_problems([*model_problems, *(problem for _, problems in read.values() for problem in problems), *place_problems, *unable])
    assert evaluated is not None
    model, by_name = evaluated.model, {name: task for name, (task, _) in read.items() if task is not None}
    grader.require(question.kind for task in by_name.values() for question in task.questions)
    spec = tokenizer.load(evaluated.assets)
    needs_template = any(task.is_chat or not all(isinstance(one.prompt, str) for one in task.questions) for task in by_name.values())
    template = chat.load(evaluated.assets) if needs_template else None
    asked, unfit = {}, []
    for name, task in by_name.items():
        asked[name], problems = requests.ask(task, spec, template, model.max_position_embeddings, config.overlong, config.bos)
        unfit += problems
    raise_problems(
        [
            *check_model_on_gang(model, config),
            *check_architecture(model),
            *engines.check(_sampling(config), model, world_size, grid.tp),
            *tokenizer.check_vocabulary(evaluated.assets / tokenizer.FILE, model.vocab_size),
            *([] if spec.end_ids else [Problem("model", f"no end token in the files of {evaluated.root}", "an EOS, or no response ends")]),
            *unfit,
        ]
    )
    resolved = Resolved(config, evaluated, spec, template, by_name, asked, {})
    resolved.figures.update(_figures(resolved, world_size))
    return resolved


def _figures(resolved: Resolved, world_size: int) -> dict[str, Any]:
    config = resolved.config
    per_task = {
        name: {
            "set": task.set,
            "questions": len(task.questions),
            "responses": len(task.questions) * task.protocol.num_samples,
            "max_response_tokens": sum(one.max_tokens for one in resolved.asked[name]) * task.protocol.num_samples,
            "longest_prompt_tokens": max((len(one.tokens) for one in resolved.asked[name]), default=0),
            "shortened": sum(one.is_shortened for one in resolved.asked[name]),
        }
        for name, task in resolved.tasks.items()
    }
    return {
        "model": str(resolved.evaluated.root),
        "parameters": sum(registry.parameters(resolved.evaluated.model).values()),
        "world_size": world_size,
        "data_parallel": data_parallel_size(config, world_size),
        "tasks": per_task,
        "responses": sum(one["responses"] for one in per_task.values()),
        "environment": environment.variables(config),
        "out": str(config.out),
    }


def run(resolved: Resolved) -> dict[str, Any]:
    """Evaluate; every rank of the gang calls this and returns the result.

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    return train.on_gang(resolved, evaluate_in_gang)


def evaluate_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Evaluate on an existing rank grid: hold the folder, build the model, sample and grade what is new, sum up.

    Raises: Stopped where the evaluation was asked to stop. EnvironmentFault, CheckpointError.
    """
    config = resolved.config
    with ExitStack() as stack:
        stop_request = stack.enter_context(StopRequest(config.limits.wall_clock_s))
        watchdog = stack.enter_context(Watchdog(config.limits.hang_timeout_s, groups.rank))
        watchdog.doing("reading the model's sums")
        evaluated = from_first(resolved.evaluated)  # a run that goes on may have written another checkpoint meanwhile
        begun = on_first(lambda: _begin(resolved, stack))
        shards, ungraded = ([], []) if begun is None else begun.to_do(config.shard_responses)
        work = sample.Work(groups, None if begun is None else begun.judge, stop_request, watchdog)
        if from_first(bool(shards)):
            watchdog.doing("reading the model")
            chunks = models.build(evaluated.model, groups, config)
            models_at_rest.load(evaluated, chunks)
            engine = _engine(resolved, chunks, groups)
            _open_gate(resolved, engine, chunks, work)
            sample.run(work, sample.Local(engine, resolved.spec, config.cache_tokens), shards, ungraded)
        else:
            sample.run(work, None, [], ungraded)
        return from_first(on_first(lambda: _finish(resolved, begun)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Begun:
    """What rank 0 has of an evaluation: whose it is, every response that it wants, and what is kept of them."""

    identity: Mapping[str, Any]
    wanted: Sequence[Request]
    judge: Judge

    def to_do(self, shard_responses: int) -> tuple[list[list[Request]], list[Request]]:
        """Return the shards to sample, and the requests whose response is there and has no grade."""
        missing = [one for one in self.wanted if one.key not in self.judge.samples]
        return requests.shards(missing, shard_responses), self.judge.ungraded(self.wanted)


def _begin(resolved: Resolved, stack: ExitStack) -> Begun:
    config, identity = resolved.config, resolved.evaluated.identity()
    stack.enter_context(folder.held(config.out, partial(_describe, config, identity)))
    samples, grades = (Kept(config.out / name) for name in (folder.SAMPLES, folder.GRADES))
    graders: dict[GradeConfig, grader.Grader] = {}
    kinds = {question.kind for task in resolved.tasks.values() for question in task.questions}

    def grader_of(wanted: GradeConfig) -> grader.Grader:
        if wanted not in graders:
            graders[wanted] = stack.enter_context(grader.Grader(wanted, kinds))
        return graders[wanted]

    judge = Judge(resolved.tasks, config.grade, samples, grades, grader_of, grader_versions())
    how = {"sha256": identity["sha256"], "context": resolved.evaluated.model.max_position_embeddings, **_how(config)}
    del how["seed"]  # a response has its own
    wanted = [
        request
        for name, task in resolved.tasks.items()
        for request in requests.of_task(task, resolved.asked[name], how, config.seed, resolved.spec.end_ids)
    ]
    _warn(resolved)
    num_kept = sum(one.key in samples for one in wanted)
    log.get().info("%d responses, of which %d are kept from before", len(wanted), num_kept)
    return Begun(identity, wanted, judge)


def _describe(config: EvaluateConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    return manifest.describe(folder.KIND, {}, model=dict(identity), config=to_dict(config))


def _how(config: EvaluateConfig) -> dict[str, Any]:
    """Return what decides a response beside the model and the task."""
    return {"engine": config.engine, "precision": config.precision, "seed": config.seed}


def grader_versions() -> dict[str, str]:
    """Return the versions that a grade may change with."""
    try:
        return {"math-verify": importlib.metadata.version("math-verify")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _warn(resolved: Resolved) -> None:
    for name, asked in resolved.asked.items():
        if summary.num_bos(asked) in ("two", "mixed"):
            log.get().warning("%s: prompts begin with %s begin-of-text tokens (bos: %s)", name, summary.num_bos(asked), resolved.config.bos)
        if num := sum(one.is_shortened for one in asked):
            log.get().warning(
                "%s: the context leaves %d of %d prompts less room than max_tokens (overlong: shorten)", name, num, len(asked)
            )
        if num := sum(one.num_clipped > 0 for one in asked):
            log.get().warning("%s: %d of %d prompts lose their beginning (overlong: clip)", name, num, len(asked))


def _engine(resolved: Resolved, chunks: Sequence[Any], groups: Groups) -> Engine:
    config, model = resolved.config, resolved.evaluated.model
    longest = max(len(one.tokens) + one.max_tokens for asked in resolved.asked.values() for one in asked)
    context = min(longest, model.max_position_embeddings)
    return engines.engine_of(_sampling(config), config.precision, context, chunks, model, resolved.evaluated.assets, groups)


def _sampling(config: EvaluateConfig) -> SamplingConfig:
    return SamplingConfig(engine=config.engine, vllm=config.vllm, num_rows=config.num_rows, max_tokens=1)


def _open_gate(resolved: Resolved, engine: Engine, chunks: Sequence[Any], work: sample.Work) -> None:
    """Compare the engine with the model's own pass on a few prompts, at temperature 1: a wrong engine's scores would look like a weak model's."""
    work.watchdog.doing("comparing engine and model")
    config, tp = resolved.config, resolved.config.parallel.tp
    prompts = from_first([one.tokens[:GATE_TOKENS] for asked in resolved.asked.values() for one in asked][:GATE_PROMPTS])
    tokens = max(map(len, prompts)) + gate.START_TOKENS
    sampling = Sampling(max_tokens=gate.START_TOKENS, temperature=1.0, end_ids=resolved.spec.end_ids)
    shape = Shape(seq_length=-(-tokens // tp) * tp, micro_size=1, token_multiple=tp if config.parallel.sequence_parallel else 1)
    trust = gate.at_start(engine, chunks, prompts, sampling, shape, work.groups)
    gate.require(trust, gate.bound_of(config.precision, replace(_sampling(config), max_sampler_kl=config.max_sampler_kl)))
    if work.groups.rank == 0:
        log.get().info("engine and model agree: KL %.2g over %d tokens", trust.kl, trust.num_tokens)


def _finish(resolved: Resolved, begun: Begun | None) -> dict[str, Any]:
    """Write results and summary from what is kept, in the config's order, and return the scores for the user."""
    assert begun is not None
    config, judge = resolved.config, begun.judge
    by_task: dict[str, list[Request]] = {name: [] for name in resolved.tasks}
    for request in begun.wanted:
        by_task[request.task].append(request)
    parts = {}
    for name, task in resolved.tasks.items():
        results = [replace(judge.result(one), text="") for one in by_task[name]]
        parts[name] = summary.of_task(task, resolved.asked[name], results, _style(resolved, task), judge.versions)
    whole = summary.whole(begun.identity, _how(config), manifest.versions(), parts)
    folder.finish(config.out, (judge.result(one) for one in begun.wanted), whole)
    for name, part in parts.items():
        if part["num_faults"]:
            log.get().warning("%s: %d responses without a verdict; the same command grades them again", name, part["num_faults"])
    return {
        "out": str(config.out),
        "responses": len(begun.wanted),
        "faults": sum(part["num_faults"] for part in parts.values()),
        "tasks": {name: {key: part[key] for key in SHOWN} for name, part in parts.items()},
        "averages": {name: value for name, value in whole["averages"].items() if value is not None},
    }


def _style(resolved: Resolved, task: Task) -> str:
    if task.is_chat or not all(isinstance(one.prompt, str) for one in task.questions):
        assert resolved.template is not None
        return f"chat template {resolved.template.sha256}"
    return "plain text"
