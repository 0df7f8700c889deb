from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.core.config import PackingConfig
from megatron_prism.core.errors import InputError
from megatron_prism.data import mixture
from megatron_prism.jobs import prepare

WEIGHTS = st.lists(st.decimals(min_value="0.01", max_value=100, places=2).map(float), min_size=1, max_size=12)


def named(values: list) -> dict:
    return {f"s{index}": value for index, value in enumerate(values)}


@given(WEIGHTS, st.integers(1, 10**14))
def test_tokens_sum_to_the_budget_and_miss_the_weights_by_less_than_one(weights: list[float], budget: int) -> None:
    plan = mixture.plan(named(weights), {}, budget)
    total = sum(Fraction(str(weight)) for weight in weights)
    assert sum(part.tokens for part in plan) == budget
    assert [part.name for part in plan] == list(named(weights))
    for part, weight in zip(plan, weights, strict=True):
        assert abs(part.tokens - budget * Fraction(str(weight)) / total) < 1
        assert part.share == part.tokens / budget and part.epochs is None


@given(st.data(), WEIGHTS)
def test_no_budget_is_the_largest_within_one_epoch(data: st.DataObject, weights: list[float]) -> None:
    available = named(data.draw(st.lists(st.integers(1, 10**12), min_size=len(weights), max_size=len(weights))))
    plan = mixture.plan(named(weights), available, None)
    assert all(0 <= part.epochs <= 1 and part.tokens <= available[part.name] for part in plan)
    total = sum(Fraction(str(weight)) for weight in weights)
    more = sum(part.tokens for part in plan) + 1
    assert any(more * Fraction(str(weight)) / total > available[name] for name, weight in named(weights).items())


def test_papers_mixture_and_more_than_one_epoch() -> None:
    weights = {"web": 55.0, "a": 15.0, "b": 10.0, "c": 10.0, "d": 10.0}
    plan = mixture.plan(weights, dict.fromkeys(weights, 10**9), 27 * 10**9)
    assert [part.share for part in plan] == [0.55, 0.15, 0.1, 0.1, 0.1]
    assert plan[0].epochs == pytest.approx(14.85)
    assert [part.tokens for part in mixture.plan({"a": 1.0, "b": 1.0, "c": 1.0}, {}, 2)] == [1, 1, 0]


def test_a_weight_is_the_number_that_was_written() -> None:
    """A float of 0.1 is a little more than a tenth: 1,000 tokens would be the tenth of 9,999."""
    assert sum(part.tokens for part in mixture.plan({"a": 0.1, "b": 0.9}, {"a": 1000, "b": 10**9}, None)) == 10_000


def test_what_is_left_goes_to_the_largest_remainder() -> None:
    parts = mixture.plan({"a": 0.55, "b": 0.26, "c": 0.19}, {}, 10)  # 5.5, 2.6 and 1.9
    assert [part.tokens for part in parts] == [5, 3, 2]


def test_empty_source_is_refused() -> None:
    with pytest.raises(InputError, match="b: found 0 tokens"):
        mixture.plan({"a": 50.0, "b": 50.0}, {"a": 3, "b": 0}, None)


@pytest.fixture
def prepared(make_config: Callable) -> Path:
    config = make_config(qa={"valid_percent": 20.0})
    prepare.run(config)
    return config.out


def test_prepared_mixture_reads_back(prepared: Path, tmp_path: Path) -> None:
    moved = prepared.rename(tmp_path / "moved")
    found = mixture.read_prepared(moved)
    assert (found.root, found.vocab_size, found.eos_id) == (moved, 384, 2)
    qa, prose = found.sources
    assert (qa.name, qa.weight) == ("qa", 70.0)
    assert (qa.train.prefixes, qa.valid.prefixes) == ((moved / "qa" / "00000.train",), (moved / "qa" / "00000.valid",))
    assert qa.train.num_documents + qa.valid.num_documents == 60 and qa.valid.num_documents > 0 and qa.valid.num_tokens > 0
    assert (prose.valid, prose.train.num_documents) == (None, 20)


