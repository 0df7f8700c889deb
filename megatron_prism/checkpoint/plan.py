"""What a conversion will do, before it does anything: the architecture, its rules, and every tensor's place. All checks are here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prism.checkpoint import folder, integrity
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem, raise_problems
from megatron_prism.data import split_pattern, tokenizer
from megatron_prism.families import dense, names, registry, rope_v4
from megatron_prism.families.rules import Rule, check_present
from megatron_prism.hf import bits, dtypes, files, layout, recognise, safetensors

if TYPE_CHECKING:
    from megatron_prism.checkpoint import torch_dist


@dataclass(frozen=True)
class Plan:
    """What a conversion will do: the architecture, its rules, and the Hugging Face files with every tensor's place.

    rules: with the folder's own names. shards: the files read by an import. kept: the files that an export writes; the same, but where
    tensors were renamed or left out. copies: a tied head that is stored beside its embedding, by name. notes: what the user should know.
    """

    root: Path
    model: ModelConfig
    rules: tuple[Rule, ...]
    shards: tuple[safetensors.Shard, ...]
    kept: tuple[safetensors.Shard, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def places(self) -> dict[str, safetensors.TensorPlace]:
        return {place.name: place for shard in self.shards for place in shard.tensors}

    def summary(self) -> dict[str, Any]:
        """Return the plan's figures for the user."""
        places = self.places.values()
        return {
            "family": self.model.family,
            "parameters": sum(prod(rule.shape) for rule in self.rules),
            "tensors": len(self.places),
            "files": [shard.file for shard in self.shards],
            "bytes": sum(place.end - place.start for place in places),
            "dtypes": sorted({place.dtype.name for place in places}),
        }


def plan_import(root: Path) -> Plan:
    """Read a Hugging Face folder's config and headers, and check them against the family's rules.

    Raises: CheckpointError listing every missing, extra or misshapen tensor, and every config key not understood; or what the folder is, if
    it is no model folder.
    """
    config, where = read_config(root), str(root / "config.json")
    raise_problems([*recognise.adapter_beside(root), *recognise.quantised(root, config)][:1])
    model = registry.of_hf(config, where).read_config(config, where)
    raise_problems(
        [replace(problem, where=f"{where}:{dense.key_of(problem.where, config)}") for problem in check_architecture(model, prefix="")]
    )
    raise_problems(folder.unfit_assets(root))
    on_disk = safetensors.open_shards(root)
    num_tensors = sum(len(shard.tensors) for shard in on_disk)
    if model.num_layers > num_tensors:  # before the rules are made: a config of 10**9 layers would fill the memory
        raise CheckpointError(Problem(f"{where}:num_hidden_layers", str(model.num_layers), f"at most the folder's {num_tensors} tensors"))
    shards, kept, notes = _cleaned(on_disk, model, root)
    places = {place.name: place for shard in shards for place in shard.tensors}
    spelled = names.spelled(registry.rules(model), places, model)
    shapes = {name: place.shape for name, place in places.items() if name not in spelled.copies}
    check_present(spelled.rules, shapes, str(root), {name: places[name].file for name in shapes})
    raise_problems([*check_dtypes(spelled.rules, places, root), *check_vocabulary(root, model.vocab_size)])
    raise_problems(list(_differing_copies(root, on_disk, places, spelled.copies)))
    notes += [fault] if (fault := split_pattern.fault(root)) else []
    notes += [said] if (said := _read_otherwise(config, model, where)) else []
    if left := folder.left_behind(root):
        notes.append(f"left behind, as no file of this model: {_first(left)}")
    return Plan(root, model, spelled.rules, shards, kept, spelled.copies, tuple(notes))


def _read_otherwise(config: Mapping[str, Any], model: ModelConfig, where: str) -> str:
    """Return in words that config.json speaks to transformers 4 of the rotary positions, and tells it something else; empty where not."""
    if model.position_embedding != "rope" or not rope_v4.has_keys(config):
        return ""
    read, problems = rope_v4.read(config, model, where)
    if problems:
        return f"transformers 4 would not load it: {'; '.join(map(str, problems))}"
    fields = [name for name in ("rotary_base", "rope_scaling", "yarn") if getattr(read, name) != getattr(model, name)]
    told = ", ".join(f"{name} {getattr(read, name)} and not {getattr(model, name)}" for name in fields)
    return f"transformers 4, and tools that read config.json as it does, would take {told}" if fields else ""


def _cleaned(
    on_disk: Sequence[safetensors.Shard], model: ModelConfig, root: Path
) -> tuple[tuple[safetensors.Shard, ...], tuple[safetensors.Shard, ...], list[str]]:
    """Return a folder's files with their tensors' plain names, the files as an export will write them, and what changed, in words.

    Raises: CheckpointError for an adapter's tensors, and where two names mean one tensor.
    """
    where = {place.name: root / shard.file for shard in on_disk for place in shard.tensors}
    if adapted := [name for name in where if names.ADAPTER.search(name)]:
        found = f"an adapter's tensor (and {len(adapted) - 1} more)"
        raise CheckpointError(Problem(f"{where[adapted[0]]}: {adapted[0]}", found, "a whole model's", recognise.MERGE))
    dropped = [name for name in where if names.is_dropped(name, model)]
    plain = {name: names.unwrapped(name) for name in where if name not in set(dropped)}
    name_of: dict[str, str] = {}
    twice = [(name, other) for name, short in plain.items() if (other := name_of.setdefault(short, name)) != name]
    raise_problems([Problem(f"{where[name]}: {name}", f"the tensor that {other} is too", "each tensor once") for name, other in twice])
    shards = tuple(
        replace(shard, tensors=tuple(replace(place, name=plain[place.name]) for place in shard.tensors if place.name in plain))
        for shard in on_disk
    )
    kept = tuple(layout.rewritten(shard, plain) for shard, read in zip(on_disk, shards, strict=True) if read.tensors or not shard.tensors)
    notes = []
    if dropped:
        notes.append(f"{len(dropped)} tensors are left out, as transformers leaves them out: {_first(dropped)}")
    if wrapped := [name for name, short in plain.items() if name != short]:
        notes.append(f"{len(wrapped)} tensors lose what their trainer wrapped them in: {wrapped[0]} is {plain[wrapped[0]]}")
    return shards, kept, notes


