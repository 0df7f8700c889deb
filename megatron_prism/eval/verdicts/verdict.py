"""The verdict on two evaluations: may the new model follow the old one? Reads two folders of `prism evaluate`; writes verdict.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prism.core import disk, log
from megatron_prism.core.check.policy import check_policy
from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.errors import Problem, ResultFailure, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.core.manifest import write_json
from megatron_prism.eval import averages
from megatron_prism.eval.averages import Tasks
from megatron_prism.eval.verdicts import nel
from megatron_prism.eval.verdicts.change import Change, Spread, bootstrap, change_of, estimate
from megatron_prism.eval.verdicts.paired import Evaluation, named, pair, read_all, told, unlike
from megatron_prism.eval.verdicts.policy import Decision, Judged, Rule, judge, rules_of, whole

FILE, KIND = "verdict.json", "verdict"
MIN_PAIRS = 2  # with fewer a task has no standard error


@dataclass(frozen=True)
class Verdict:
    """A new evaluation against an old one. decision: None where the policy has no rule.

    changes: of each task that was paired. not_paired: why any other was not. told: what else differs.
    """

    old: Evaluation
    new: Evaluation
    policy: PolicyConfig
    decision: Decision | None
    rules: tuple[Judged, ...]
    changes: Mapping[str, Change]
    not_paired: Mapping[str, tuple[str, ...]]
    told: tuple[str, ...]


def compare(new: Path, old: Path, policy: PolicyConfig) -> Verdict:
    """Return the verdict on the evaluation in `new` against that in `old`.

    Raises: InputError where the policy or a folder is wrong, or a rule needs a task that the two do not share or that was asked, sampled or
    graded otherwise: a changed prompt is no changed model.
    """
    raise_problems(check_policy(policy, "policy."))
    if new.resolve() == old.resolve():
        raise_problems([Problem("against", str(old), "another evaluation than the new one")])
    before, now = read_all([old, new])
    why, rules, problems = matched(before, now, policy)
    raise_problems(problems)
    known = [(rule, weights) for rule, weights in rules if weights is not None]
    pairs = {task: pair(task, before, now) for task, reasons in why.items() if not reasons}
    changes = {task: change_of(one) for task, one in pairs.items() if len(one.ids) >= MIN_PAIRS}
    few = {task: (f"{len(one.ids)} pairs without a fault",) for task, one in pairs.items() if task not in changes}
    judged = tuple(judge(known, changes, {task: len(one.ids) for task, one in pairs.items()}, policy))
    not_paired = {**{task: reasons for task, reasons in why.items() if reasons}, **few}
    return Verdict(before, now, policy, whole(judged), judged, changes, not_paired, tuple(told(before, now)))


def matched(
    old: Evaluation, new: Evaluation, policy: PolicyConfig
) -> tuple[dict[str, tuple[str, ...]], list[tuple[Rule, dict[str, float] | None]], list[Problem]]:
    """Return why each task cannot be paired (empty: it can), each rule with its tasks' weights, and why rules cannot be judged."""
    tasks = sorted(old.tasks.keys() | new.tasks.keys())
    why = {task: tuple(unlike(task, old, new, policy.other_prompts == "accept")) for task in tasks}
    shared = _tasks(old, new)
    rules = [(rule, shared.weights(rule.measure)) for rule in rules_of(policy)]
    keys = {rule.measure: f"policy.{'max_drop' if rule.measure in policy.max_drop else 'min_gain'}.{rule.measure}" for rule, _ in rules}
    return why, rules, [problem for rule, weights in rules for problem in _unfit(keys[rule.measure], weights, tasks, why)]


def _tasks(old: Evaluation, new: Evaluation) -> Tasks:
    sets: dict[str, set[str]] = {}
    groups: dict[str, set[str]] = {}
    for one in (old, new):
        for task in one.tasks:
            if name := (one.summary["tasks"].get(task, {}).get("set") or {}).get("name"):
                sets.setdefault(name, set()).add(task)
        for task, group in one.groups.items():
            groups.setdefault(group, set()).add(task)
    frozen = [{name: frozenset(names) for name, names in by_name.items()} for by_name in (sets, groups)]
    num_questions = {task: len({id for id, _ in keys}) for one in (old, new) for task, keys in one.tasks.items()}
    return Tasks(num_questions, *frozen)


def _unfit(where: str, weights: Mapping[str, float] | None, tasks: Sequence[str], why: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    """Yield why a rule cannot be judged on these evaluations."""
    if weights is None:
        yield Problem(where, "no task of the two evaluations, and no average", f"one of {', '.join([*tasks, *averages.NAMES])}")
    for task in weights or ():
        for reason in why.get(task, ("neither evaluation has responses to it",)):
            yield Problem(where, f"{task}: {reason}", "the same questions, asked, sampled and graded alike", "evaluate both alike")


def require(verdict: Verdict) -> None:
    """Let a job end as the verdict asks: warn of INCONCLUSIVE. Raises: ResultFailure on NO-GO, and on INCONCLUSIVE where the policy says fail."""
    text = "; ".join(f"{one.decision}: {one.why}" for one in verdict.rules if one.decision == verdict.decision)
    if verdict.decision == "NO-GO" or (verdict.decision == "INCONCLUSIVE" and verdict.policy.on_inconclusive == "fail"):
        raise ResultFailure(f"{verdict.new.folder} against {verdict.old.folder}: {text}")
    if verdict.decision == "INCONCLUSIVE":
        log.get().warning("%s", text)


def unfit(folder: Path) -> list[Problem]:
    """Return why a verdict cannot be written to a folder: it would replace what another tool wrote."""
    others = nel.others(folder)
    found, required = f"{', '.join(others[:3])} in {folder / nel.FOLDER}", "a new folder, or an earlier verdict's"
    return [Problem("--out", found, required, "choose another --out")] if others else []


def write(folder: Path, verdict: Verdict) -> None:
    """Write verdict.json, and the pairs in the form that `nel gate` reads. Raises: EnvironmentFault where the disk does not take them."""
    with disk.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, as_values(verdict))
        nel.write(folder, verdict.changes, verdict.policy)


