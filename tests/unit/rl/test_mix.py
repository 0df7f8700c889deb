"""What a mix keeps by pass count: the paper's rules, drawn by seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prism.core.config import MixConfig, MixRuleConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import load
from megatron_prism.data.prompts import Prompt
from megatron_prism.rl.mix import PassCount, read_counts, select

MIXES = Path(__file__).resolve().parents[3] / "configs" / "prompts" / "mixes"
PROMPTS = [
    Prompt(id=f"{domain}{number}", domain=domain, kind="math", prompt="?")
    for domain in ("math", "code", "science")
    for number in range(340)
]
COUNTS = {
    prompt.id: PassCount(prompt.id, int(prompt.id.lstrip("abcdefghijklmnopqrstuvwxyz")) % 17, 16) for prompt in PROMPTS
}  # 20 of each count


def rules(**domains: MixRuleConfig) -> MixConfig:
    return MixConfig(domains=domains)


def test_unbalanced_keeps_math_of_one_right_answer_and_the_rest_of_any() -> None:
    kept = select(PROMPTS, COUNTS, load(MIXES / "mcs_unbalanced.yaml", MixConfig))
    right = {domain: [COUNTS[id].num_right for id in kept if id.startswith(domain)] for domain in ("math", "code", "science")}
    assert set(right["math"]) == {1} and len(right["math"]) == 20
    assert set(right["code"]) == set(right["science"]) == set(range(1, 17)) and len(right["code"]) == 320


def test_balanced_is_topped_up_with_prompts_of_no_right_answer() -> None:
    mix = rules(math=MixRuleConfig(most_right=1, target=15), code=MixRuleConfig(target=330, top_up=True), science=MixRuleConfig(target=330))
    kept = select(PROMPTS, COUNTS, mix)
    of_code = [COUNTS[id].num_right for id in kept if id.startswith("code")]
    assert len([id for id in kept if id.startswith("math")]) == 15
    assert len(of_code) == 330 and of_code.count(0) == 10
    assert len([id for id in kept if id.startswith("science")]) == 320  # not topped up


def test_a_domain_that_a_mix_does_not_name_is_left_out() -> None:
    kept = select(PROMPTS, COUNTS, load(MIXES / "mc_balanced.yaml", MixConfig))
    assert kept and not any(id.startswith("science") for id in kept)


def test_the_lot_is_the_seeds_and_the_ids_alone() -> None:
    rule = MixRuleConfig(target=40)
    kept = select(PROMPTS, COUNTS, rules(code=rule))
    assert sorted(select(PROMPTS[::-1], COUNTS, rules(code=rule))) == sorted(kept)
    other = select(PROMPTS, COUNTS, MixConfig(domains={"code": rule}, seed=5))
    assert 0 < len(set(kept) & set(other)) < 20  # of 320, 40 and 40: 5 by chance


@pytest.mark.parametrize(
    ("changes", "said"), [({"math3": None}, "none for 1 prompts, math3"), ({"math3": PassCount("math3", 1, 8)}, "8 samples of math3")]
)
def test_counts_that_do_not_fit_are_refused(changes: dict[str, PassCount | None], said: str) -> None:
    counts = {id: count for id, count in {**COUNTS, **changes}.items() if count is not None}
    with pytest.raises(InputError, match=said):
        select(PROMPTS, counts, rules(math=MixRuleConfig()))


def test_a_file_of_counts_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.jsonl"
    path.write_text(json.dumps({"id": "a", "num_right": 3, "num_samples": 16}) + "\n")
    assert read_counts(path) == {"a": PassCount("a", 3, 16)}
    with path.open("a") as lines:
        lines.write('{"id": "a", "num_right": 3, "num_samples": 16}\n{"id": "b", "num_right": 17, "num_samples": 16}\n{"id": "c"}\nx\n')
    with pytest.raises(InputError) as raised:
        read_counts(path)
    assert [problem.where.rpartition(":")[2] for problem in raised.value.problems if problem.where.count(":") == 1] == ["2", "3", "5"]
    assert any(":4" in problem.where for problem in raised.value.problems)
