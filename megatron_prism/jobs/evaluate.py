"""`prism evaluate`: a model's scores on tasks, as a folder with every response (eval/folder.py). Started again, it goes on, or grows.

Input: a checkpoint, a run, a Hugging Face folder or an endpoint, and the sets' files. Output: results.jsonl, summary.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_prism.checkpoint import start
from megatron_prism.core import log
from megatron_prism.core.check.evaluate import check_evaluate, kind_of
from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.config import EvaluateConfig
from megatron_prism.core.errors import Problem, ResultFailure, raise_problems
from megatron_prism.eval import endpoint, evaluation, folder, measured, requests, sample, tasks
from megatron_prism.eval import model as models_at_rest
from megatron_prism.eval import reader as readers
from megatron_prism.eval.measured import Measured
from megatron_prism.eval.model import Evaluated
from megatron_prism.eval.reader import Reader
from megatron_prism.eval.requests import Asked
from megatron_prism.eval.ruler import task as ruler_task
from megatron_prism.eval.tasks import Task
from megatron_prism.eval.verdicts import foreseen, paired, verdict
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


@dataclass(frozen=True)
class Resolved:
    """An evaluation before a process starts.

    reader: None behind an endpoint. tasks, asked: those whose responses are sampled, with their questions as the model reads them.
    measured: those that ask the model themselves.
    """

    config: EvaluateConfig
    reader: Reader | None
    tasks: Mapping[str, Task]
    asked: Mapping[str, tuple[Asked, ...]]
    measured: Mapping[str, Measured]
    figures: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """Return what the evaluation is of. It reads a Hugging Face folder whole."""
        if self.reader is not None:
            return self.reader.evaluated.identity()
        assert self.config.model.endpoint is not None
        return endpoint.identity(self.config.model.endpoint)


def resolve(config: EvaluateConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts. Nothing is written.

    Raises: InputError with every problem found.
    """
    raise_problems(check_evaluate(config, world_size))
    by_name: dict[str, Task] = {}
    to_measure: dict[str, Measured] = {}
    _, problems = start.attempt(partial(folder.begun, config.out))
    for name, wanted in config.tasks.items():
        if tasks.is_sampled(name, wanted):
            read = ruler_task.read if kind_of(name, wanted) == ruler_task.RULER else tasks.read
            task, wrong = start.attempt(partial(read, name, wanted))
            by_name |= {} if task is None else {name: task}
        else:
            one, wrong = start.attempt(partial(measured.read, name, wanted), f"tasks.{name}")
            to_measure |= {} if one is None else {name: one}
        problems += wrong
    evaluated, wrong = _model(config, by_name)
    before, unread = _against(config)
    raise_problems([*problems, *wrong, *unread])
    grader.require(question.kind for task in by_name.values() for question in task.questions)
    reader, asked = None, {name: _ask(None, task) for name, task in by_name.items()}
    if evaluated is not None:
        of_each = [problem for one in to_measure.values() for problem in measured.check(one, evaluated)]
        raise_problems([*of_each, *measured.check_names(to_measure.values())])
        reader = readers.read(config, evaluated, by_name, world_size)
        asked = reader.ask(by_name.values())
    raise_problems(_check_ruler(config, by_name, reader))
    if before is not None:
        raise_problems(foreseen.check(config, before, reader, by_name, asked, to_measure))
    figures = _figures(config, reader, by_name, asked, to_measure, world_size)
    if not log.is_first():
        by_name, asked = {name: task for name, task in by_name.items() if task.set == ruler_task.RULER}, {}  # rank 0 alone asks
    return Resolved(config, reader, by_name, asked, to_measure, figures)


def _against(config: EvaluateConfig) -> tuple[paired.Evaluation | None, list[Problem]]:
    """Return the evaluation that this one is held against, and why it cannot be. Rank 0 alone makes the verdict."""
    if config.against is None or not log.is_first():
        return None, []
    if config.against.resolve() == config.out.resolve():
        return None, [Problem("against", str(config.against), "another evaluation than out", "choose another out")]
    return start.attempt(partial(paired.read, config.against), "against")


def _check_ruler(config: EvaluateConfig, by_name: Mapping[str, Task], reader: Reader | None) -> list[Problem]:
    """Return why RULER's lengths mean nothing to a model: they are of its own tokens, and within its context."""
    problems = []
    for name, task in by_name.items():
        if task.set != ruler_task.RULER:
            continue
        if reader is None and config.model.endpoint is not None and config.model.endpoint.tokenizer is None:
            problems.append(Problem("model.endpoint.tokenizer", "no value", f"the model's tokenizer, for the lengths of tasks.{name}"))
        if reader is not None and (longest := max(task.origin["lengths"])) > reader.context:
            problems.append(Problem(f"tasks.{name}.ruler.lengths", str(longest), f"at most the model's context of {reader.context}"))
    return problems


