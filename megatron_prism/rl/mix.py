"""Which prompts a mix keeps, by how often a model answered them right: a pure function of the pass counts, the mix and its seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_prism.core.config import MixConfig, MixRuleConfig
from megatron_prism.core.errors import Problem, raise_problems
from megatron_prism.data.prompts import Prompt
from megatron_prism.rl.passes import PassCount


def check(mix: MixConfig) -> list[Problem]:
    """Return the problems between a mix's keys."""
    problems = []
    if not mix.sets:
        problems.append(Problem("sets", "an empty list", "at least one prompt set"))
    if not mix.domains.rules:
        problems.append(Problem("domains", "no rule", "the rule of at least one domain"))
    for domain, rule in mix.domains.rules.items():
        most = _most_right(rule, mix)
        if not rule.least_right <= most <= mix.num_samples:
            found = f"{rule.least_right} to {most} right answers"
            problems.append(Problem(f"domains.{domain}", found, f"least_right to most_right within 0 to num_samples {mix.num_samples}"))
        if rule.top_up and rule.target is None:
            problems.append(Problem(f"domains.{domain}.top_up", "true without a target", "the number to be topped up to", "set target"))
    return problems


@dataclass(frozen=True)
class Selection:
    """What a domain's rule made of its prompts. num_prompts: all. num_faults: left out, since some response has no verdict.

    num_able: with least_right to most_right right answers. kept: ids in the prompts' order, num_topped_up of them without a right answer.
    """

    num_prompts: int
    num_faults: int
    num_able: int
    num_topped_up: int
    kept: tuple[str, ...]


def select(prompts: Sequence[Prompt], counts: Mapping[str, PassCount], mix: MixConfig) -> dict[str, Selection]:
    """Return what a mix keeps of each domain that it has a rule of.

    A domain keeps the prompts with least_right to most_right right answers, at most `target` of them by lot. Where there are fewer and
    `top_up` is set, prompts without a right answer are added by lot. A prompt with a fault of the grader is left out: how often it is answered
    right is not known.
    Raises: InputError where prompts have no pass count, or counts of another number of samples.
    Source: PRISM, section 9.1 and Appendix 15.
    """
    by_domain = {domain: [prompt.id for prompt in prompts if prompt.domain == domain] for domain in mix.domains.rules}
    _check_counts([id for ids in by_domain.values() for id in ids], counts, mix.num_samples)
    selections = {}
    for domain, rule in mix.domains.rules.items():
        judged = [id for id in by_domain[domain] if not counts[id].num_faults]
        able = [id for id in judged if rule.least_right <= counts[id].num_right <= _most_right(rule, mix)]
        chosen = set(_by_lot(able, rule.target, mix.seed))
        topped_up: list[str] = []
        if rule.top_up and rule.target is not None and len(chosen) < rule.target:
            failed = [id for id in judged if counts[id].num_right == 0 and id not in chosen]
            topped_up = _by_lot(failed, rule.target - len(chosen), mix.seed)
        kept = tuple(id for id in by_domain[domain] if id in chosen.union(topped_up))
        num_prompts = len(by_domain[domain])
        selections[str(domain)] = Selection(num_prompts, num_prompts - len(judged), len(able), len(topped_up), kept)
    return selections


def _most_right(rule: MixRuleConfig, mix: MixConfig) -> int:
    return mix.num_samples if rule.most_right is None else rule.most_right


def _check_counts(ids: Sequence[str], counts: Mapping[str, PassCount], num_samples: int) -> None:
    problems = []
    if unknown := [id for id in ids if id not in counts]:
        problems.append(Problem("pass counts", f"none for {len(unknown)} prompts, {unknown[0]} the first", "one for each prompt"))
    if other := [id for id in ids if id in counts and counts[id].num_samples != num_samples]:
        found = f"{counts[other[0]].num_samples} samples of {other[0]}, and {len(other) - 1} prompts more"
        problems.append(Problem("pass counts", found, f"num_samples {num_samples} for each prompt"))
    raise_problems(problems)


def _by_lot(ids: Sequence[str], count: int | None, seed: int) -> list[str]:
    """Return `count` of the ids (None: all). A prompt's lot depends on the seed and its id alone."""
    return sorted(ids, key=lambda id: hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=16).digest())[:count]
