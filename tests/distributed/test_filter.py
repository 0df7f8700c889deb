"""The filter through kills and over layouts: passes.jsonl is the same file, byte for byte; other weights or prompts are refused."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import MixConfig, MixDomainsConfig, MixRuleConfig, MixSetConfig
from megatron_prism.core.errors import InputError
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data.prompts import Prompt
from megatron_prism.jobs import rl_filter, rl_mix, rl_samples
from megatron_prism.rl import passes
from tests.distributed import toy_filter, toy_rl

pytestmark = pytest.mark.slow
NUM_PROMPTS, FAULTY = 23, "p3"  # five shards, the last of three


def write_set(folder: Path, order: list[int]) -> Path:
    folder.mkdir()
    lines = [
        Prompt(
            id=f"p{n}",
            domain=("math", "science")[n % 2],  # type: ignore[arg-type]
            kind="math",
            prompt=f"The sum of {n} and",
            gold="fault" if f"p{n}" == FAULTY else "1",
        )
        for n in order
    ]
    text = "".join(map(prompt_set.to_line, lines))
    (folder / prompt_set.FILE).write_text(text)
    (folder / prompt_set.MANIFEST).write_text(json.dumps({"kind": "prompts", "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    return folder


@pytest.fixture(scope="module")
def toy(run_distributed: Callable[..., list[Any]], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that filters the toy into a folder, and returns the folder."""
    home = tmp_path_factory.mktemp("filter")
    prompts = write_set(home / "prompts", list(range(NUM_PROMPTS)))

    def run(name: str, num_ranks: int = 1, **values: Any) -> Path:
        given = {"prompts": prompts, "checkpoint": tiny_checkpoint, **values}
        run_distributed(toy_filter.run, num_ranks, timeout_s=120, out=home / name, parallel=values.get("grid", {}), **given)
        return home / name

    run.home = home  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def unbroken(toy: Callable[..., Path]) -> Path:
    return toy("unbroken")


def text(folder: Path) -> str:
    return (folder / passes.FILE).read_text()


def test_each_prompt_is_counted_and_a_fault_is_not_a_wrong_answer(unbroken: Path) -> None:
    counts = passes.read(unbroken / passes.FILE)
    assert list(counts) == [f"p{n}" for n in range(NUM_PROMPTS)] and {one.num_samples for one in counts.values()} == {4}
    assert counts[FAULTY].num_faults == 4 and not any(one.num_faults for id, one in counts.items() if id != FAULTY)
    assert len({one.num_right for one in counts.values()}) > 2  # the toy's prompts differ: else nothing below shows anything
    assert not (unbroken / passes.SHARDS).exists() and passes.manifest_of(unbroken)["prompts"]["sha256"]


@pytest.mark.parametrize("point", list(toy_filter.POINTS))
def test_a_filter_killed_at_a_point_ends_as_an_unbroken_one(toy: Callable[..., Path], unbroken: Path, point: str) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        toy(f"at-{point}", point=point)
    folder = toy.home / f"at-{point}"  # type: ignore[attr-defined]
    shards = sorted(path.name for path in (folder / passes.SHARDS).glob("*.jsonl"))
    assert len(shards) == toy_filter.SHARDS[point]
    toy(f"at-{point}")
    assert text(folder) == text(unbroken)


def test_a_signal_ends_a_filter_after_its_shard(toy: Callable[..., Path], unbroken: Path) -> None:
    """The third shard is written once the fourth is sampled, which is counted too."""
    with pytest.raises(AssertionError, match="Stopped: stopped by SIGTERM: 4 of 5 shards are counted"):
        toy("stopped", point="written", by="SIGTERM")
    assert text(toy("stopped")) == text(unbroken)


def test_an_engine_that_is_not_the_model_counts_nothing(toy: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="ResultFailure: sampler and trainer disagree"):
        toy("off", off=True)
    assert not (toy.home / "off" / passes.SHARDS).exists()  # type: ignore[attr-defined]


def test_kills_at_any_time_change_nothing(toy: Callable[..., Path], unbroken: Path) -> None:
    draw, shards = random.Random(7), []
    for _ in range(20):
        try:
            toy("any-time", delay_s=draw.uniform(0.02, 0.15))
            break
        except AssertionError as error:
            assert "exit code -9" in str(error)
        shards.append(len(list((toy.home / "any-time" / passes.SHARDS).glob("*.jsonl"))))  # type: ignore[attr-defined]
    print("shards there at each kill", shards)
    assert shards and text(toy("any-time")) == text(unbroken)


