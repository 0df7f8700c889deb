"""Tasks that ask the model themselves, and not for responses that we sample: lm-eval's, and the held-out loss of a prepared mixture.

What one came to is kept whole by the weights and its config, so that it is measured once. lm-eval's answers are kept as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.check.evaluate import LEADERBOARD, set_of
from megatron_prism.core.config import LmEvalConfig, TaskConfig
from megatron_prism.core.errors import Problem
from megatron_prism.core.load import to_dict
from megatron_prism.core.manifest import sha256_file, sha256_json
from megatron_prism.data import chat, loader
from megatron_prism.data.mixture import Prepared, read_prepared
from megatron_prism.eval import held_out
from megatron_prism.eval.cache import Kept
from megatron_prism.eval.model import Evaluated
from megatron_prism.eval.reader import Reader
from megatron_prism.eval.retention.serve import Row, Score, Served
from megatron_prism.generate.engine import Rollout, Sampling
from megatron_prism.parallel.groups import Groups


@dataclass(frozen=True)
class Measured:
    """A task that is measured. prepared: the mixture of a held-out loss; None: it is lm-eval's. sums: of its files.

    groups: of each of lm-eval's tasks that it runs, the benchmark that it is a part of, or itself.
    """

    name: str
    config: TaskConfig
    prepared: Prepared | None
    sums: Mapping[str, str]
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def lm_eval(self) -> LmEvalConfig:
        """Return which of lm-eval's tasks it is."""
        return self.config.lm_eval or LmEvalConfig()

    @property
    def names(self) -> tuple[str, ...]:
        """Return lm-eval's names of it."""
        own = set_of(self.name, self.config)
        return self.lm_eval.names or ((own,) if own.startswith(LEADERBOARD) else ())

    def key(self, reader: Reader, weights: str) -> str:
        """Return what its figures are kept under. weights: the model's sum, which of a Hugging Face folder is without its tokenizer's files."""
        config = reader.config
        how = {"weights": weights, "precision": config.precision, "seed": config.seed, "bos": config.bos, "sums": dict(self.sums)}
        how |= {"tokenizer": reader.spec.sha256, "bos_id": reader.spec.bos_id, "end_ids": reader.spec.end_ids}
        if self.prepared is not None:
            assert self.config.held_out is not None
            own = to_dict(self.config.held_out) | {"mixture": self.prepared.sha256, "micro_size": None}
            return sha256_json(how | {"held_out": own})
        from importlib.metadata import version

        asked = {name: value for name, value in to_dict(self.lm_eval).items() if name != "files"} | {"names": self.names}
        template = chat.load(reader.evaluated.assets).sha256 if self.config.chat else None
        return sha256_json(how | {"lm_eval": asked, "version": version("lm_eval"), "limit": self.config.limit, "template": template})


def read(name: str, config: TaskConfig) -> Measured:
    """Return a task that is measured. Raises: InputError where its mixture is none, or lm-eval lacks a task or its file.

    lm-eval runs on rank 0, which alone reads the files and the 14,683 configs.
    """
    if config.held_out is not None:
        return Measured(name, config, read_prepared(config.held_out.mixture), {})
    if not log.is_first():
        return Measured(name, config, None, {})
    from megatron_prism.eval.retention import harness

    wanted = config.lm_eval or LmEvalConfig()
    made = Measured(name, config, None, {of: _sum(path) for of, path in wanted.files.items() if path.exists()})
    planned = harness.check(made.names, wanted.files, wanted.num_fewshot, wanted.hub, f"tasks.{name}.lm_eval")
    return replace(made, groups={one.task: one.group for one in planned})


def check_names(measured: Iterable[Measured]) -> Iterator[Problem]:
    """Yield a problem for each of lm-eval's tasks that two of ours ask for: nobody could tell their results apart."""
    first: dict[str, str] = {}
    for one in measured:
        if twice := [task for task in one.groups if first.setdefault(task, one.name) != one.name]:
            more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
            found = f"lm-eval's {twice[0]}{more}, which tasks.{first[twice[0]]} asks for too"
            yield Problem(
                f"tasks.{one.name}.lm_eval.names", found, "each of lm-eval's tasks once", "leave one out, or evaluate into another out"
            )


def _sum(path: Path) -> str:
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return sha256_json([[str(one.relative_to(path)), sha256_file(one)] for one in files])


def figures(one: Measured) -> dict[str, Any]:
    """Return what a dry run shows of a task that is measured. sequences: of each source that holds anything out, at most."""
    if one.prepared is None:
        return {"set": set_of(one.name, one.config), "lm_eval_tasks": len(one.groups), "limit": one.config.limit}
    wanted = one.config.held_out
    assert wanted is not None
    sources = [source.name for source in one.prepared.sources if source.valid is not None]
    shown = {"mixture": str(wanted.mixture), "sources": sources, "sequences": wanted.sequences, "seq_length": wanted.seq_length}
    return {"set": "held_out", **shown}


