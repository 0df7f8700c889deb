"""At random: a header, an index or a config.json that is changed anywhere is refused by the folder's file, or what is
imported is what the safetensors library reads from that folder. `python tools/soak.py headers` runs it for longer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megatron_prism.checkpoint import torch_dist
from megatron_prism.checkpoint.plan import plan_import
from megatron_prism.core.errors import InputError
from megatron_prism.families import blocks
from megatron_prism.jobs.convert import run_import

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SMALL = {
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 8,
}
EXAMPLES = 120
Files = dict[str, bytes]
STRANGE = st.one_of(
    st.none() | st.booleans() | st.integers(-2, 40) | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, 10**9, 10**3000]),
    st.sampled_from([0.0, 1.0, 2.0, -0.5, 1e30, math.inf, math.nan]),
    st.sampled_from(
        ["", "4", "F32", "BF16", "F64", "F8_E4M3", "I8", "true", "default", "llama3", "a\0b", "\ud800", "\x1b[2J\n", "x" * 300]
    ),
    st.sampled_from(
        [FIRST, SECOND, CONFIG, "model.safetensors", "..", "../../evil", f"../hf/{FIRST}", "/dev/zero", "weight_map", "__metadata__"]
    ),
    st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM", "GraniteMoeHybridForCausalLM", "lm_head.weight"]),
    st.lists(st.integers(-1, 8), max_size=4),
    st.sampled_from([{}, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, {"rope_type": "llama3", "factor": 8.0}, ["attention"]]),
)


class Pairs(list):
    """A JSON object as its pairs, so that a key may stand twice."""


def dump(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(part)}" for key, part in value) + "}"
    return "[" + ",".join(map(dump, value)) + "]" if isinstance(value, list) else json.dumps(value)


def change_tree(draw: st.DrawFn, tree: Any) -> Any:
    """Change one place of a JSON tree: its value, its key, its order, or how often it is there."""
    if not isinstance(tree, list) or not tree or draw(st.integers(0, 9)) == 0:
        if type(tree) is int and draw(st.booleans()):
            return tree + draw(st.sampled_from([-(2**64), -64, -4, -1, 1, 4, 64, 2**64]))
        return draw(STRANGE)
    at, other = (draw(st.integers(0, len(tree) - 1)) for _ in range(2))
    keyed, tree = isinstance(tree, Pairs), type(tree)(tree)
    kind = draw(st.sampled_from(["inside"] * 4 + ["drop", "twice", "swap", "order", "add", *(["rename"] if keyed else [])]))
    if kind == "inside":
        tree[at] = (tree[at][0], change_tree(draw, tree[at][1])) if keyed else change_tree(draw, tree[at])
    elif kind == "drop":
        del tree[at]
    elif kind == "twice":
        tree.insert(other, tree[at])
    elif kind == "swap" and keyed:
        (one, first), (two, second) = tree[at], tree[other]
        tree[at], tree[other] = (one, second), (two, first)
    elif kind in ("swap", "order"):
        tree[at], tree[other] = tree[other], tree[at]
    elif kind == "add":
        tree.insert(at, (draw(st.sampled_from(["x", "__metadata__", "../../evil", "\ud800"])), draw(STRANGE)) if keyed else draw(STRANGE))
    else:
        name = draw(st.sampled_from(["x", "", "__metadata__", "../../evil", "\ud800", tree[other][0]]))
        tree[at] = (name, tree[at][1])
    return tree


def change_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Flip, drop, repeat or add a few bytes, or cut the rest off."""
    start = draw(st.integers(0, max(len(data) - 1, 0)))
    end = start + draw(st.integers(0, 4))
    kind = draw(st.sampled_from(["flip", "drop", "twice", "add", "cut"]))
    if kind == "flip":
        return data[:start] + bytes(byte ^ draw(st.integers(1, 255)) for byte in data[start:end]) + data[end:]
    if kind == "cut":
        return data[:start]
    middle = {
        "drop": b"",
        "twice": data[start:end] * 2,
        "add": draw(st.sampled_from([b"\0", b" ", b"9", b"[" * 5000, b"\xff", b'"', b"\\"])),
    }
    return data[:start] + middle[kind] + data[end:]


