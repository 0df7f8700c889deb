"""Retention: the sets of lm-eval, run by lm-eval itself on our model. Each document is a Result; what lm-eval says of a task is kept beside."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_prism.core import log
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.eval.question import Result
from megatron_prism.eval.retention import leaderboards, lm_files, lm_tasks
from megatron_prism.eval.retention.examples import Watch, as_json, separate
from megatron_prism.eval.retention.lm_tasks import Planned
from megatron_prism.eval.retention.serve import Asking, Served, lead

if TYPE_CHECKING:
    from megatron_prism.eval.retention.lm import Bos, GangLM, Kept

PREFIX = "lm_eval/"  # of a Result's task
FEWSHOT_SEED, RANDOM_SEED = 1234, 0  # lm-eval's own defaults
ENGINE = {"log_likelihoods": "forward pass", "generations": "cached"}  # serve.Served, whichever engine samples the other tasks
UNSCORED = {"exact_match_original"}  # needs antlr 4.11, which math-verify does not have here; lm-eval gives 0 in silence


def run(
    served: Served,
    names: Sequence[str],
    paths: Mapping[str, Path],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bos: Bos | None = None,
    chat: bool = False,
    hub: bool = False,
    seed: int = 0,
    kept: Kept | None = None,
    weights: str = "",
) -> tuple[list[Result], dict[str, Any]] | None:
    """Evaluate a model on lm-eval's tasks. Every rank of the gang calls this; rank 0 returns (results, figures), the others None.

    served: this rank's model (serve.Served). names: `leaderboard_v1`, `leaderboard_v2`, or tasks, groups and tags of lm-eval. paths, num_fewshot,
    hub: lm_tasks.plan. limit: the first documents of each task alone. bos: `one` or `none` before a text; None: as the folder's tokenizer does.
    chat: prompts in the folder's chat template, examples as its turns. seed: of what a task draws. kept: answers of earlier runs (cache.Kept), so
    that one that was interrupted computes only what is missing; rank 0 alone reads and writes it. weights: what the answers are kept by
    beside the request: the model's sums, and its precision.

    results: one a document and task, `lm_eval/<task>`, by id. Its score is the task's metric; of a perplexity it is the mean probability of a
    byte (ours). outcome: right where the score is 1, else wrong. Documents that see themselves among their examples are left out.
    figures: {version (lm-eval's), engine, bos, chat, counts: {num_requests, num_kept, num_cut, num_two_bos}, tasks: {name: {metric, filter,
    num_fewshot, version, score, standard_error, num_questions, num_excluded, num_taken_out, num_altered, metrics: {"metric,filter":
    lm-eval's own}}}, groups: {leaderboard's task: score}, averages: {v1, v2}}, each score between 0 and 1; averages are None where a
    benchmark is missing.
    Raises: on every rank, InputError with all problems before the model is asked anything; BackendMissing without lm-eval.
    """
    lm_tasks.require()
    from megatron_prism.eval.retention.lm import GangLM, InMemory, own_bos

    def work(asking: Asking) -> tuple[list[Result], dict[str, Any]]:
        lm = GangLM(asking, bos or own_bos(served.spec), seed, InMemory() if kept is None else kept, weights)
        return _evaluated(lm, names, paths, limit, num_fewshot, chat, hub)

    return lead(served, work)


def check(
    names: Sequence[str], paths: Mapping[str, Path], num_fewshot: int | None = None, hub: bool = False, where: str = "lm_eval"
) -> tuple[Planned, ...]:
    """Return the tasks that `run` would run. It reads no document and needs no model. Raises: InputError with all problems, at the key `where`."""
    return lm_tasks.plan(names, paths, lm_tasks.manager().task_index, num_fewshot, hub, where)


def _evaluated(
    lm: GangLM, names: Sequence[str], paths: Mapping[str, Path], limit: int | None, num_fewshot: int | None, chat: bool, hub: bool
) -> tuple[list[Result], dict[str, Any]]:
    manager = lm_tasks.manager()
    planned = lm_tasks.plan(names, paths, manager.task_index, num_fewshot, hub)
    from lm_eval.evaluator import evaluate

    with _seeded():
        tasks = {one.task: _built(one, manager) for one in planned}
        taken_out = _without_evaluated(tasks, limit)
        watches = {name: Watch(task) for name, task in tasks.items()}
        log.get().info("lm-eval %s: %d tasks, BOS %s", version("lm-eval"), len(tasks), lm.bos)
        evaluation = evaluate(
            lm, {"tasks": tasks, "groups": {}}, limit=limit, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
        )
    assert evaluation is not None
    results: list[Result] = []
    figures: dict[str, Any] = {}
    for one in planned:
        own, excluded = _results(one, tasks[one.task], evaluation["samples"][one.task], watches[one.task], lm)
        results += own
        metrics = {key: value for key, value in evaluation["results"][one.task].items() if "," in key and isinstance(value, int | float)}
        figures[one.task] = {
            **_of_results(own),
            "metric": one.metric,
            "filter": _filter(one, tasks[one.task]),
            "num_fewshot": one.num_fewshot,
            "version": tasks[one.task].VERSION,
            "num_excluded": excluded,
            "num_taken_out": taken_out[one.task],
            "num_altered": _altered(tasks[one.task], limit),
            "metrics": {key: value for key, value in metrics.items() if key.split(",")[0] not in UNSCORED},
        }
    _say(figures, lm)
    head = {"version": version("lm-eval"), "engine": ENGINE, "bos": lm.bos, "chat": chat, "counts": asdict(lm.counts)}
    return results, {**head, "tasks": figures, **_leaderboards(planned, figures)}


@contextmanager
def _seeded() -> Iterator[None]:
    """Within the block, draw as lm-eval does from its default seeds; after it, as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(RANDOM_SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _built(one: Planned, manager: Any) -> Any:
    """Return lm-eval's task with its documents. What it draws does not depend on the tasks before it."""
    changes = dict(one.changes)
    if one.files:
        import datasets

        changes["custom_dataset"] = lambda **_: {split: datasets.Dataset.from_list(lm_files.read(one.files[split])) for split in one.files}
    random.seed(RANDOM_SEED)
    lm_evals_log = logging.getLogger("lm_eval")
    level = lm_evals_log.level
    lm_evals_log.setLevel(logging.ERROR)  # it warns of defaults in its own configs
    try:
        (task,) = manager.load({"group": "prism", "task": [{"task": one.task, **changes}]})["tasks"].values()
    except InputError:
        raise
    except Exception as error:  # datasets, jinja2, a task's own functions: lm-eval lets everything through
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        fix = "give its files as they were published" if one.files else "download its data first"
        raise InputError(Problem(f"lm_eval task {one.task}", said, "documents that lm-eval's own config of it reads", fix)) from error
    finally:
        lm_evals_log.setLevel(level)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def _without_evaluated(tasks: Mapping[str, Any], limit: int | None) -> dict[str, int]:
    separated = {name: separate(task, limit, f"lm_eval task {name}") for name, task in tasks.items()}
    raise_problems([problem for _, problems in separated.values() for problem in problems])
    return {name: num_out for name, (num_out, _) in separated.items()}


def _filter(one: Planned, task: Any) -> str:
    """Return the filter whose value of the metric is a document's score: the leaderboard's, else the first of lm-eval's config."""
    if one.benchmark is not None:
        return one.benchmark.filter
    filters = task.config.filter_list
    return filters[0]["name"] if filters else "none"


def _results(one: Planned, task: Any, samples: Sequence[Mapping[str, Any]], watch: Watch, lm: GangLM) -> tuple[list[Result], int]:
    """Return a task's results by id, and how many documents are left out because their own question is an example before them."""
    metric, filter_name = one.metric, _filter(one, task)
    own = [sample for sample in samples if sample["filter"] == filter_name]
    if not own or metric not in own[0]:
        made = ", ".join(sorted({f"{key} of {sample['filter']}" for sample in samples[:4] for key in sample["metrics"]}))
        raise InputError(Problem(f"lm_eval task {one.task}", f"no {metric} of the filter {filter_name}", f"one of {made}"))
    clean = [sample for sample in own if as_json(sample["doc"]) not in watch.leaked]
    if not clean:
        raise InputError(Problem(f"lm_eval task {one.task}", "every document among its own few-shot examples", "examples of another split"))
    results = []
    for sample in sorted(clean, key=lambda sample: sample["doc_id"]):
        score = _score(one.task, metric, sample[metric], task.OUTPUT_TYPE)
        ended = lm.ended.get((one.task, sample["doc_id"]))
        results.append(
            Result(
                task=f"{PREFIX}{one.task}",
                id=f"{sample['doc_id']}-{sample['doc_hash'][:12]}",
                sample=0,
                seed=0,
                outcome="right" if score == 1 else "wrong",
                score=score,
                prompt_sha256=sample["prompt_hash"],
                num_tokens=ended.num_tokens if ended else 0,
                ended=ended.ended if ended else "",
                text=_text(sample["resps"]),
                tags={"group": one.group},
            )
        )
    return results, len(own) - len(clean)


def _score(task: str, metric: str, value: Any, output_type: str) -> float:
    """Return a document's metric as a share: of lm-eval's numbers, lists of truths (the share true), and a text's (log-likelihood, weight).

    Raises: InputError where it is none: a score above 1, or a pair of labels, from which lm-eval makes a figure of all documents.
    """
    if isinstance(value, tuple) and output_type == "loglikelihood_rolling":
        logprob, weight = value
        return math.exp(logprob / weight) if weight else 1.0
    if metric == "perplexity":
        return math.exp(value)  # of a log-likelihood
    if isinstance(value, list) and all(isinstance(one, bool | np.bool_) for one in value):
        return sum(value) / len(value) if value else 0.0
    if isinstance(value, int | float | np.number | np.bool_) and 0 <= value <= 1:
        return float(value)
    raise InputError(
        Problem(
            f"lm_eval task {task}",
            f"{metric} {value!r}"[:200] + " of a document",
            "a share, from 0 to 1",
            "leave the task out: no verdict or mean can hold it",
        )
    )


def _text(responses: Sequence[Sequence[Any]]) -> str:
    """Return the first response as text: what was generated, or the log-likelihoods of the choices."""
    first = [of_request[0] for of_request in responses]
    if isinstance(first[0], str):
        return first[0]
    return " ".join(f"{one[0] if isinstance(one, tuple | list) else one:.10g}" for one in first)


def _of_results(results: Sequence[Result]) -> dict[str, Any]:
    """Return the mean score of results, and its standard error (None for one)."""
    scores = [result.score for result in results if result.score is not None]
    mean, size = sum(scores) / len(scores), len(scores)
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / (size - 1) / size) if size > 1 else None
    return {"score": mean, "standard_error": spread, "num_questions": size}


def _altered(task: Any, limit: int | None) -> int:
    """Return how many documents of a GPQA task have a choice that lm-eval's clean-up changed beyond spaces.

    It deletes what stands in square brackets, also in chemistry. The published scores rest on it, so it is counted and not mended.
    """
    num_altered = 0
    for _, doc in task.doc_iterator(limit=limit):
        if "choice1" in doc and "Correct Answer" in doc:
            given = [doc[key] for key in ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))]
            shown = [doc[f"choice{number}"] for number in (1, 2, 3, 4)]
            num_altered += sorted(" ".join((text or "").split()) for text in given) != sorted(" ".join(text.split()) for text in shown)
    return num_altered


