"""What one pipeline rank holds: its layers and its parameters. The planner's unit, for memory and for time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_prism.core.config import ModelConfig, TrainConfig

# the matrix products that Transformer Engine can do in FP8, by their parameter's name in a checkpoint
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
    """One pipeline rank, of one tensor-parallel rank: its layers' letters (M, *, -), and how many parameters it holds and trains.

    matrices are those that its layers multiply with, fp8 those of them in FP8; embedding and output layer are in neither.
    """

    letters: str
    is_first: bool
    is_last: bool
    parameters: int
    trainable: int
    matrices: int
    trainable_matrices: int
    fp8: int


def of_sizes(sizes: Mapping[str, int], letters: str, is_first: bool, is_last: bool, config: TrainConfig) -> Stage:
    """Return the stage that holds parameters of these sizes, by name as in a checkpoint."""
    trainable = [name for name in sizes if _matches(name, config.trainable)]
    matrices = [name for name in sizes if _matches(name, FP8_WEIGHTS)]
    return Stage(
        letters=letters,
        is_first=is_first,
        is_last=is_last,
        parameters=sum(sizes.values()),
        trainable=sum(sizes[name] for name in trainable),
        matrices=sum(sizes[name] for name in matrices),
        trainable_matrices=sum(sizes[name] for name in set(matrices) & set(trainable)),
        fp8=sum(sizes[name] for name in matrices) if config.fp8 is not None else 0,
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def letters_of(model: ModelConfig, layers: Sequence[int]) -> str:
    """Return the letters of some of a model's layers: a dense layer is two, attention and MLP."""
    return "".join("*-" if model.layer_pattern is None else model.layer_pattern[layer] for layer in sorted(layers))
