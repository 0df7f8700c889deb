"""The filter's arithmetic: from outcomes to pass counts, their figures and bars, and what a folder of shards holds."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from megatron_prism.core.check.filter import check_filter
from megatron_prism.core.config import FilterConfig
from megatron_prism.core.errors import InputError, Stopped
from megatron_prism.core.load import build, to_dict
from megatron_prism.data.prompts import Prompt
from megatron_prism.generate.engine import Ending, Rollout, ids_of, logprobs_of
from megatron_prism.grade.outcome import Graded, Item, Outcome
from megatron_prism.jobs import rl_filter
from megatron_prism.report.bars import WIDTH, bars
from megatron_prism.rl import filter, passes
from megatron_prism.rl.passes import Folder, PassCount
from megatron_prism.rl.rollout import Encoded, Sampled

PROMPTS = [Prompt(id=f"p{n}", domain="math" if n < 3 else "code", kind="math", prompt="?", gold="1") for n in range(5)]


def ended_of(outcome: Outcome) -> Ending:
    return "max_tokens" if outcome == "truncated" else "end_token"


def test_a_fault_is_neither_right_nor_wrong() -> None:
    outcomes: list[list[Outcome]] = [["right", "fault", "wrong"], ["no_format", "truncated", "right"]]
    rollouts = [
        Rollout(prompt, sample, 0, ids_of((5,) * (1 + sample)), logprobs_of((-1.0,) * (1 + sample)), ended_of(outcome))
        for prompt, of_prompt in enumerate(outcomes)
        for sample, outcome in enumerate(of_prompt)
    ]
    items = [Item(id=f"{one.prompt}/{one.sample}", kind="math", response="") for one in rollouts]
    graded = {item.id: Graded(id=item.id, outcome=outcomes[one.prompt][one.sample]) for one, item in zip(rollouts, items, strict=True)}
    sampled = Sampled([Encoded(prompt, (1,)) for prompt in PROMPTS[:2]], rollouts, items, 0)
    back = dict(reversed(graded.items()))  # joined by id: their order says nothing
    assert filter.count(sampled, back) == [PassCount("p0", 1, 3, 1, 0, 2.0), PassCount("p1", 1, 3, 0, 1, 2.0)]


def test_figures_are_by_domain_and_a_prompt_with_a_fault_is_in_no_histogram() -> None:
    counts = [PassCount("p0", 0, 4), PassCount("p1", 4, 4), PassCount("p2", 1, 4, 2, 1, 8.0), PassCount("p3", 2, 4), PassCount("p4", 2, 4)]
    figures = filter.by_domain(PROMPTS, counts, 4)
    assert list(figures) == ["code", "math"]
    assert figures["code"]["histogram"] == [0, 0, 2, 0, 0] and figures["code"]["right"] == 0.5
    assert figures["math"] == {
        "prompts": 3,
        "prompts_with_faults": 1,
        "right": 5 / 10,  # of ten verdicts
        "truncated": 1 / 12,
        "mean_tokens": pytest.approx(8 / 3),
        "histogram": [1, 0, 0, 0, 1],
    }


def test_seeds_are_of_the_run_and_the_prompts_id() -> None:
    seeds = {filter.seed(seed, id) for seed in (0, 1) for id in ("a", "b", "\ud800")}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds) and filter.seed(0, "a") == filter.seed(0, "a")


def test_bars() -> None:
    lines = list(bars([0, 1, 2000, *[0] * 8]))
    assert lines[0].split() == ["0", "0"] and lines[1].split() == ["1", "#", "1"]  # one of two thousand is seen
    assert lines[2] == f" 2 {'#' * WIDTH} 2,000" and len({len(line.rpartition(" ")[0]) for line in lines}) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / passes.MANIFEST).write_text(json.dumps({"kind": passes.KIND}))
    return Folder(tmp_path, [f"p{n}" for n in range(5)], 2)


def test_a_shard_is_whole_or_absent(folder: Folder) -> None:
    counts = [PassCount(f"p{n}", n, 9) for n in range(5)]
    assert folder.num_shards == 3 and folder.missing() == [0, 1, 2]
    folder.write(2, counts[4:])
    (folder.root / passes.SHARDS / ".000001.jsonl.7.tmp").write_text("what a killed process left")
    assert folder.missing() == [0, 1]
    folder.write(0, counts[:2])
    folder.write(1, counts[2:4])
    assert list(folder.counts()) == counts
    folder.finish()
    assert list(passes.read(folder.root / passes.FILE).values()) == counts == list(folder.counts()) and folder.missing() == []
    assert passes.manifest_of(folder.root) and sorted(path.name for path in folder.root.iterdir()) == [passes.MANIFEST, passes.FILE]
    with (folder.root / passes.FILE).open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="as its manifest says"):
        passes.manifest_of(folder.root)
    with pytest.raises(InputError, match="as its manifest says.*put it back"):
        folder.missing()
    with pytest.raises(InputError, match=f"^{folder.root / 'a'}: found no such folder; .*; run prism rl filter$"):
        passes.manifest_of(folder.root / "a")
    (folder.root / passes.FILE).unlink()
    with pytest.raises(InputError, match="the pass counts that its manifest names"):
        folder.missing()


def test_an_end_that_was_killed_before_the_seal_is_made_again(folder: Folder) -> None:
    for shard in range(3):
        folder.write(shard, [PassCount(folder.ids[place], 1, 9) for place in folder.places(shard)])
    (folder.root / passes.FILE).write_text(passes.to_line(PassCount("p0", 9, 9)))  # nobody vouches for it
    assert folder.missing() == []
    folder.finish()
    assert [one.num_right for one in passes.read(folder.root / passes.FILE).values()] == [1] * 5


@pytest.mark.parametrize("num_bytes", [0, -10])
def test_a_truncated_shard_says_what_to_do(folder: Folder, num_bytes: int) -> None:
    folder.write(0, [PassCount("p0", 0, 9), PassCount("p1", 0, 9)])
    path = folder.root / passes.SHARDS / "000000.jsonl"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(InputError, match="000000.jsonl.*remove that file; its prompts are sampled again"):
        folder.missing()


def test_a_shard_of_other_prompts_is_refused(folder: Folder) -> None:
    folder.write(1, [PassCount("p0", 0, 9), PassCount("p1", 0, 9)])
    with pytest.raises(InputError, match=r"000001.jsonl: found other prompts"):
        folder.missing()


def test_counts_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.jsonl"
    path.write_text("".join(passes.to_line(one) for one in (PassCount("a", 3, 4, 1), PassCount("b", 4, 4, 1), PassCount("c", 0, 4, -1))))
    with pytest.raises(InputError) as raised:
        passes.read(path)
    assert [problem.where for problem in raised.value.problems] == [f"{path}:2", f"{path}:3"]


def test_a_shard_is_graded_while_the_next_one_is_sampled(monkeypatch: pytest.MonkeyPatch, folder: Folder) -> None:
    """Programs of a shard may take an hour, in which no device would work."""
    sampling, walk, num_shards = threading.Event(), list[str](), folder.num_shards
    seen = threading.Event()

    def sample(*_: object, **__: object) -> Sampled:
        walk.append("sampled")
        if len(walk) > 1:
            sampling.set()  # the second shard is on its way
            assert seen.wait(10), "nothing was graded meanwhile"
        return Sampled((), (), (Item(id="0/0", kind="math", response="a"),), 0)

    def grade(*_: object) -> dict[str, Graded]:
        assert sampling.wait(10), "the next shard waits for the grades"
        seen.set()
        return {}

    monkeypatch.setattr(filter, "_open_gate", lambda _: None)
    monkeypatch.setattr(filter, "agree", lambda values: values)
    monkeypatch.setattr(filter, "count", lambda *_: [PassCount("p0", 0, 1)])
    monkeypatch.setattr(filter.rollout, "sample", sample)
    monkeypatch.setattr(filter.rollout, "grade", grade)
    monkeypatch.setattr(filter.rollout, "agreed", lambda outcomes: outcomes)
    written: list[int] = []
    place = MagicMock(num_shards=num_shards, places=folder.places, write=lambda shard, _: written.append(shard))
    work = MagicMock(folder=place, prompts=[Encoded(one, (1,)) for one in PROMPTS], is_first=True)
    work.stop.reason.return_value = 0.0
    filter.run(work, range(num_shards))
    assert written == list(range(num_shards)) and num_shards > 1


def test_a_filter_that_is_stopped_writes_what_it_has_sampled(monkeypatch: pytest.MonkeyPatch, folder: Folder) -> None:
    """It is asked before each shard, with room for one more; and each prompt has the seed of the run and its id."""
    reserves: list[float] = []
    seeds: list[int] = []

    def sample(*given: Any, **_: object) -> Sampled:
        seeds.extend(given[-1])
        return Sampled((), (), (Item(id="0/0", kind="math", response="a"),), 0)

    def reason(reserve_s: float) -> float:
        reserves.append(reserve_s)
        return float(signal.SIGTERM) if len(reserves) == 2 else 0.0

    monkeypatch.setattr(filter, "_open_gate", lambda _: None)
    monkeypatch.setattr(filter, "agree", lambda values: values)
    monkeypatch.setattr(filter, "count", lambda *_: [PassCount("p0", 0, 1)])
    monkeypatch.setattr(filter.rollout, "sample", sample)
    monkeypatch.setattr(filter.rollout, "grade", lambda *_: {})
    monkeypatch.setattr(filter.rollout, "agreed", lambda outcomes: outcomes)
    written: list[int] = []
    place = MagicMock(num_shards=folder.num_shards, places=folder.places, write=lambda shard, _: written.append(shard))
    work = MagicMock(folder=place, prompts=[Encoded(one, (1,)) for one in PROMPTS], is_first=True)
    work.config.seed, work.stop.reason = 7, reason
    with pytest.raises(Stopped, match="stopped by SIGTERM: 2 of 3 shards are counted"):
        filter.run(work, [1, 2])  # shard 0 was counted before
    assert written == [1] and reserves[0] == 0 < reserves[1]
    assert seeds == [filter.seed(7, PROMPTS[place].id) for place in folder.places(1)]


def test_the_gate_of_a_filter_compares_at_temperature_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter samples at any; log-probabilities are compared where both sides mean the same distribution."""
    given: list[Any] = []
    monkeypatch.setattr(filter.gate, "at_start", lambda *values: given.extend(values) or MagicMock(kl=0.0, num_tokens=1))
    monkeypatch.setattr(filter.gate, "require", lambda *_: None)
    monkeypatch.setattr(filter.gate, "bound_of", lambda *_: None)
    work = MagicMock(prompts=[Encoded(PROMPTS[0], (1,) * 5)])
    work.config.parallel.tp, work.config.rollout.max_tokens, work.config.rollout.temperature = 2, 8, 0.6
    filter._open_gate(work)
    sampling, shape = given[3:5]
    assert sampling.temperature == 1.0 and sampling.max_tokens == 8 and shape.seq_length % 2 == 0


def test_a_filter_goes_on_with_the_graders_that_it_began_with() -> None:
    config = build({"out": "o", "prompts": "p", "init": {"checkpoint": "c"}, "rollout": {"max_tokens": 8}}, FilterConfig, str)
    here = {"checkpoint": {"sha256": "1"}, "prompts": {"sha256": "2"}, "config": to_dict(config), "grader": {"prism": "now"}}
    before = {**here, "grader": {"prism": "before"}}
    assert [problem.where for problem in rl_filter._check_same(config, before, here)] == ["the graders' versions"]
    assert not rl_filter._check_same(config, here, here) and not rl_filter._check_same(config, {**before, "sha256": "ended"}, here)


def test_a_config_that_names_no_checkpoint_is_refused() -> None:
    values = {"out": "o", "prompts": "p", "init": {"tokenizer": "t"}, "rollout": {"max_tokens": 0}}
    problems = check_filter(build(values, FilterConfig, str), 1)
    assert {problem.where for problem in problems} == {"init.checkpoint", "init.tokenizer", "rollout.max_tokens"}