@pytest.mark.parametrize("grid", [{"tp": 1}, {"pp": 2}, {"tp": 2}], ids=["dp2", "pp2", "tp2"])
def test_a_layout_counts_as_one_process(toy: Callable[..., Path], unbroken: Path, grid: dict[str, int]) -> None:
    assert text(toy("-".join(map(str, grid.items())), 2, grid=grid)) == text(unbroken)


def test_a_killed_filter_goes_on_with_another_layout(toy: Callable[..., Path], unbroken: Path) -> None:
    with pytest.raises(AssertionError, match="exit code -9"):
        toy("moved", 2, grid={"tp": 1}, point="written")
    assert text(toy("moved")) == text(unbroken)


def test_counts_follow_from_the_prompts_ids_and_the_seed_alone(toy: Callable[..., Path], unbroken: Path) -> None:
    other = write_set(toy.home / "shuffled", random.Random(1).sample(range(NUM_PROMPTS), NUM_PROMPTS))  # type: ignore[attr-defined]
    shuffled = passes.read(toy("reordered", prompts=other, shard_prompts=7) / passes.FILE)
    counts = passes.read(unbroken / passes.FILE)
    assert list(shuffled) != list(counts) and shuffled == counts
    assert passes.read(toy("reseeded", seed=5) / passes.FILE) != counts  # the control: another seed is seen


def test_another_checkpoint_set_or_sampling_is_refused_by_name(
    toy: Callable[..., Path], unbroken: Path, make_checkpoint: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    home = toy.home  # type: ignore[attr-defined]
    prompts = home / "prompts"
    given = {"out": unbroken, "prompts": prompts, "checkpoint": tiny_checkpoint}

    def where(**changes: Any) -> list[str]:
        with pytest.raises(InputError) as raised:
            rl_filter.resolve(toy_filter.config(**{name: str(value) for name, value in given.items()} | changes), 1)
        return [problem.where for problem in raised.value.problems]

    other = write_set(home / "other", list(range(1, NUM_PROMPTS)))
    assert rl_filter.resolve(toy_filter.config(**{name: str(value) for name, value in given.items()}), 1).figures["shards_to_do"] == 0
    assert where(checkpoint=str(make_checkpoint("llama", initializer_range=0.2))) == ["init.checkpoint"]
    assert where(prompts=str(other)) == ["prompts"]
    assert where(rollout={"num_samples": 4, "max_tokens": 9}) == ["rollout.max_tokens"]
    assert where(seed=5, shard_prompts=6) == ["seed", "shard_prompts"]
    assert where(out=str(prompts)) == [f"out ({prompts})"]


def test_from_pass_counts_to_a_run_and_to_its_page(
    toy: Callable[..., Path], unbroken: Path, tiny_checkpoint: Path, run_distributed: Callable[..., list[Any]]
) -> None:
    home = toy.home  # type: ignore[attr-defined]
    counts = passes.read(unbroken / passes.FILE)
    mix = MixConfig(
        out=home / "mix",
        sets=(MixSetConfig(prompts=home / "prompts", passes=unbroken),),
        domains=MixDomainsConfig(math=MixRuleConfig(most_right=3), science=MixRuleConfig(target=10, top_up=True)),
        num_samples=4,
    )
    made = rl_mix.run(mix)
    ids = {prompt.id for prompt in prompt_set.read(mix.out)}
    assert made["domains"]["science"] == 10 and made["selection"][1]["num_faults"] == 1 and FAULTY not in ids
    assert {counts[id].num_right for id in ids if int(id[1:]) % 2 == 0} <= {1, 2, 3}
    run_dir = home / "run"
    rollout = {"num_prompts": 4, "num_samples": 4, "max_tokens": 8, "keep": True}
    run = {"run_dir": run_dir, "prompts": mix.out, "checkpoint": tiny_checkpoint, "steps": 2, "rollout": rollout}
    run_distributed(toy_rl.train, 1, timeout_s=240, **run)
    page = Path(rl_samples.run(run_dir, None)["page"])
    shown = page.read_text()
    assert page.name == "step_00000002.html" and shown.count('<details class="group') == 4 and shown.count("<section") == 16
    assert "The sum of" in shown and "advantage" in shown and rl_samples.run(run_dir, 1)["responses"] == 16
    with pytest.raises(InputError, match="2 steps, step_00000001 to step_00000002"):
        rl_samples.run(run_dir, 3)