def as_values(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain values for JSON. Scores and changes are shares."""
    return {
        "kind": KIND,
        "decision": verdict.decision,
        "new": {"folder": str(verdict.new.folder), "model": verdict.new.summary.get("model")},
        "old": {"folder": str(verdict.old.folder), "model": verdict.old.summary.get("model")},
        "rules": [{**asdict(one), "bootstrap": _bootstrap(one, verdict)} for one in verdict.rules],
        "tasks": {task: _task(change, verdict.policy) for task, change in verdict.changes.items()},
        "not_paired": {task: list(reasons) for task, reasons in verdict.not_paired.items()},
        "told": list(verdict.told),
        "policy": to_dict(verdict.policy),
    }


def _bootstrap(judged: Judged, verdict: Verdict) -> list[float] | None:
    """Return a rule's bounds by questions drawn anew: a check on `low` and `high`, which decide."""
    if judged.change is None:
        return None
    parts = [(weight, verdict.changes[task]) for task, weight in judged.tasks.items()]
    return list(bootstrap(parts, verdict.policy.alpha, verdict.policy.seed))


def _task(change: Change, policy: PolicyConfig) -> dict[str, Any]:
    pairs, single = change.pairs, estimate([(1.0, change)], policy.seed, policy.test)
    low, high = single.bounds(policy.alpha)
    return {
        "old_score": change.old_score,
        "new_score": change.new_score,
        "change": change.change,
        "low": low,
        "high": high,
        "standard_error": change.difference.standard_error,
        "p_no_change": single.by_lot.both,
        "p_fall": single.by_lot.low,
        "is_exact": single.by_lot.is_exact,
        "num_pairs": change.num_pairs,
        "num_responses": len(pairs.keys),
        "num_lost": len(change.flips.lost),
        "num_gained": len(change.flips.gained),
        "p_mcnemar": min(1.0, 2 * min(change.flips.p_fall, change.flips.p_rise)),
        "spread": {name: asdict(spread) for name, spread in _spreads(change).items()},
        "lost": list(change.flips.lost),
        "gained": list(change.flips.gained),
        "num_masked": pairs.num_masked,
        "num_unpaired_samples": pairs.num_unpaired,
        "only_old": list(pairs.only_old),
        "only_new": list(pairs.only_new),
    }


def _spreads(change: Change) -> dict[str, Spread]:
    return {"old": change.old, "new": change.new, "difference": change.difference}


def lines(verdict: Verdict) -> Iterator[str]:
    """Yield a verdict as lines for a terminal; scores in points of a hundred."""
    yield f"verdict: {verdict.decision or 'none, the policy has no rule'}"
    for one in verdict.rules:
        yield f"  {one.decision}: {one.why}"
        if one.change is not None and one.low is not None and one.high is not None:
            yield (
                f"    change {_points(one.change)}, between {_points(one.low)} and {_points(one.high)}; {one.num_pairs} pairs; "
                f"p of NO-GO {one.p_no_go_adjusted:.2g}, of GO {one.p_go:.2g}"
            )
    for task, change in verdict.changes.items():
        yield from _task_lines(task, change)
    for task, reasons in verdict.not_paired.items():
        yield from (f"  not paired: {task}: {reason}" for reason in reasons)
    yield from (f"  told: {each}" for each in verdict.told)


def _task_lines(task: str, change: Change) -> Iterator[str]:
    pairs, spread = change.pairs, change.difference
    p_value = min(1.0, 2 * min(change.flips.p_fall, change.flips.p_rise))
    yield (
        f"  {task}: {100 * change.old_score:.2f} -> {100 * change.new_score:.2f}, {_points(change.change)} "
        f"(standard error {100 * spread.standard_error:.2f}); {change.num_pairs} pairs, {len(change.flips.lost)} lost, "
        f"{len(change.flips.gained)} gained (McNemar {p_value:.2g})"
    )
    if spread.standard_error_same_questions:
        halved = spread.samples_to_halve
        yield (
            f"    of the standard error the samples make {100 * spread.standard_error_same_questions:.2f}; "
            + (f"{halved} samples a question would halve it" if halved else "only more questions would halve it")
        )
    if pairs.num_masked or pairs.num_unpaired:
        yield f"    left out: {pairs.num_masked} pairs with a fault, {pairs.num_unpaired} samples that only one has"
    for words, ids in (("old", pairs.only_old), ("new", pairs.only_new)):
        if ids:
            yield f"    left out: {len(ids)} questions that only the {words} evaluation has ({named(ids)})"


def _points(change: float) -> str:
    return f"{100 * change:+.2f}"
