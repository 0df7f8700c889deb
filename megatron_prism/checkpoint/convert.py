"""Hugging Face folder to Megatron checkpoint and back: one plan, applied in either direction, a piece of a tensor at a time.

The checkpoint keeps the folder's other files and its safetensors headers as they stand, so an export has the same
files with the same tensors, order and dtypes; without training in between, the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prism.checkpoint import folder, integrity, torch_dist
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem, raise_problems
from megatron_prism.core.manifest import describe, sha256_file, sha256_files, write_json
from megatron_prism.data import tokenizer
from megatron_prism.families import blocks, registry
from megatron_prism.families.rules import Rule, check_present
from megatron_prism.hf import bits, safetensors
from megatron_prism.hf.finite import first_nonfinite

Tick = Callable[[], None]  # called after each tensor, for a progress bar


@dataclass(frozen=True)
class Plan:
    """What a conversion will do: the architecture, its rules, and the Hugging Face files with every tensor's place."""

    root: Path
    model: ModelConfig
    rules: tuple[Rule, ...]
    shards: tuple[safetensors.Shard, ...]

    @cached_property
    def places(self) -> dict[str, safetensors.TensorPlace]:
        return {place.name: place for shard in self.shards for place in shard.tensors}

    def summary(self) -> dict[str, Any]:
        """Return the plan's figures for the user."""
        places = self.places.values()
        return {
            "family": self.model.family,
            "parameters": sum(_numel(rule.shape) for rule in self.rules),
            "tensors": len(self.places),
            "files": [shard.file for shard in self.shards],
            "bytes": sum(place.end - place.start for place in places),
            "dtypes": sorted({str(place.dtype).removeprefix("torch.") for place in places}),
        }


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def plan_import(root: Path) -> Plan:
    """Read a Hugging Face folder's config and headers, and check them against the family's rules.

    Raises: CheckpointError listing every missing, extra or misshapen tensor, and every config key not understood.
    """
    config = read_config(root)
    model = registry.of_hf(config, str(root / "config.json")).read_config(config, str(root / "config.json"))
    raise_problems(check_architecture(model, f"{root / 'config.json'}:"))
    _refuse_links(root)
    shards = safetensors.open_shards(root)
    places = {place.name: place for shard in shards for place in shard.tensors}
    if model.num_layers > len(places):  # before the rules are made: a config of 10**9 layers would fill the memory
        raise CheckpointError(
            Problem(f"{root / 'config.json'}:num_hidden_layers", str(model.num_layers), f"at most the folder's {len(places)} tensors")
        )
    rules = registry.rules(model)
    check_present(
        rules, {name: place.shape for name, place in places.items()}, str(root), {name: place.file for name, place in places.items()}
    )
    raise_problems([*check_dtypes(rules, places, root), *check_vocabulary(root, model.vocab_size)])
    return Plan(root, model, tuple(rules), tuple(shards))


def _refuse_links(root: Path) -> None:
    """Raise InputError for each link that leads out of a folder: the file that it names would be copied."""
    links = [path for path in sorted(root.iterdir()) if path.is_file() and not safetensors.is_inside(path)]
    raise_problems(
        [Problem(str(path), "a link out of the folder", "a file of the folder", "copy it there, or remove the link") for path in links]
    )


def check_dtypes(rules: Sequence[Rule], places: Mapping[str, safetensors.TensorPlace], root: Path) -> Iterator[Problem]:
    """Yield a problem for each Megatron-Core tensor whose Hugging Face parts differ in dtype."""
    for rule in rules:
        parts = [places[name] for name, _ in rule.hf]
        if len(dtypes := {str(part.dtype) for part in parts}) > 1:
            required = "one dtype for what Megatron-Core holds as one tensor"
            yield Problem(f"{root / parts[0].file}: {parts[0].name}", f"parts of dtypes {sorted(dtypes)}", required)


def read_config(root: Path) -> Mapping[str, Any]:
    """Return a folder's config.json.

    Raises: CheckpointError where it is missing or no JSON object.
    """
    return safetensors.read_object(root / "config.json", "a Hugging Face model's config, a JSON object")


