"""`prism rl samples RUN`: the responses that a step of an RL run kept (rollout.keep), as a page for a browser."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import run_folder
from megatron_prism.core import disk, log
from megatron_prism.core.config import AlgorithmConfig, RLConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.load import load
from megatron_prism.core.manifest import write_text
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data.prompts import Prompt
from megatron_prism.report import rollouts_page
from megatron_prism.report.rollouts_page import Group, Response
from megatron_prism.rl import advantages, rewards
from megatron_prism.rl.rollout import FOLDER

Line = dict[str, Any]


def run(run_dir: Path, step: int | None) -> dict[str, Any]:
    """Write the page of a step (None: the newest kept one) beside its responses, and return where it is.

    Raises: InputError where the run has kept no such step.
    """
    pages = sorted((run_dir / FOLDER).glob("step_*.jsonl"))
    path = run_dir / FOLDER / f"step_{step:08d}.jsonl" if step is not None else pages[-1] if pages else None
    if path is None or not path.is_file():
        found = f"{len(pages)} steps, {pages[0].stem} to {pages[-1].stem}" if pages else "no responses"
        raise InputError(Problem(str(run_dir / FOLDER), found, "the responses of that step", "rollout.keep: true writes them"))
    config = load(run_dir / run_folder.CONFIG, RLConfig)
    lines = _read(path)
    groups = [list(group) for _, group in itertools.groupby(lines, key=_key())]
    prompts = _prompts(config, run_dir)
    shown = [
        _group(group, prompts.get(group[0]["id"]), values)
        for group, values in zip(groups, _advantages(groups, config.algorithm), strict=True)
    ]
    page = path.with_suffix(".html")
    with disk.writing(page):
        write_text(page, rollouts_page.page(f"{run_dir.name}, step {int(path.stem.removeprefix('step_'))}", shown))
    return {"page": str(page), "groups": len(groups), "responses": len(lines)}


def _read(path: Path) -> list[Line]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            lines += [json.loads(text)] if text else []
        except ValueError as error:
            raise InputError(Problem(f"{path}:{number}", str(error), "a response as JSON")) from None
    return lines


def _key() -> Any:
    """Return what tells a group from the next one: a prompt drawn twice in a step begins with sample 0 again."""
    number = -1

    def of(line: Line) -> tuple[int, str]:
        nonlocal number
        number += line["sample"] == 0
        return number, line["id"]

    return of


def _prompts(config: RLConfig, run_dir: Path) -> dict[str, Prompt]:
    try:
        return {prompt.id: prompt for prompt in prompt_set.read(config.prompts)}
    except InputError as error:
        log.get().warning("the page of %s has no prompts: %s", run_dir, error)
        return {}


def _advantages(groups: list[list[Line]], config: AlgorithmConfig) -> list[list[float | None]]:
    """Return the advantages that the step trained on, of the same rewards. None: the response was not trained on."""
    scored = [
        advantages.Group(
            torch.tensor([line["reward"] for line in group], dtype=torch.float64),
            torch.tensor([rewards.is_counted(line["outcome"], line["ended"], config) for line in group]),
            torch.tensor([line["outcome"] == "right" for line in group]),
        )
        for group in groups
    ]
    kept = [advantages.is_kept(group, config) for group in scored]
    values = iter(advantages.advantages([group for group, is_kept in zip(scored, kept, strict=True) if is_kept], config))
    return [
        [float(value) if is_counted else None for value, is_counted in zip(next(values), group.is_counted_G, strict=True)]
        if is_kept
        else [None] * len(group.rewards_G)
        for group, is_kept in zip(scored, kept, strict=True)
    ]


def _group(lines: list[Line], prompt: Prompt | None, values: list[float | None]) -> Group:
    responses = [
        Response(
            line["sample"],
            line["text"],
            line["outcome"],
            line["why"],
            line["reward"],
            line["ended"],
            len(line["token_ids"]),
            value,
        )
        for line, value in zip(lines, values, strict=True)
    ]
    return Group(lines[0]["id"], lines[0]["domain"], _text(prompt), prompt.gold if prompt else "", responses)


def _text(prompt: Prompt | None) -> str:
    if prompt is None:
        return ""
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt.prompt)