def _say(figures: Mapping[str, Mapping[str, Any]], lm: GangLM) -> None:
    """Log what moves a score and is easily missed."""
    for name, of_task in figures.items():
        if of_task["num_excluded"]:
            log.get().warning("lm_eval task %s: %d documents left out, examples of themselves", name, of_task["num_excluded"])
        if of_task["num_altered"]:
            log.get().warning(
                "lm_eval task %s: lm-eval deletes bracketed text from the choices of %d documents", name, of_task["num_altered"]
            )
    if lm.counts.num_cut:
        log.get().warning("lm_eval: %d contexts were cut on their left to fit %d tokens", lm.counts.num_cut, lm.max_length)


def _leaderboards(planned: Sequence[Planned], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the score of each leaderboard's benchmark, and the averages of those that are whole."""
    groups: dict[str, float | None] = {}
    for group, benchmark in {one.benchmark.task: one.benchmark for one in planned if one.benchmark}.items():
        names = [one.task for one in planned if one.benchmark is benchmark]
        scores = {name: _metrics_of(figures[name]) for name in names}
        groups[group] = leaderboards.score(benchmark, scores, {name: figures[name]["num_questions"] for name in names})
    averages = {name: leaderboards.average(groups, table) for name, table in leaderboards.BY_VERSION.items()}
    return {"groups": groups, "averages": averages}


def _metrics_of(of_task: Mapping[str, Any]) -> dict[str, float]:
    """Return a task's metrics under its filter, with the score of our results (without excluded documents) as its metric."""
    by_name = {key.split(",")[0]: value for key, value in of_task["metrics"].items() if key.split(",")[1] == of_task["filter"]}
    return {**by_name, of_task["metric"]: of_task["score"]}
