"""`prism rl mix CONFIG`: prompt sets and their pass counts become the prompt set that RL trains on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

from megatron_prism.checkpoint import start
from megatron_prism.core import log, manifest
from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config import MixConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data.prompts import Prompt
from megatron_prism.jobs import prompts as job
from megatron_prism.rl import mix, passes
from megatron_prism.rl.passes import PassCount


def run(config: MixConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Write the prompt set of a mix and return its counts. A dry run reads all and writes nothing.

    Raises: InputError for a wrong config, or pass counts that are not of their prompt set.
    """
    raise_problems([*check_bounds(config), *mix.check(config)])
    prompts, counts, inputs = _read(config)
    if not dry_run and config.out.is_dir() and any(config.out.iterdir()):
        described = dict(job.existing(config, inputs))
        return _shown(config, described)
    once = {prompt.id: prompt for prompt in reversed(prompts)}  # of equal prompts the first
    distinct = [prompt for prompt in prompts if once[prompt.id] is prompt]
    selections = mix.select(distinct, counts, config)
    kept = {id for selection in selections.values() for id in selection.kept}
    if not kept:
        raise InputError(
            Problem("domains", "no prompt with that many right answers", "at least one", "see the histogram of prism rl filter")
        )
    for domain, selection in selections.items():
        target = config.domains.rules[domain].target  # type: ignore[index]  # the rules' own names
        if target is not None and len(selection.kept) < target:
            log.get().warning("%s: %d prompts, and the target is %d", domain, len(selection.kept), target)
    described = manifest.describe(
        prompt_set.KIND,
        inputs,
        prompts=len(kept),
        domains=dict(Counter(prompt.domain for prompt in distinct if prompt.id in kept)),
        selection=[_facts(domain, selection) for domain, selection in selections.items()],
        repeated=len(prompts) - len(distinct),
        config=to_dict(config),
        config_sha256=job.config_sha256(config),
    )
    if not dry_run:
        job.write(config.out, [prompt_set.to_line(prompt) for prompt in distinct if prompt.id in kept], described)
    return _shown(config, described)


def _read(config: MixConfig) -> tuple[list[Prompt], dict[str, PassCount], dict[str, str]]:
    """Return the prompts of all sets, their pass counts, and the sums of the files they come from.

    Raises: InputError with the problems of all sets; where counts are of another set than the one beside them too.
    """
    prompts: list[Prompt] = []
    counts: dict[str, PassCount] = {}
    inputs: dict[str, str] = {}
    problems: list[Problem] = []
    for index, one in enumerate(config.sets):
        of_set, set_problems = start.attempt(partial(prompt_set.read, one.prompts), f"sets.{index}.prompts")
        file, is_file = (one.passes, True) if one.passes.is_file() else (one.passes / passes.FILE, False)
        described, problem = start.attempt(lambda: {} if is_file else passes.manifest_of(one.passes), f"sets.{index}.passes")  # noqa: B023
        problems += [*set_problems, *problem]
        if of_set is None or described is None:
            continue
        inputs |= manifest.sha256_files([one.prompts / prompt_set.FILE, file])
        if described and described["prompts"]["sha256"] != inputs[str(one.prompts / prompt_set.FILE)]:
            found, required = f"{one.passes}, counts of {described['prompts']['path']}", f"counts of {one.prompts} as it is"
            problems.append(Problem(f"sets.{index}.passes", found, required, "filter that set; it may have changed since"))
            continue
        of_passes, problem = start.attempt(partial(passes.read, file), f"sets.{index}.passes")
        problems += problem
        prompts += of_set
        counts = {**(of_passes or {}), **counts}  # of equal prompts the first
    raise_problems(problems)
    return prompts, counts, inputs


def _facts(domain: str, selection: mix.Selection) -> dict[str, Any]:
    facts = {name: value for name, value in dataclasses.asdict(selection).items() if name != "kept"}
    return {"domain": domain, "num_kept": len(selection.kept), **facts}


def _shown(config: MixConfig, described: dict[str, Any]) -> dict[str, Any]:
    """Return what the command line shows of a manifest."""
    return {"out": str(config.out), **{key: described[key] for key in ("kind", "prompts", "domains", "selection", "repeated")}}