def deal_anew(draw: st.DrawFn, header: Pairs) -> Pairs:
    """Give tensors of one shape each other's bytes, and list all in another order: a whole file, of other weights."""
    order = draw(st.permutations(header))
    by_shape: dict[str, list[Pairs]] = {}
    for _, entry in order:
        by_shape.setdefault(dump(dict(entry).get("shape")), []).append(entry)
    return Pairs((name, by_shape[dump(dict(entry).get("shape"))].pop()) for name, entry in order)


@st.composite
def damaged(draw: st.DrawFn, whole: Files) -> Files:
    """Return the files of a folder, one of them changed in one place or more."""
    file = draw(st.sampled_from([FIRST, FIRST, SECOND, INDEX, CONFIG]))
    start = 8 if file in (FIRST, SECOND) else 0
    end = 8 + int.from_bytes(whole[file][:8], "little") if start else len(whole[file])
    length, text, data = whole[file][:start], whole[file][start:end], whole[file][end:]
    tree = json.loads(text, object_pairs_hook=Pairs)
    if start and draw(st.integers(0, 3)) == 0:
        tree = deal_anew(draw, tree)
    else:
        for _ in range(draw(st.integers(1, 2))):
            tree = change_tree(draw, tree)
    text = dump(tree).encode()
    if draw(st.integers(0, 4)) == 0:
        text = change_bytes(draw, text)
    if start:
        length = len(text).to_bytes(8, "little")
        if draw(st.integers(0, 9)) == 0:
            length = change_bytes(draw, length)
        if draw(st.integers(0, 9)) == 0:
            data = change_bytes(draw, data)
    return {**whole, file: length + text + data}


def read_by_library(root: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(set(json.loads((root / INDEX).read_text())["weight_map"].values())):
        with safe_open(root / file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (it is no mapping)
    return found


def as_bytes(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def refused_or_right(root: Path, limit: Callable[[int], AbstractContextManager[None]]) -> str:
    """Import a folder; say how it was refused, or make sure that every tensor is what the library reads."""
    out = root.parent / "out"
    try:
        with limit(5):
            run_import(root, out, dry_run=True)
        run_import(root, out, dry_run=False)
    except InputError as error:
        assert error.problems and all(problem.where.startswith(str(root)) for problem in error.problems), error
        assert str(error).replace("\n", "").isprintable()
        assert [path.name for path in root.parent.iterdir()] == ["hf"]
        return "refused"
    wanted, plan, reader = read_by_library(root), plan_import(root), torch_dist.TensorReader(out / "state")
    assert wanted.keys() == {name for rule in plan.rules for name, _ in rule.hf}
    for rule in plan.rules:
        assert as_bytes(reader.read(rule.mcore, rule.shape)) == as_bytes(blocks.to_mcore(rule, wanted)), rule
    shutil.rmtree(out)
    return "accepted"


def test_a_changed_folder_is_refused_or_read_as_the_library_reads_it(
    make_folder: Callable[..., Path], tmp_path: Path, limit: Callable[[int], AbstractContextManager[None]], soak: int | None
) -> None:
    root = make_folder(tmp_path / "hf", SMALL, 2)
    whole = {path.name: path.read_bytes() for path in root.iterdir()}
    assert refused_or_right(root, limit) == "accepted"
    counts: Counter[str] = Counter()

    @settings(max_examples=soak or EXAMPLES, derandomize=soak is None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(files=damaged(whole))
    def run(files: Files) -> None:
        for name, data in files.items():
            (root / name).write_bytes(data)
        outcome = refused_or_right(root, limit)
        counts.update(["all", outcome, *(f"{name} {outcome}" for name in files if files[name] != whole[name])])

    run()
    if soak:
        print(*sorted(counts.items()), sep="\n")
    assert min(counts["accepted"], counts["refused"]) >= counts["all"] // 10, counts  # both halves of the property were tried