def test_a_mixture_is_known_by_what_its_files_hold(make_config: Callable, corpus: Path, tmp_path: Path) -> None:
    """Not by its path, the paths of its inputs, its weights or its time."""

    def sums(**changes: Any) -> tuple[str, ...]:
        config = make_config(out=tmp_path / f"out{len(list(tmp_path.iterdir()))}", **changes)
        prepare.run(config)
        held = mixture.read_prepared(config.out)
        return held.sha256, *(source.sha256 for source in held.sources)

    plain = sums()
    moved = (corpus / "qa.jsonl").rename(corpus / "moved.jsonl")
    qa = {"path": (str(moved),)}
    assert sums(qa=qa) == sums(qa=qa | {"weight": 60.0}, prose={"weight": 40.0}) == plain
    packed = sums(qa=qa, packing=PackingConfig(seq_length=64))
    assert packed[0] != plain[0] and packed[1] != plain[1]
    held_out = sums(qa=qa, prose={"valid_percent": 30.0})
    assert held_out[0] != plain[0] and held_out[1] == plain[1] and held_out[2] != plain[2]
    moved.write_text(moved.read_text().replace("odd", "add"))
    other = sums(qa=qa)
    assert other[0] != plain[0] and other[1] != plain[1] and other[2] == plain[2]


def test_a_mixture_is_known_by_its_tokenizer_and_its_held_out_files_too(prepared: Path) -> None:
    file = prepared / mixture.FILE
    plain, manifest = mixture.read_prepared(prepared), json.loads(file.read_text())

    def changed(*keys: Any, value: Any) -> mixture.Prepared:
        other = json.loads(json.dumps(manifest))
        functools.reduce(operator.getitem, keys[:-1], other)[keys[-1]] = value
        file.write_text(json.dumps(other))
        return mixture.read_prepared(prepared)

    qa = manifest["sources"][0]
    shard = next(number for number, each in enumerate(qa["shards"]) if each["valid"])
    assert changed("tokenizer", "sha256", value="0" * 64).sha256 != plain.sha256
    held_out = changed("sources", 0, "shards", shard, "valid", "bin", "sha256", value="0" * 64)
    assert held_out.sha256 != plain.sha256 and held_out.sources[0].sha256 == plain.sources[0].sha256, "training reads the same"
    read = changed("sources", 0, "reading", value={**qa["reading"], "num_bytes": 30, "unread_bytes": 10})
    assert read.sources[0].unread_share == 0.25 and read.sha256 == plain.sha256


def test_each_missing_or_resized_file_is_named(prepared: Path) -> None:
    (prepared / "qa" / "00000.valid.idx").unlink()
    with (prepared / "prose" / "00000.train.bin").open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(InputError) as caught:
        mixture.read_prepared(prepared)
    assert [problem.where for problem in caught.value.problems] == [
        str(prepared / "qa/00000.valid.idx"),
        str(prepared / "prose/00000.train.bin"),
    ]


@pytest.mark.parametrize("name", ["../corpus/qa", "/", "/etc/passwd", "..", ".", ""])
def test_a_source_out_of_the_folder_is_refused(prepared: Path, name: str) -> None:
    values = json.loads((prepared / "manifest.json").read_text())
    values["sources"][0]["name"] = name
    (prepared / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"sources: found a source named"):
        mixture.read_prepared(prepared)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"kind": "run"}, "kind"), ({"tokenizer": {}}, "tokenizer.sha256"), ({"sources": 3}, "sources")],
)
def test_wrong_manifest_is_named_by_key(prepared: Path, change: dict, key: str) -> None:
    values = json.loads((prepared / "manifest.json").read_text())
    (prepared / "manifest.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=f"manifest.json:{key}: found"):
        mixture.read_prepared(prepared)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"weight": 0.0}, "qa: found weight 0; required a number above 0"),
        ({"weight": -1.0}, "qa: found weight -1"),
        ({"weight": math.inf}, "qa: found weight inf"),
        ({"shards": []}, "qa: found no training tokens in 0 shards"),
        ({"packing": {"seq_length": 0, "num_sequences": 1, "efficiency": 1.0}}, "qa: found packed into 1 sequences of 0"),
        ({"packing": {"seq_length": 8, "num_sequences": 0, "efficiency": 1.0}}, "qa: found packed into 0 sequences of 8"),
        (None, "found an empty list"),
    ],
)
def test_a_manifest_that_no_run_could_walk_through_is_named(prepared: Path, change: dict | None, found: str) -> None:
    values = json.loads((prepared / "manifest.json").read_text())
    sources = [] if change is None else [source | (change if source["name"] == "qa" else {}) for source in values["sources"]]
    (prepared / "manifest.json").write_text(json.dumps(values | {"sources": sources}))
    with pytest.raises(InputError, match=f"manifest.json:sources.*{found}.*run prism prepare again"):
        mixture.read_prepared(prepared)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file.*run prism prepare"):
        mixture.read_prepared(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        mixture.read_prepared(tmp_path)
