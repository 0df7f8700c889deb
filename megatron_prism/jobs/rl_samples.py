"""`prism rl samples RUN`: the responses that a step of an RL run kept (rollout.keep), as a page for a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import run_folder
from megatron_prism.core import disk, log
from megatron_prism.core.config import AlgorithmConfig, RLConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.load import load
from megatron_prism.core.manifest import write_text
from megatron_prism.data import prompts, tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.report import rollouts_page
from megatron_prism.report.rollouts_page import Group, Response
from megatron_prism.rl import advantages, rollout
from megatron_prism.rl.rollout import FOLDER


def run(run_dir: Path, step: int | None) -> dict[str, Any]:
    """Write the page of a step (None: the newest kept one) beside its responses, and return where it is.

    Raises: InputError where the run has kept no such step, or its file is damaged.
    """
    if not run_dir.is_dir():
        raise InputError(Problem(str(run_dir), "no such folder", "the folder of a `prism rl` run"))
    pages = sorted((run_dir / FOLDER).glob("step_*.jsonl"))
    path = run_dir / FOLDER / f"step_{step:08d}.jsonl" if step is not None else pages[-1] if pages else None
    if path is None or not path.is_file():
        found = f"{len(pages)} steps, {pages[0].stem} to {pages[-1].stem}" if pages else "no responses"
        raise InputError(Problem(str(run_dir / FOLDER), found, "the responses of that step", "rollout.keep: true writes them"))
    config = load(run_dir / run_folder.CONFIG, RLConfig)
    groups = _read(path)
    spec, golds = tokenizer.load(run_folder.origin(run_dir).assets), _golds(config, run_dir)
    values = _advantages(groups, config.algorithm)
    shown = [_group(group, spec, golds, of_group) for group, of_group in zip(groups, values, strict=True)]
    page = path.with_suffix(".html")
    with disk.writing(page):
        write_text(page, rollouts_page.page(f"{run_dir.name}, step {int(path.stem.removeprefix('step_'))}", shown))
    return {"page": str(page), "groups": len(groups), "responses": sum(map(len, groups))}


def _read(path: Path) -> list[list[rollout.Response]]:
    """Return a step's groups. Raises: InputError where the file does not hold whole ones."""
    try:
        with disk.reading(path):
            groups = rollout.from_lines(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(str(path), str(error), "the responses of a step")) from None
    if not groups:
        raise InputError(Problem(str(path), "no line", "the responses of a step"))
    if len(groups[-1]) < len(groups[0]):
        found = f"{len(groups[-1])} responses to the last prompt, and {len(groups[0])} to the first"
        raise InputError(Problem(f"{path}:{sum(map(len, groups))}", found, "whole groups: lines are missing at its end"))
    return groups


def _golds(config: RLConfig, run_dir: Path) -> dict[str, str]:
    """Return the right answers of the run's prompts, by id, where its prompt set is still there."""
    try:
        return {prompt.id: prompt.gold for prompt in prompts.read(config.prompts)}
    except InputError as error:
        log.get().warning("the page of %s has no right answers: %s", run_dir, error)
        return {}


def _advantages(groups: Sequence[rollout.Group], config: AlgorithmConfig) -> list[list[float | None]]:
    """Return the advantages that the step trained on, from the same rewards. None: the response was not trained on."""
    scored = [advantages.group_of(rollout.samples([group]), config) for group in groups]
    kept = [advantages.is_kept(group, config) for group in scored]
    values = iter(advantages.advantages([group for group, is_kept in zip(scored, kept, strict=True) if is_kept], config))
    return [
        [float(value) if is_counted else None for value, is_counted in zip(next(values), group.is_counted_G, strict=True)]
        if is_kept
        else [None] * len(group.rewards_G)
        for group, is_kept in zip(scored, kept, strict=True)
    ]


def _group(group: rollout.Group, spec: TokenizerSpec, golds: Mapping[str, str], values: Sequence[float | None]) -> Group:
    first = group[0].sample
    responses = [
        Response(
            sample=one.sample.sample,
            text=one.text,
            outcome=one.sample.outcome,
            why=one.why,
            reward=one.sample.reward,
            ended=one.sample.ended,
            num_tokens=len(one.sample.token_ids),
            advantage=value,
        )
        for one, value in zip(group, values, strict=True)
    ]
    prompt = tokenizer.decode(first.prompt_tokens, spec)
    return Group(first.prompt_id, first.domain, prompt, golds.get(first.prompt_id, ""), responses)
