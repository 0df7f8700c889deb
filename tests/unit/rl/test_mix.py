"""What a mix keeps by pass count: the paper's rules, drawn by seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_prism.core.check.filter import check_filter
from megatron_prism.core.config import FilterConfig, MixConfig, MixDomainsConfig, MixRuleConfig, MixSetConfig, PromptsConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import load
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data.prompts import Prompt
from megatron_prism.jobs import rl_mix
from megatron_prism.rl import mix as mixes
from megatron_prism.rl import passes
from megatron_prism.rl.passes import PassCount, read

MIXES = Path(__file__).resolve().parents[3] / "configs" / "prompts" / "mixes"
PROMPTS = [
    Prompt(id=f"{domain}{number}", domain=domain, kind="math", prompt="?")
    for domain in ("math", "code", "science")
    for number in range(340)
]
COUNTS = {
    prompt.id: PassCount(prompt.id, int(prompt.id.lstrip("abcdefghijklmnopqrstuvwxyz")) % 17, 16) for prompt in PROMPTS
}  # 20 of each count


def rules(seed: int = 1234, **domains: MixRuleConfig) -> MixConfig:
    return MixConfig(
        out=Path("o"), sets=(MixSetConfig(prompts=Path("p"), passes=Path("c")),), domains=MixDomainsConfig(**domains), seed=seed
    )


def select(prompts: Sequence[Prompt], counts: dict[str, PassCount], mix: MixConfig) -> list[str]:
    """Return the ids that a mix keeps, of all domains."""
    return [id for selection in mixes.select(prompts, counts, mix).values() for id in selection.kept]


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
    every = mixes.select(PROMPTS, COUNTS, rules(code=MixRuleConfig(least_right=0, target=350, top_up=True)))["code"]
    assert (every.num_able, every.num_topped_up, len(every.kept)) == (340, 0, 340)  # those of no right answer are in it already


def test_no_right_answer_at_most_is_not_any_number_of_them() -> None:
    kept = select(PROMPTS, COUNTS, rules(math=MixRuleConfig(least_right=0, most_right=0)))
    assert {COUNTS[id].num_right for id in kept} == {0}


def test_a_domain_that_a_mix_does_not_name_is_left_out() -> None:
    kept = select(PROMPTS, COUNTS, load(MIXES / "mc_balanced.yaml", MixConfig))
    assert kept and not any(id.startswith("science") for id in kept)


def test_the_lot_is_the_seeds_and_the_ids_alone() -> None:
    rule = MixRuleConfig(target=40)
    kept = select(PROMPTS, COUNTS, rules(code=rule))
    assert sorted(select(PROMPTS[::-1], COUNTS, rules(code=rule))) == sorted(kept)
    other = select(PROMPTS, COUNTS, rules(5, code=rule))
    assert 0 < len(set(kept) & set(other)) < 20  # of 320, 40 and 40: 5 by chance


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"math3": None}, "none for 1 prompts, math3"),
        ({"math3": PassCount("math3", 1, 8)}, "8 samples of math3"),
        ({"math3": PassCount("math3", 1, 32)}, "32 samples of math3"),
    ],
)
def test_counts_that_do_not_fit_are_refused(changes: dict[str, PassCount | None], said: str) -> None:
    counts = {id: count for id, count in {**COUNTS, **changes}.items() if count is not None}
    with pytest.raises(InputError, match=said):
        select(PROMPTS, counts, rules(math=MixRuleConfig()))


def test_a_file_of_counts_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.jsonl"
    path.write_text(json.dumps({"id": "a", "num_right": 3, "num_samples": 16}) + "\n")
    assert read(path) == {"a": PassCount("a", 3, 16)}
    with path.open("a") as lines:
        lines.write('{"id": "a", "num_right": 3, "num_samples": 16}\n{"id": "b", "num_right": 17, "num_samples": 16}\n{"id": "c"}\nx\n')
    with pytest.raises(InputError) as raised:
        read(path)
    assert [problem.where.rpartition(":")[2] for problem in raised.value.problems if problem.where.count(":") == 1] == ["2", "3", "5"]
    assert any(":4" in problem.where for problem in raised.value.problems)
    path.write_text('{"id": "a"}\n' * 500)
    with pytest.raises(InputError, match="1000 problems in all") as raised:
        read(path)
    assert len(raised.value.problems) == 24 + 1


def test_a_prompt_with_a_fault_is_no_prompt_without_a_right_answer() -> None:
    faults = {id: PassCount(id, 0, 16, num_faults=4) for id in ("code0", "code17", "code1", "math1")}  # 0, 0, 1 and 1 right without them
    mix = rules(math=MixRuleConfig(most_right=1), code=MixRuleConfig(target=330, top_up=True))
    selections = mixes.select(PROMPTS, COUNTS | faults, mix)
    kept = set(selections["math"].kept + selections["code"].kept)
    assert not kept & faults.keys() and {"math18", "code18"} <= kept
    assert (selections["math"].num_faults, selections["code"].num_faults) == (1, 3)
    assert (selections["code"].num_able, selections["code"].num_topped_up, len(selections["code"].kept)) == (319, 11, 330)


@pytest.mark.parametrize(
    ("rule", "where"),
    [
        (MixRuleConfig(most_right=17), "domains.code"),
        (MixRuleConfig(least_right=3, most_right=2), "domains.code"),
        (MixRuleConfig(least_right=17), "domains.code"),
        (MixRuleConfig(top_up=True), "domains.code.top_up"),
        (None, "domains"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(rule: MixRuleConfig | None, where: str) -> None:
    assert [problem.where for problem in mixes.check(rules(code=rule))] == [where]  # type: ignore[arg-type]
    assert not mixes.check(rules(code=MixRuleConfig(most_right=16, least_right=16)))


@pytest.mark.parametrize("path", sorted(MIXES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_mixes_are_of_the_papers_sets(path: Path) -> None:
    mix = load(path, MixConfig)
    sets = [load(path, PromptsConfig) for path in sorted(MIXES.parent.glob("*.yaml"))]
    domains = {one.out: {source.domain for source in one.sources} for one in sets}
    assert not mixes.check(mix) and mix.out.name == path.stem
    assert {domain for one in mix.sets for domain in domains[one.prompts]} == set(mix.domains.rules)
    assert [one.passes.name for one in mix.sets] == [one.prompts.name for one in mix.sets]
    assert len(mix.sets) == sum(bool(domains[out] & set(mix.domains.rules)) for out in domains)


def test_the_papers_filter_is_the_counts_of_its_mixes() -> None:
    filtered = load(MIXES.parent / "passes" / "granite-3.3-8b.yaml", FilterConfig)
    assert not check_filter(filtered, 8) and filtered.rollout.num_samples == 16 and filtered.rollout.temperature == 1.0
    assert MixSetConfig(prompts=filtered.prompts, passes=filtered.out) in load(MIXES / "m.yaml", MixConfig).sets
    on_64 = load(MIXES.parents[1] / "base" / "filter.yaml", FilterConfig, ["prompts=p", "out=o"])  # but for the layout the same filter
    assert (filtered.init, filtered.grade, filtered.limits) == (on_64.init, on_64.grade, on_64.limits)
    assert dataclasses.replace(filtered.rollout, num_rows=on_64.rollout.num_rows) == on_64.rollout


def test_a_domain_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="domains.maths: found an unknown key.*did you mean 'math'"):
        load(MIXES / "m.yaml", MixConfig, ["domains.maths.target=1"])


def write_set(folder: Path, prompts: Sequence[Prompt]) -> Path:
    folder.mkdir()
    (folder / prompt_set.FILE).write_text("".join(map(prompt_set.to_line, prompts)))
    described = {"kind": prompt_set.KIND, "sha256": sha256_file(folder / prompt_set.FILE)}
    (folder / prompt_set.MANIFEST).write_text(json.dumps(described))
    return folder


def write_counts(folder: Path, prompts: Path, ids: Sequence[str]) -> Path:
    folder.mkdir()
    (folder / passes.FILE).write_text("".join(passes.to_line(COUNTS[id]) for id in ids))
    of = {"path": str(prompts), "sha256": sha256_file(prompts / prompt_set.FILE)}
    described = {"kind": passes.KIND, "sha256": sha256_file(folder / passes.FILE), "prompts": of}
    (folder / passes.MANIFEST).write_text(json.dumps(described))
    return folder


def test_a_mix_of_two_sets_is_a_prompt_set(tmp_path: Path) -> None:
    math, rest = PROMPTS[:100], PROMPTS[90:400]  # ten prompts in both
    sets = []
    for name, prompts in (("math", math), ("rest", rest)):
        of = write_set(tmp_path / name, prompts)
        sets.append(MixSetConfig(prompts=of, passes=write_counts(tmp_path / f"passes_{name}", of, [prompt.id for prompt in prompts])))
    config = dataclasses.replace(rules(math=MixRuleConfig(most_right=1), code=MixRuleConfig()), out=tmp_path / "mix", sets=tuple(sets))
    planned = rl_mix.run(config, dry_run=True)
    assert not config.out.exists()
    made = rl_mix.run(config)
    assert made == planned == rl_mix.run(config) and made["repeated"] == 10  # the second time it is there already
    kept = prompt_set.read(config.out)
    assert [prompt.id for prompt in kept] == select(PROMPTS[:400], COUNTS, config)
    assert made["domains"] == {"math": 20, "code": sum(COUNTS[prompt.id].num_right > 0 for prompt in PROMPTS[340:400])}
    with pytest.raises(InputError, match="made from another config"):
        rl_mix.run(dataclasses.replace(config, seed=5))


def test_counts_of_another_set_or_of_a_filter_that_has_not_ended_are_refused(tmp_path: Path) -> None:
    one, other = write_set(tmp_path / "one", PROMPTS[:9]), write_set(tmp_path / "other", PROMPTS[1:9])
    counts = write_counts(tmp_path / "passes", one, [prompt.id for prompt in PROMPTS[:9]])
    mix = dataclasses.replace(rules(math=MixRuleConfig()), out=tmp_path / "mix", sets=(MixSetConfig(prompts=other, passes=counts),))
    with pytest.raises(InputError, match=f"sets.0.passes: found {counts}, counts of {one}"):
        rl_mix.run(mix)
    assert (
        rl_mix.run(dataclasses.replace(mix, sets=(MixSetConfig(prompts=other, passes=counts / passes.FILE),)), dry_run=True)["prompts"] == 8
    )
    with pytest.raises(InputError, match=f"^{other.parent}: found no manifest.json; required a prompt set; run prism prompts$"):
        prompt_set.read(other.parent)
    described = json.loads((counts / passes.MANIFEST).read_text())
    del described["sha256"]
    (counts / passes.MANIFEST).write_text(json.dumps(described))
    with pytest.raises(InputError, match="a filter that has not ended"):
        rl_mix.run(mix)
