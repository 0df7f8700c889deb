"""How far an evaluation may fall behind another one: the rules of a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_prism.core.config.section import Range, Section

Share = Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(Section):
    """The rules of a verdict on a new evaluation against an old one. A rule names a task (`math500`) or an average (`v1`, `ruler`, `math`).

    A score is a share: 0.02 are two points of a hundred.
    """

    max_drop: dict[str, Share] = field(default_factory=dict)
    """What a task or an average may fall by at most. 0 asks for a rise: only then is a fall excluded."""

    min_gain: dict[str, Share] = field(default_factory=dict)
    """What a task or an average must rise by at least."""

    alpha: Annotated[float, Range(gt=0, lt=0.5)] = 0.05
    """The share of verdicts that may be NO-GO though every rule holds (over all rules, by Holm), and about that of GO though a rule is broken
    (docs/EVALUATE.md, Verdicts, has the exceptions)."""

    min_pairs: Annotated[int, Range(ge=2)] = 10
    """With fewer paired questions, in any of its tasks, a rule is INCONCLUSIVE (NeMo Evaluator's number)."""

    test: Literal["permutation", "mcnemar"] = "permutation"
    """Of a task: signs of the questions' differences by lot, which is the exact McNemar test where each has one sample; or McNemar's on the
    questions that most samples solve. Of an average: always by lot."""

    on_inconclusive: Literal["warn", "fail"] = "warn"
    """The exit code of INCONCLUSIVE: 0 with a warning, or 1."""

    other_prompts: Literal["refuse", "accept"] = "refuse"
    """Tasks whose prompts differ between the two evaluations. accept: for models with other tokenizers or chat templates."""

    seed: int = 1234
    """The seed of the lots."""
