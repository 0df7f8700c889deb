"""Ways to damage a Hugging Face folder, one function each: a change to bytes, a header, an entry, the tensors, the index, the config."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINGLE, INDEX, CONFIG, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"
LAYER = "model.layers.0"
QUERY, OUT, GATE = (f"{LAYER}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"))
DEEP = b"[" * 100_000
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Damage = Callable[[Path], object]
Header = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A kind of malformed folder: what every message names, and the damages, each done to a folder of its own.

    A damage that returns a text wants it named too.
    """

    name: str
    named: tuple[str, ...]
    damages: tuple[Damage, ...]


def case(name: str, named: str, *damages: Damage) -> Case:
    return Case(name, tuple(named.split(" & ")), damages)


def data(file: str, change: Callable[[bytes], bytes]) -> Damage:
    """Return a change to a file's bytes."""
    return lambda root: (root / file).write_bytes(change((root / file).read_bytes()))


def header(change: Callable[[Header], object], extra: bytes = b"") -> Damage:
    """Return a change to the first shard's header: of it in place, or its new text; `extra` goes to the end of the data."""

    def damage(root: Path) -> None:
        raw = (root / FIRST).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8:end])
        changed = change(found)
        text = changed if isinstance(changed, bytes) else json.dumps(found).encode()
        (root / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:] + extra)

    return damage


def entry(name: str, **changes: Any) -> Damage:
    """Return a change to one tensor's entry in the first shard's header; a value of None removes its key."""
    return header(lambda found: found.update({name: {key: value for key, value in (found[name] | changes).items() if value is not None}}))


def offsets(name: str, change: Callable[[int, int], list[Any]]) -> Damage:
    return header(lambda found: found[name].update(data_offsets=change(*found[name]["data_offsets"])))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Return a change to the first shard's tensors, written by the safetensors library, the index kept in step."""

    def damage(root: Path) -> None:
        found = load_file(root / FIRST)
        change(found)
        save_file(found, root / FIRST)
        listed = json.loads((root / INDEX).read_text())["weight_map"]
        others = {name: file for name, file in listed.items() if file != FIRST}
        (root / INDEX).write_text(json.dumps({"weight_map": others | dict.fromkeys(found, FIRST)}))

    return damage


def spoiled(value: float, dtype: torch.dtype, position: int) -> Damage:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[OUT] = found[OUT].to(dtype)
        found[OUT].view(-1)[position] = value

    return tensors(change)


def listed(**changes: Any) -> Damage:
    """Return a change to the index's weight_map, key by key; a value of None removes its key."""
    keys = {"query": QUERY, "extra": "x"}

    def damage(root: Path) -> None:
        found = json.loads((root / INDEX).read_text())["weight_map"] | {keys[key]: value for key, value in changes.items()}
        (root / INDEX).write_text(json.dumps({"weight_map": {name: file for name, file in found.items() if file is not None}}))

    return damage


def settings(file: str = CONFIG, **changes: Any) -> Damage:
    """Return a change to config.json, or to another JSON file."""
    return lambda root: (root / file).write_text(json.dumps(json.loads((root / file).read_text()) | changes))


def single_too(root: Path) -> None:
    """Write the weights as a single file as well, beside the index."""
    save_file(load_file(root / FIRST) | load_file(root / SECOND), root / SINGLE)


def moved_out(file: str) -> Damage:
    """Return a damage that leaves a link where a file was."""

    def damage(root: Path) -> str:
        (root / file).rename(root.parent / "outside")
        (root / file).symlink_to(root.parent / "outside")
        return f"{root / file}: found"

    return damage


def replaced(file: str, make: Callable[[Path], object]) -> Damage:
    """Return a damage that puts something else where a file was."""

    def damage(root: Path) -> str:
        (root / file).unlink()
        make(root / file)
        return f"{root / file}: found"

    return damage


def pickles_only(root: Path) -> None:
    """Leave the weights as a pickle that writes a file `ran` when it is loaded."""
    for file in (FIRST, SECOND, INDEX):
        (root / file).unlink()
    (root / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(root)))


class Bomb:
    """Writes a file beside the folder when it is unpickled."""

    def __init__(self, root: Path):
        self.root = root

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.root.parent / "ran", "")


def custom_code(architecture: str) -> Damage:
    """Return a damage that brings modelling code, which writes a file `ran` when it is imported."""

    def damage(root: Path) -> None:
        (root / "modeling_custom.py").write_text(f"open({str(root.parent / 'ran')!r}, 'w')\n")
        auto_map = {"AutoConfig": "modeling_custom.Config", "AutoModelForCausalLM": "modeling_custom.Model"}
        settings(architectures=[architecture], auto_map=auto_map, trust_remote_code=True)(root)

    return damage


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.update({new: found.pop(old)})


def swapped(text: bytes) -> Callable[[Header], bytes]:
    return lambda found: text


def twice(found: Header) -> bytes:
    return json.dumps(found).encode().replace(b"{", b'{"%s": %s, ' % (QUERY.encode(), json.dumps(found[QUERY]).encode()), 1)


def twice_in_a_crowd(found: Header) -> bytes:
    return b"{" + b"".join(b'"%d": 0, ' % number for number in range(100_000)) + twice(found)[1:]