def check_vocabulary(root: Path, vocab_size: int) -> list[Problem]:
    """Return a problem where a folder's tokenizer has ids that the model's embedding lacks."""
    path = root / tokenizer.FILE
    if path not in root.iterdir():
        return []
    if fault := safetensors.fault(path):
        return [Problem(str(path), fault, "a tokenizer of the `tokenizers` library")]
    return tokenizer.check_vocabulary(path, vocab_size)


def import_hf(plan: Plan, out: Path, tick: Tick = lambda: None) -> None:
    """Write a plan's folder as a Megatron checkpoint. Memory holds a piece of a tensor at a time.

    Raises: InputError where `out` exists; CheckpointError naming every tensor with a value that is not finite.
    Nothing stays behind on an error.
    """
    rules = {rule.mcore: rule for rule in plan.rules}
    specs = {key: torch_dist.TensorSpec(key, rule.shape, plan.places[rule.hf[0][0]].dtype) for key, rule in rules.items()}
    with ExitStack() as stack:
        temporary = stack.enter_context(folder.create(out))
        pool = ThreadPoolExecutor(1)
        stack.callback(pool.shutdown, cancel_futures=True)
        digests = {plan.root / shard.file: pool.submit(sha256_file, plan.root / shard.file) for shard in plan.shards}
        files = stack.enter_context(safetensors.open_files(plan.root, plan.shards))

        def values(key: str) -> Iterator[bits.Bits]:
            tick()
            for part, start, rows in blocks.blocks(rules[key]):
                place = plan.places[rules[key].hf[part][0]]
                for piece in _finite_rows(plan, files, place, start, rows):
                    yield bits.convert(piece, place.dtype, specs[key].dtype)

        (temporary / folder.STATE).mkdir()
        torch_dist.write_tensors(temporary / folder.STATE, list(specs.values()), values)
        assets = folder.copy_assets(plan.root, temporary / folder.ASSETS)
        write_json(temporary / folder.SHARDS, [{"file": shard.file, "header": shard.header} for shard in plan.shards])
        manifest = describe("import", sha256_files(assets), source=str(plan.root), **plan.summary())
        manifest["inputs"] |= {str(path): digest.result() for path, digest in digests.items()}
        folder.write_meta(temporary, folder.describe(plan.model, 0, 0, dtype=plan.summary()["dtypes"][0], manifest=manifest))
        integrity.seal(temporary)


def _finite_rows(plan: Plan, files: Mapping[str, FileIO], place: safetensors.TensorPlace, start: int, rows: int) -> Iterator[bits.Bits]:
    """Yield the values of rows [start, start + rows) of a Hugging Face tensor, in pieces."""
    width = prod(place.shape[1:])
    for first, number in bits.spans(start * width, rows * width, place.dtype.itemsize):
        piece = safetensors.read_values(files[place.file], place, first, number)
        if first_nonfinite(piece, place.dtype) is not None:
            raise CheckpointError(_nonfinite(plan, files))
        yield piece


def _nonfinite(plan: Plan, files: Mapping[str, FileIO]) -> list[Problem]:
    """Return a problem for each tensor of a folder that holds a NaN or an inf."""
    problems = []
    for place in plan.places.values():
        for first, number in bits.spans(0, prod(place.shape), place.dtype.itemsize):
            piece = safetensors.read_values(files[place.file], place, first, number)
            if (index := first_nonfinite(piece, place.dtype)) is not None:
                position = [int(axis) for axis in np.unravel_index(first + index, place.shape)]
                found = f"{float(bits.to_tensor(piece, place.dtype)[index])} at {position}"
                problems.append(
                    Problem(f"{plan.root / place.file}: {place.name}", found, "finite weights", "fetch the file again, or mend the model")
                )
                break
    return problems