def check(one: Measured, evaluated: Evaluated) -> list[Problem]:
    """Return why a model's loss on a mixture would mean nothing, or cannot be computed."""
    if one.prepared is None:
        return []
    wanted, where = one.config.held_out, f"tasks.{one.name}.held_out"
    assert wanted is not None
    problems = loader.check_held_out(one.prepared, wanted.seq_length)
    if all(source.valid is None for source in one.prepared.sources):
        problems.append(Problem(f"{where}.mixture", "no source that holds anything out", "valid_percent or valid_path of a source"))
    if one.prepared.tokenizer_sha256 != evaluated.tokenizer_sha256():
        problems.append(
            Problem(f"{where}.mixture", "data of another tokenizer", f"that of {evaluated.assets}", "prepare it with the model's")
        )
    if wanted.seq_length > (context := evaluated.model.max_position_embeddings):
        problems.append(Problem(f"{where}.seq_length", str(wanted.seq_length), f"at most the context of {context}"))
    return problems


@dataclass(frozen=True)
class Watched(Served):
    """A model that says what it does before each call, and where a signal is heeded. before: every rank calls it."""

    before: Callable[[], None] = lambda: None

    def scores(self, rows: Sequence[Row]) -> dict[int, Score]:
        """Return the scores of rows."""
        self.before()
        return super().scores(rows)

    def rollouts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return a rollout of each prompt."""
        self.before()
        return super().rollouts(prompts, sampling, seeds)


def measure(
    one: Measured,
    reader: Reader,
    weights: str,
    chunks: Sequence[Any],
    groups: Groups,
    answers: Kept | None,
    before: Callable[[], None],
) -> dict[str, Any] | None:
    """Return what a task comes to, {part of the summary, results}; every rank of the gang calls this, and rank 0's counts.

    weights: the model's sum. answers: rank 0's, of lm-eval. before: called before each call of the model.
    """
    before()
    if one.prepared is not None:
        return {"part": _held_out(one, one.prepared, reader, chunks, groups), "results": []}
    from megatron_prism.eval.retention import harness

    config = reader.config
    served = Watched(
        chunks,
        reader.evaluated.model,
        groups,
        reader.spec,
        num_rows=config.num_rows,
        cache_tokens=config.cache_tokens,
        before=before,
    )
    made = harness.run(
        served,
        one.names,
        one.lm_eval.files,
        limit=one.config.limit,
        num_fewshot=one.lm_eval.num_fewshot,
        bos=None if config.bos == "tokenizer" else config.bos,
        chat=one.config.chat,
        hub=one.lm_eval.hub,
        seed=config.seed,
        kept=answers,
        weights=f"{weights} {config.precision}",
    )
    if made is None:
        return None
    results, figures = made
    return {"part": _lm_eval(one, figures), "results": [asdict(result) for result in results]}


def _held_out(one: Measured, prepared: Prepared, reader: Reader, chunks: Sequence[Any], groups: Groups) -> dict[str, Any]:
    """Return the part of a held-out loss. score: None, as a loss is no share."""
    wanted, seed = one.config.held_out, reader.config.seed
    assert wanted is not None
    by_source = held_out.losses(
        chunks,
        prepared,
        groups,
        num_sequences=wanted.sequences,
        seq_length=wanted.seq_length,
        micro_size=wanted.micro_size,
        seed=seed,
        document_mask=wanted.document_mask,
    )
    return {
        "score": None,
        "losses": {name: asdict(loss) for name, loss in by_source.items()},
        "protocol": {
            "seq_length": wanted.seq_length,
            "sequences": wanted.sequences,
            "document_mask": wanted.document_mask,
            "seed": seed,
            "source": "ours",
        },
        "set": {"name": "held_out", "path": str(wanted.mixture), "sha256": prepared.sha256},
    }


def _lm_eval(one: Measured, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of lm-eval's tasks. score: a leaderboard's average, else the mean of the tasks' scores."""
    name, tasks = set_of(one.name, one.config), figures["tasks"]
    average = figures["averages"].get(name.removeprefix(LEADERBOARD))
    scores = [part["score"] for part in tasks.values() if part["score"] is not None]
    return {
        "score": average if name.startswith(LEADERBOARD) else fmean(scores) if scores else None,
        "num_questions": sum(part["num_questions"] for part in tasks.values()),
        "protocol": {
            "names": list(one.names),
            "limit": one.config.limit,
            "chat": figures["chat"],
            "source": f"lm-eval {figures['version']}",
        },
        "set": {"name": name, "files": {of: str(path) for of, path in one.lm_eval.files.items()}, "sums": dict(one.sums)},
        "bos": figures["bos"],
        "lm_eval": {**figures, "counts": {key: count for key, count in figures["counts"].items() if key != "num_kept"}},  # not of the model
    }