def _first(texts: Sequence[str], count: int = 3) -> str:
    more = f" and {len(texts) - count} more" if len(texts) > count else ""
    return f"{', '.join(texts[:count])}{more}"


def _differing_copies(
    root: Path, shards: Sequence[safetensors.Shard], places: Mapping[str, safetensors.TensorPlace], copies: Mapping[str, str]
) -> Iterator[Problem]:
    """Yield a problem for a tied head that is stored too, and is not the embedding bit for bit."""
    with safetensors.open_files(root, shards) as opened:
        for head, embedding in copies.items():
            ours, theirs = places[head], places[embedding]
            is_same = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            for first, number in bits.spans(0, prod(ours.shape) if is_same else 0, ours.dtype.itemsize):
                one, other = (safetensors.read_values(opened[place.file], place, first, number) for place in (ours, theirs))
                is_same = is_same and np.array_equal(one, other)
            if not is_same:
                required = f"the same values: config.json ties them (tie_word_embeddings of {embedding})"
                fix = "untie it in config.json (tie_word_embeddings: false), as transformers would"
                yield Problem(f"{root / ours.file}: {head}", f"other values than {embedding}", required, fix)


def check_dtypes(rules: Sequence[Rule], places: Mapping[str, safetensors.TensorPlace], root: Path) -> Iterator[Problem]:
    """Yield a problem for each Megatron-Core tensor whose Hugging Face parts differ in dtype."""
    for rule in rules:
        parts = [places[name] for name, _ in rule.hf]
        if len(found := {part.dtype.name for part in parts}) > 1:
            required = "one dtype for what Megatron-Core holds as one tensor"
            yield Problem(f"{root / parts[0].file}: {parts[0].name}", f"parts of dtypes {sorted(found)}", required)


def read_config(root: Path) -> Mapping[str, Any]:
    """Return a folder's config.json.

    Raises: CheckpointError where it is missing or no JSON object. The message says what the folder is, if it is something else.
    """
    if not os.path.lexists(root / "config.json") and (problem := recognise.no_model(root)):
        raise CheckpointError(problem)
    return files.read_object(root / "config.json", "a Hugging Face model's config, a JSON object")


def check_vocabulary(root: Path, vocab_size: int) -> list[Problem]:
    """Return a problem where a folder's tokenizer has ids that the model's embedding lacks."""
    path = root / tokenizer.FILE
    if path not in root.iterdir():
        return []
    if problem := files.refusal(path, "a tokenizer of the `tokenizers` library"):
        return [problem]
    return tokenizer.check_vocabulary(path, vocab_size)


def plan_export(path: Path, *, check_sums: bool = True) -> tuple[Plan, torch_dist.TensorReader]:
    """Read a Megatron checkpoint's metadata and plan the Hugging Face folder it came from, or a new one.

    check_sums: read all its files against their sums; False where the ranks of a gang share that (sharded.require_whole).

    Raises: CheckpointError naming every tensor that the rules or the checkpoint lack.
    """
    from megatron_prism.checkpoint import torch_dist  # half a second: torch's own checkpoints, of which a folder needs nothing

    checkpoint = folder.read(path)
    if check_sums and (problems := integrity.check(checkpoint.root)):
        raise CheckpointError(problems)
    rules, reader = registry.rules(checkpoint.model), torch_dist.TensorReader(checkpoint.state)
    _check_state(rules, reader.shapes(), checkpoint.state)
    if not checkpoint.assets.is_dir():
        raise CheckpointError(Problem(str(checkpoint.assets), "no such folder", "the files that the checkpoint keeps for Hugging Face"))
    raise_problems(folder.unfit_assets(checkpoint.assets, by_content=False))
    kept = checkpoint.root / folder.SHARDS
    if kept.is_file():
        shards = _kept_shards(kept)
    else:
        dtype = dtypes.BY_NAME[str(checkpoint.facts.get("dtype", "float32"))]
        shards = layout.new_shards({name: shape for rule in rules for name, shape in rule.hf}, dtype)
    shapes = {place.name: place.shape for shard in shards for place in shard.tensors}
    spelled = names.spelled(rules, shapes, checkpoint.model)
    check_present(spelled.rules, {name: shape for name, shape in shapes.items() if name not in spelled.copies}, str(kept))
    return Plan(checkpoint.root, checkpoint.model, spelled.rules, tuple(shards), tuple(shards), spelled.copies), reader


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
    extra = [key for key in found if key not in wanted and not key.startswith(("optimizer.", "reference."))]
    problems += [Problem(f"{where}: {key}", "a model tensor without a rule", "only the tensors of the architecture") for key in extra]
    if problems:
        raise CheckpointError(problems)


def _is_vocabulary(key: str) -> bool:
    return key.startswith(("embedding.word_embeddings.", "output_layer."))
