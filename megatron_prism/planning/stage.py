"""The layers and parameters of one pipeline rank. This is the planner's unit for memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_prism.core.config import GangConfig, ModelConfig, RunConfig

# the matrix products that Transformer Engine can do in FP8, by the parameter's checkpoint name
FP8_WEIGHTS = (
    "*.linear_qkv.weight",
    "*.linear_proj.weight",
    "*.linear_fc1.weight",
    "*.linear_fc2.weight",
    "*.in_proj.weight",
    "*.out_proj.weight",
)


@dataclass(frozen=True)
class Stage:
    """One pipeline rank, on one tensor-parallel rank: its layers' letters (M, *, -), and how many parameters it holds and trains.

    matrices: the parameters of its layers' matrices. fp8: those of them in FP8. Neither counts the embedding and the output layer.
    """

    letters: str
    is_first: bool
    is_last: bool
    parameters: int
    trainable: int
    matrices: int
    trainable_matrices: int
    fp8: int


def of_sizes(sizes: Mapping[str, int], letters: str, is_first: bool, is_last: bool, gang: GangConfig) -> Stage:
    """Return the stage that holds parameters of these sizes (by checkpoint name). What is no training run trains none."""
    patterns = gang.trainable if isinstance(gang, RunConfig) else ()
    trainable = [name for name in sizes if _matches(name, patterns)]
    matrices = [name for name in sizes if _matches(name, FP8_WEIGHTS)]
    return Stage(
        letters=letters,
        is_first=is_first,
        is_last=is_last,
        parameters=sum(sizes.values()),
        trainable=sum(sizes[name] for name in trainable),
        matrices=sum(sizes[name] for name in matrices),
        trainable_matrices=sum(sizes[name] for name in set(matrices) & set(trainable)),
        fp8=sum(sizes[name] for name in matrices) if gang.fp8 is not None else 0,
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def letters_of(model: ModelConfig, layers: Sequence[int]) -> str:
    """Return the letters of some of a model's layers. A dense layer has two: attention and MLP."""
    return "".join("*-" if model.layer_pattern is None else model.layer_pattern[layer] for layer in sorted(layers))
