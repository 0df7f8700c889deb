"""Which prompts a mix keeps, by how often a model answered them right: a pure function of the pass counts, the mix and its seed.

The running of the samples is not here: the counts come as a file, lines {id, num_right, num_samples}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_prism.core.config import MixConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import build
from megatron_prism.data.prompts import Prompt


@dataclass(frozen=True)
class PassCount:
    """How often a model answered a prompt right."""

    id: str
    num_right: int
    num_samples: int


def read_counts(path: Path) -> dict[str, PassCount]:
    """Return the pass counts of a file, by id. Raises: InputError for a line that is none, or an id that comes twice."""
    counts: dict[str, PassCount] = {}
    problems: list[Problem] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{number}"
        try:
            count = build(json.loads(line), PassCount, lambda key, where=where: f"{where}:{'.'.join(map(str, key))}")  # type: ignore[misc]
        except InputError as error:
            problems += error.problems
            continue
        except ValueError as error:
            problems.append(Problem(where, str(error), "{id, num_right, num_samples} as JSON"))
            continue
        if not 0 <= count.num_right <= count.num_samples:
            problems.append(Problem(where, f"{count.num_right} of {count.num_samples} right", "0 to num_samples"))
        if count.id in counts:
            problems.append(Problem(where, f"id {count.id} again", "each prompt once"))
        counts[count.id] = count
    raise_problems(problems)
    return counts


def select(prompts: Iterable[Prompt], counts: Mapping[str, PassCount], mix: MixConfig) -> list[str]:
    """Return the ids that a mix keeps, domain by domain in the mix's order, and within a domain in the prompts' order.

    A domain keeps the prompts with least_right to most_right right answers, at most `target` of them by lot. Where there are fewer and
    `top_up` is set, prompts without a right answer are added by lot.
    Raises: InputError where prompts have no pass count, or counts of another number of samples.
    Source: PRISM, section 9.1 and Appendix 15.
    """
    by_domain: dict[str, list[str]] = {domain: [] for domain in mix.domains}
    for prompt in prompts:
        if prompt.domain in by_domain:
            by_domain[prompt.domain].append(prompt.id)
    ids = [id for of_domain in by_domain.values() for id in of_domain]
    if unknown := [id for id in ids if id not in counts]:
        raise InputError(Problem("pass counts", f"none for {len(unknown)} prompts, {unknown[0]} the first", "one for each prompt"))
    if other := [id for id in ids if counts[id].num_samples != mix.num_samples]:
        found = f"{counts[other[0]].num_samples} samples of {other[0]}, and {len(other) - 1} prompts more"
        raise InputError(Problem("pass counts", found, f"num_samples {mix.num_samples} for each prompt"))
    kept: list[str] = []
    for domain, rule in mix.domains.items():
        able = [id for id in by_domain[domain] if rule.least_right <= counts[id].num_right <= (rule.most_right or mix.num_samples)]
        chosen = set(_by_lot(able, rule.target, mix.seed))
        if rule.top_up and rule.target is not None and len(chosen) < rule.target:
            failed = [id for id in by_domain[domain] if counts[id].num_right == 0 and id not in chosen]
            chosen |= set(_by_lot(failed, rule.target - len(chosen), mix.seed))
        kept += [id for id in by_domain[domain] if id in chosen]
    return kept


def _by_lot(ids: list[str], count: int | None, seed: int) -> list[str]:
    """Return `count` of the ids (None: all). A prompt's lot depends on the seed and its id alone."""
    return sorted(ids, key=lambda id: hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=16).digest())[:count]