def plan_export(path: Path) -> tuple[Plan, torch_dist.TensorReader]:
    """Read a Megatron checkpoint's metadata and plan the Hugging Face folder it came from, or a new one.

    Raises: CheckpointError naming every tensor that the rules or the checkpoint lack.
    """
    checkpoint = folder.read(path)
    if problems := integrity.check(checkpoint.root):
        raise CheckpointError(problems)
    rules, reader = registry.rules(checkpoint.model), torch_dist.TensorReader(checkpoint.state)
    _check_state(rules, reader.shapes(), checkpoint.state)
    if not checkpoint.assets.is_dir():
        raise CheckpointError(Problem(str(checkpoint.assets), "no such folder", "the files that the checkpoint keeps for Hugging Face"))
    _refuse_links(checkpoint.assets)
    kept = checkpoint.root / folder.SHARDS
    if kept.is_file():
        shards = _kept_shards(kept)
    else:
        dtype = getattr(torch, str(checkpoint.facts.get("dtype", "float32")))
        shards = safetensors.new_shards({name: shape for rule in rules for name, shape in rule.hf}, dtype)
    check_present(rules, {place.name: place.shape for shard in shards for place in shard.tensors}, str(kept))
    return Plan(checkpoint.root, checkpoint.model, tuple(rules), tuple(shards)), reader


def _kept_shards(path: Path) -> list[safetensors.Shard]:
    try:
        return [_kept_shard(entry, path) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            Problem(str(path), f"{type(error).__name__}: {error}", "the file names and headers of `prism convert import`")
        ) from None


def _kept_shard(entry: Mapping[str, str], where: Path) -> safetensors.Shard:
    if not safetensors.is_file_name(entry["file"]):
        raise ValueError(f"file {entry['file']!r} is no plain name of a safetensors file")
    header, entries = entry["header"], json.loads(entry["header"])
    entries.pop("__metadata__", None)
    return safetensors.Shard(
        entry["file"], header, safetensors.parse_entries(entries, where.with_name(entry["file"]), 8 + len(header.encode()))
    )


def _check_state(rules: Sequence[Rule], found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Every rule's tensor must be there (its vocabulary may be padded), and every model tensor must have a rule."""
    wanted = {rule.mcore: rule.shape for rule in rules}
    problems = [Problem(f"{where}: {key}", "no such tensor", f"shape {list(shape)}") for key, shape in wanted.items() if key not in found]
    for key, shape in wanted.items():
        padded = found.get(key, shape)
        if padded[1:] != shape[1:] or padded[0] < shape[0] or (padded[0] > shape[0] and not _is_vocabulary(key)):
            problems.append(Problem(f"{where}: {key}", f"shape {list(padded)}", f"shape {list(shape)}"))
    extra = [key for key in found if key not in wanted and not key.startswith("optimizer.")]
    problems += [Problem(f"{where}: {key}", "a model tensor without a rule", "only the tensors of the architecture") for key in extra]
    if problems:
        raise CheckpointError(problems)


def _is_vocabulary(key: str) -> bool:
    return key.startswith(("embedding.word_embeddings.", "output_layer."))


def export_hf(plan: Plan, reader: torch_dist.TensorReader, out: Path, tick: Tick = lambda: None) -> None:
    """Write a plan's checkpoint as a Hugging Face folder. Memory holds a piece of a tensor at a time.

    Raises: InputError where `out` exists; nothing stays behind on an error.
    """
    with folder.create(out) as temporary:
        for path in sorted((plan.root / folder.ASSETS).iterdir()):
            shutil.copyfile(path, temporary / path.name)
        with safetensors.create_shards(temporary, plan.shards) as files:
            for rule in plan.rules:
                _export_rule(plan, reader, files, rule)
                tick()
        if len(plan.shards) > 1 and not (temporary / safetensors.INDEX).is_file():
            write_json(temporary / safetensors.INDEX, safetensors.index_of(plan.shards))


def _export_rule(plan: Plan, reader: torch_dist.TensorReader, files: Mapping[str, FileIO], rule: Rule) -> None:
    top = 0  # the block's first row in the Megatron-Core tensor
    with reader.open(rule.mcore) as stored:
        for part, start, rows in blocks.blocks(rule):
            place = plan.places[rule.hf[part][0]]
            width = prod(place.shape[1:])
            for first, number in bits.spans(0, rows, width * stored.dtype.itemsize):
                piece = bits.convert(stored.rows(top + first, number), stored.dtype, place.dtype)
                safetensors.write_values(files[place.file], place, (start + first) * width, piece)
            top += rows
