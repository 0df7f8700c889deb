"""`prism evaluate compare`: the verdict on two evaluations that are there. Nothing is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.errors import raise_problems
from megatron_prism.eval.verdicts import verdict
from megatron_prism.eval.verdicts.verdict import Verdict


def run(new: Path, old: Path, policy: PolicyConfig, out: Path | None) -> tuple[Verdict, dict[str, Any]]:
    """Return the verdict, and the same as plain values. out: a folder for verdict.json and nel's form of the pairs, or None.

    Raises: InputError where a folder or the policy is wrong, or a rule cannot be judged on the two.
    """
    if out is not None:
        raise_problems(verdict.unfit(out))
    made = verdict.compare(new, old, policy)
    if out is not None:
        verdict.write(out, made)
    return made, verdict.as_values(made)
