"""How a family describes its weights: one rule per Megatron-Core tensor, used in both directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from megatron_prism.core.errors import CheckpointError, Problem

Shape = tuple[int, ...]
Op = Literal["copy", "rows", "qkv", "slice"]
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # the keys in config.json, by family
NO_EXPERTS = "mixtures of experts are not supported: docs/ADD_A_MODEL.md says what they would take"


@dataclass(frozen=True)
class Rule:
    """One Megatron-Core tensor and the Hugging Face tensors that make it up.

    mcore: its key in a torch_dist checkpoint (the same under the local and the TE layer spec).
    hf: (on-disk name, shape) of each part, in order.
    op: copy, the same tensor. rows: the parts concatenated along rows. qkv: per query group [its queries | key | value]
    (megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors). slice: rows [start, stop) of the single part.
    rows: [start, stop) of a slice.
    num_groups: the number of query groups of a qkv.
    """

    mcore: str
    op: Op
    hf: tuple[tuple[str, Shape], ...]
    rows: tuple[int, int] | None = None
    num_groups: int = 1

    @property
    def shape(self) -> Shape:
        """The Megatron-Core tensor's shape: its parts' rows together."""
        first = self.hf[0][1]
        if self.rows is not None:
            return (self.rows[1] - self.rows[0], *first[1:])
        return first if self.op == "copy" else (sum(shape[0] for _, shape in self.hf), *first[1:])

    @property
    def parameter(self) -> str:
        """The model's parameter that this tensor is, or is a piece of."""
        return self.mcore if self.rows is None else self.mcore.rpartition(".")[0]


def slices(mcore: str, name: str, shape: Shape, sizes: Mapping[str, int]) -> list[Rule]:
    """Return the rules of an HF tensor that Megatron-Core stores in pieces. sizes: the rows of each piece `mcore.KEY`, in order."""
    pieces, start = [], 0
    for key, rows in sizes.items():
        pieces.append(Rule(f"{mcore}.{key}", "slice", ((name, shape),), (start, start + rows)))
        start += rows
    return pieces


def check_names(rules: Sequence[Rule]) -> None:
    """Check that exactly one rule names each tensor on either side, and that slices cover every row of a sliced tensor."""
    sliced = [rule for rule in rules if rule.rows is not None]
    whole = {rule.hf[0] for rule in sliced}
    hf = [name for rule in rules if rule.rows is None for name, _ in rule.hf] + [name for name, _ in whole]
    for side, names in (("mcore", [rule.mcore for rule in rules]), ("hf", hf)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        assert not twice, f"{side} tensors named by more than one rule: {twice}"
    for name, shape in whole:
        ends = [rule.rows for rule in sliced if rule.hf[0][0] == name]
        starts, stops = zip(*ends, strict=True)
        assert (*starts, shape[0]) == (0, *stops), f"rows of {name} named by none or more than one rule: {ends}"


def check_present(rules: Sequence[Rule], present: Mapping[str, Shape], where: str, files: Mapping[str, str] = MappingProxyType({})) -> None:
    """Check a folder's tensors against the rules. `files` names the file of each tensor in the folder `where`.

    Raises: CheckpointError naming every tensor that is missing, extra or of another shape.
    """
    wanted = {name: shape for rule in rules for name, shape in rule.hf}
    at = {name: f"{where}/{files[name]}: {name}" if name in files else f"{where}: {name}" for name in present}
    problems = [Problem(f"{where}: {name}", "no such tensor", f"shape {list(wanted[name])}") for name in wanted if name not in present]
    problems += [
        Problem(at[name], f"shape {list(present[name])}", f"shape {list(shape)}, from config.json")
        for name, shape in wanted.items()
        if name in present and tuple(present[name]) != shape
    ]
    problems += [Problem(at[name], "an extra tensor", "no tensor but those of the architecture") for name in present if name not in wanted]
    if problems:
        raise CheckpointError(problems)


def require(hf: Mapping[str, Any], key: str, accepted: Iterable[Any], where: str, default: Any) -> list[Problem]:
    """Return a problem where a config.json key holds a value that this family does not support."""
    value, accepted = hf.get(key, default), list(accepted)
    if value in accepted:
        return []
    return [Problem(f"{where}:{key}", repr(value), " or ".join(map(repr, accepted)), "this variant of the family is not supported")]


def check_padding(hf: Mapping[str, Any], where: str) -> list[Problem]:
    """Return a problem where the padding token has no row in the embedding: transformers does not build such a model."""
    padding, size = hf.get("pad_token_id"), hf.get("vocab_size")
    if type(padding) is not int or type(size) is not int or padding < size:
        return []
    fix = "set it to null or to an id of the vocabulary, or resize the model's embedding (transformers' resize_token_embeddings)"
    return [Problem(f"{where}:pad_token_id", str(padding), f"an id below vocab_size {size}: transformers refuses others", fix)]


def check_experts(hf: Mapping[str, Any], where: str) -> list[Problem]:
    """Return a problem for each config.json key that says the model has experts."""
    counted = [key for key in NUM_EXPERTS if hf.get(key) not in (None, 0)]
    return [Problem(f"{where}:{key}", repr(hf[key]), "no experts: 0, or no such key", NO_EXPERTS) for key in counted]