def _model(config: EvaluateConfig, by_name: Mapping[str, Task]) -> tuple[Evaluated | None, list[Problem]]:
    """Return the model that the gang will build, None behind an endpoint, and the problems of either."""
    if config.model.endpoint is not None:
        return None, endpoint.check(config.model.endpoint, (one for task in by_name.values() for one in task.questions))
    evaluated, problems = start.attempt(partial(models_at_rest.read, config.model), "model")
    grid = config.parallel
    return evaluated, [*problems, *unsupported(grid.vpp, grid.cp, config.fp8 is not None)]


def _figures(
    config: EvaluateConfig,
    reader: Reader | None,
    by_name: Mapping[str, Task],
    asked: Mapping[str, Sequence[Asked]],
    to_measure: Mapping[str, Measured],
    world_size: int,
) -> dict[str, Any]:
    sampled = {
        name: {
            "set": task.set,
            "questions": _num_questions(config, task),
            "responses": _num_questions(config, task) * task.protocol.num_samples,
            **_most_tokens(config, task, asked[name]),
            "shortened": sum(one.is_shortened for one in asked[name]),
        }
        for name, task in by_name.items()
    }
    served = config.model.endpoint
    return {
        "model": f"{served.model} at {served.url}" if served is not None else str(config.model.checkpoint or config.model.hf),
        **({} if reader is None else {"parameters": sum(registry.parameters(reader.evaluated.model).values())}),
        "world_size": world_size,
        "data_parallel": data_parallel_size(config, world_size),
        "tasks": {name: sampled[name] if name in sampled else measured.figures(to_measure[name]) for name in config.tasks},
        "responses": sum(one["responses"] for one in sampled.values()),
        "environment": environment.variables(config),
        "out": str(config.out),
    }


def _most_tokens(config: EvaluateConfig, task: Task, asked: Sequence[Asked]) -> dict[str, int]:
    if task.set == ruler_task.RULER:
        responses, longest = ruler_task.most_tokens(config.tasks[task.name])
    else:
        responses, longest = sum(one.max_tokens for one in asked), max((len(one.tokens) for one in asked), default=0)
    return {"max_response_tokens": responses * task.protocol.num_samples, "longest_prompt_tokens": longest}


def _num_questions(config: EvaluateConfig, task: Task) -> int:
    return ruler_task.total(config.tasks[task.name]) if task.set == ruler_task.RULER else len(task.questions)


def run(resolved: Resolved) -> dict[str, Any]:
    """Evaluate; every rank of the gang calls this and returns the result.

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    if resolved.reader is not None:
        config, model = resolved.config, resolved.reader.evaluated.model
        raise_problems(engines.check_machine(readers.sampling_of(config), model, config.precision, section=""))
    return train.on_gang(resolved, evaluate_in_gang)


def evaluate_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Evaluate on an existing rank grid: read the model's sums, then what score() does.

    Raises: Stopped where the evaluation was asked to stop. EnvironmentFault, CheckpointError.
    """
    limits = resolved.config.limits
    with StopRequest(limits.wall_clock_s) as stop_request, Watchdog(limits.hang_timeout_s, groups.rank) as watchdog:
        watchdog.doing("reading the model's sums")
        identity = from_first(on_first(resolved.identity))
        assert identity is not None
        resolved = with_ruler(resolved, groups, watchdog)
        gang = Gang(groups, stop_request, watchdog)
        return score(resolved, identity, gang, partial(_chunks, resolved, gang), partial(sampler_of, resolved))


@dataclass(frozen=True)
class Gang:
    """The ranks that evaluate, and how they end."""

    groups: Groups
    stop_request: StopRequest
    watchdog: Watchdog


def score(
    resolved: Resolved,
    identity: Mapping[str, Any],
    gang: Gang,
    chunks_of: Callable[[], Sequence[Any]],
    sampler_of: Callable[[Sequence[Any], sample.Work], sample.Sampler],
) -> dict[str, Any]:
    """Hold the folder, load the model if anything is new, sample and grade that, measure, sum up. Every rank calls this.

    chunks_of: builds or loads the model. sampler_of: what answers over the chunks. Raises: as evaluate_in_gang.
    """
    config, groups = resolved.config, gang.groups
    with ExitStack() as stack:
        begun = on_first(partial(evaluation.begin, config, identity, resolved.reader, resolved.tasks, resolved.asked, stack))
        shards, ungraded = begun.to_do() if begun is not None else ([], [])
        reader = resolved.reader  # None behind an endpoint, of which nothing is measured
        keys = {} if reader is None else {name: one.key(reader, identity["sha256"]) for name, one in resolved.measured.items()}
        missing = from_first([name for name, key in keys.items() if begun is not None and key not in begun.measured])
        is_sampling = from_first(bool(shards))
        chunks = chunks_of() if reader is not None and (is_sampling or missing) else []
        work = sample.Work(groups, None if begun is None else begun.judge, gang.stop_request, gang.watchdog)
        sample.run(work, sampler_of(chunks, work) if is_sampling else None, shards, ungraded)
        for name in missing:
            assert reader is not None
            answers, before = None if begun is None else begun.answers, partial(sample.pause, work, name)
            one = resolved.measured[name]
            made = measured.measure(one, reader, identity["sha256"], chunks, groups, answers, before)
            on_first(partial(_keep, begun, keys[name], made))
        return from_first(on_first(partial(_finish, begun, keys))) or {}


