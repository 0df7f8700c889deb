"""Every preset at full size on every rank of 64, built without its memory: together the ranks hold each weight exactly once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.check.model import check_split, padded_vocab_size
from megatron_prism.core.config import ModelConfig, ParallelConfig
from megatron_prism.families import registry
from megatron_prism.models import build

WORKER = Path(__file__).with_name("rank_worker.py")
WORLD_SIZE = 64
LAYOUTS: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {"tp": 8, "pp": 8},
    "mistral-7b-v0.1": {"tp": 2, "pp": 8},
    "mistral-small-24b": {"tp": 8, "pp": 4, "vpp": 5},
    "granite-3.3-8b": {"tp": 4, "pp": 16},  # 40 layers: uneven stages
    "granite-4.0-micro": {"tp": 8, "pp": 4},  # 40 heads in 8 groups
    "granite-4.0-h-micro": {"tp": 1, "pp": 16},  # its Mamba heads are one group, which cannot be split
    "nemotron-h-8b": {"tp": 8, "pp": 8},  # 52 layers: uneven stages
    "qwen2.5-7b": {"tp": 4, "pp": 4},
}
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape of a shard
Ranks = dict[str, list[dict[str, Any]]]


def distinct_ranks(tp: int, pp: int, **_: int) -> list[int]:
    """Return the ranks of the first data-parallel replica (the order is tp, dp, pp), and the last rank of all."""
    first = [stage * (WORLD_SIZE // pp) + rank for stage in range(pp) for rank in range(tp)]
    return sorted({*first, WORLD_SIZE - 1})


@pytest.fixture(scope="module")
def ranks(presets: dict[str, ModelConfig], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    root = tmp_path_factory.mktemp("ranks")
    cases = [
        {
            "name": name,
            "model": dataclasses.asdict(presets[name]),
            "parallel": layout | {"sequence_parallel": layout["tp"] > 1},
            "world_size": WORLD_SIZE,
            "ranks": distinct_ranks(**layout),
        }
        for name, layout in LAYOUTS.items()
    ]
    (root / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run([sys.executable, str(WORKER), str(root)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "ranks.json").read_text())


def saved(ranks: list[dict[str, Any]]) -> dict[str, tuple[tuple[int, ...], list[Box]]]:
    """Return, by key, the global shape and the shards that would be saved."""
    found: dict[str, tuple[tuple[int, ...], list[Box]]] = {}
    for rank in ranks:
        for key, whole, offset, shape, is_saved in rank["shards"]:
            known, boxes = found.setdefault(key, (tuple(whole), []))
            assert known == tuple(whole), f"{key}: {known} on one rank, {whole} on another"
            boxes += [(tuple(offset), tuple(shape))] if is_saved else []
    return found


def tiles(whole: tuple[int, ...], boxes: list[Box]) -> bool:
    """Say whether boxes cover a tensor, each element once."""
    inside = all(
        start >= 0 and start + size <= end for offset, shape in boxes for start, size, end in zip(offset, shape, whole, strict=True)
    )
    apart = all(
        any(a + n <= b or b + m <= a for a, n, b, m in zip(*first, *second, strict=True))
        for first, second in itertools.combinations(boxes, 2)
    )
    return inside and apart and sum(math.prod(shape) for _, shape in boxes) == math.prod(whole)


def wanted(model: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """Return the rules' keys and shapes, the vocabulary padded."""
    is_vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    rows = padded_vocab_size(model.vocab_size, tp)
    return {rule.mcore: (rows, *rule.shape[1:]) if rule.mcore in is_vocabulary else rule.shape for rule in registry.rules(model)}


def true_parameters(model: ModelConfig, found: dict[str, tuple[tuple[int, ...], list[Box]]]) -> int:
    """Return the elements of all shards, less the rows that pad the vocabulary."""
    shapes = {rule.mcore: rule.shape for rule in registry.rules(model)}
    return sum(
        math.prod(min(size, max(end - start, 0)) for start, size, end in zip(offset, shape, shapes[key], strict=True))
        for key, (_, boxes) in found.items()
        for offset, shape in boxes
    )


def test_every_preset_has_a_layout(presets: dict[str, ModelConfig]) -> None:
    assert presets.keys() == LAYOUTS.keys()
    assert not [
        problem
        for name, layout in LAYOUTS.items()
        for problem in check_split(presets[name], layout["tp"], layout["pp"] * layout.get("vpp", 1), "tp", "pp")
    ]


def test_keys_and_shapes_are_the_rules(ranks: Ranks, presets: dict[str, ModelConfig], preset_name: str) -> None:
    found = saved(ranks[preset_name])
    assert {key: whole for key, (whole, _) in found.items()} == wanted(presets[preset_name], LAYOUTS[preset_name]["tp"])


def test_shards_cover_every_tensor_once(ranks: Ranks, preset_name: str) -> None:
    assert not [key for key, (whole, boxes) in saved(ranks[preset_name]).items() if not tiles(whole, boxes)]


def test_parameters_add_up(ranks: Ranks, presets: dict[str, ModelConfig], preset_parameters: dict[str, int], preset_name: str) -> None:
    model, every = presets[preset_name], ranks[preset_name]
    assert true_parameters(model, saved(every)) == preset_parameters[preset_name]
    for rank in every:  # nothing that trains is left out of a checkpoint
        assert rank["parameters"] == sum(math.prod(shape) for _, _, _, shape, _ in rank["shards"]), rank["place"]
    sizes = [rank["parameters"] for rank in every]
    print(f"{preset_name} {LAYOUTS[preset_name]}: {min(sizes):,} to {max(sizes):,} parameters a rank")


def test_places_are_all_of_the_grid_and_other_replicas_save_nothing(ranks: Ranks, preset_name: str) -> None:
    tp, pp = LAYOUTS[preset_name]["tp"], LAYOUTS[preset_name]["pp"]
    last = WORLD_SIZE // (tp * pp) - 1
    places = [tuple(rank["place"]) for rank in ranks[preset_name]]
    assert set(places) == {(*place, 0) for place in itertools.product(range(tp), range(pp))} | {(tp - 1, pp - 1, last)}
    assert len(places) == len(set(places))
    for rank in ranks[preset_name]:
        assert not (rank["place"][2] and [key for key, *_, is_saved in rank["shards"] if is_saved])


def test_stages_hold_the_layers_that_are_said(ranks: Ranks, presets: dict[str, ModelConfig], preset_name: str) -> None:
    layout = {key: value for key, value in LAYOUTS[preset_name].items() if key != "tp"}
    said = build.stages(presets[preset_name], ParallelConfig(**layout))
    for rank in ranks[preset_name]:
        keys = [key.split(".") for key, *_ in rank["shards"]]
        assert {int(key[2]) for key in keys if key[:2] == ["decoder", "layers"]} == said[rank["place"][1]]


def test_tiles_sees_a_gap_an_overlap_and_an_excess() -> None:
    upper, lower = ((0, 0), (2, 3)), ((2, 0), (2, 3))
    assert tiles((4, 3), [upper, lower]) and tiles((4, 3), [((0, 0), (4, 1)), ((0, 1), (4, 2))])
    assert not tiles((4, 3), [upper]) and not tiles((4, 3), [])
    assert not tiles((4, 3), [upper, lower, lower]) and not tiles((4, 3), [upper, ((1, 0), (2, 3))])
    assert not tiles((4, 3), [upper, ((3, 0), (2, 3))])