def with_ruler(resolved: Resolved, groups: Groups, watchdog: Watchdog) -> Resolved:
    """Return an evaluation with RULER's questions, which all ranks make together, and rank 0 asks."""
    config, reader = resolved.config, resolved.reader
    by_name, asked = dict(resolved.tasks), dict(resolved.asked)
    for name, task in resolved.tasks.items():
        if task.set != ruler_task.RULER:
            continue
        count_tokens = reader.count_tokens if reader is not None else endpoint.counter(config.model.endpoint)
        made = replace(task, questions=ruler_task.questions(config.tasks[name], config.seed, count_tokens, groups, watchdog.doing))
        if (own := on_first(partial(_ask, reader, made))) is not None:
            by_name[name], asked[name] = made, own
    return replace(resolved, tasks=by_name, asked=asked)


def _ask(reader: Reader | None, task: Task) -> tuple[Asked, ...]:
    return requests.ask_elsewhere(task) if reader is None else reader.ask([task])[task.name]


def _chunks(resolved: Resolved, gang: Gang) -> Sequence[Any]:
    """Build the model, and load its weights."""
    reader = resolved.reader
    assert reader is not None
    gang.watchdog.doing("reading the model")
    evaluated = from_first(reader.evaluated)  # a run that goes on may have written another checkpoint meanwhile
    chunks = models.build(evaluated.model, gang.groups, reader.config)
    models_at_rest.load(evaluated, chunks)
    return chunks


def sampler_of(resolved: Resolved, chunks: Sequence[Any], work: sample.Work) -> sample.Sampler:
    """Return the engine over the chunks, once it has shown that it is the model; or the endpoint."""
    config, reader = resolved.config, resolved.reader
    if reader is None:
        assert config.model.endpoint is not None
        return endpoint.Endpoint(config.model.endpoint)
    longest = from_first(max((len(one.tokens) + one.max_tokens for asked in resolved.asked.values() for one in asked), default=0))
    given = (chunks, reader.evaluated.model, reader.evaluated.assets, work.groups)
    engine = engines.engine_of(readers.sampling_of(config), config.precision, min(longest, reader.context), *given)
    _open_gate(resolved, reader, engine, chunks, work)
    return sample.Local(engine, reader.spec, config.cache_tokens)


def _open_gate(resolved: Resolved, reader: Reader, engine: Engine, chunks: Sequence[Any], work: sample.Work) -> None:
    """Compare the engine with the model's own pass on a few prompts, at temperature 1: a wrong engine's scores would look like a weak model's."""
    work.watchdog.doing("comparing engine and model")
    config, tp = resolved.config, resolved.config.parallel.tp
    prompts = from_first([list(one.tokens[:GATE_TOKENS]) for asked in resolved.asked.values() for one in asked][:GATE_PROMPTS])
    tokens = max(map(len, prompts)) + gate.START_TOKENS
    sampling = Sampling(max_tokens=gate.START_TOKENS, temperature=1.0, end_ids=reader.spec.end_ids)
    shape = Shape(seq_length=-(-tokens // tp) * tp, micro_size=1, token_multiple=tp if config.parallel.sequence_parallel else 1)
    trust = gate.at_start(engine, chunks, prompts, sampling, shape, work.groups)
    gate.require(trust, gate.bound_of(config.precision, readers.sampling_of(config)))
    if work.groups.rank == 0:
        log.get().info("engine and model agree: KL %.2g over %d tokens", trust.kl, trust.num_tokens)


def _keep(begun: evaluation.Evaluation | None, key: str, part: Mapping[str, Any] | None) -> None:
    assert begun is not None
    begun.measured.write({key: part})


def _finish(begun: evaluation.Evaluation | None, keys: Mapping[str, str]) -> dict[str, Any]:
    """Write results and summary, and hold them against an earlier evaluation. `failure` of the result says why the job's exit code is 1."""
    assert begun is not None
    result, config = begun.finish(keys), begun.config
    if config.against is None:
        return result
    made = verdict.compare(config.out, config.against, config.policy)
    verdict.write(config.out, made)
    for line in verdict.lines(made):
        log.get().info("%s", line)
    result |= {"verdict": made.decision}
    try:
        verdict.require(made)
    except ResultFailure as failure:
        result |= {"failure": str(failure)}
    return result
