"""Where a run starts, resolved once: from its own checkpoints, from another checkpoint, or from the seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from megatron_prism.checkpoint import folder, run_folder
from megatron_prism.core.check.train import check_extension, check_origin
from megatron_prism.core.config import InitConfig, ModelConfig, RunConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import flat
from megatron_prism.data import tokenizer
from megatron_prism.data.mixture import Prepared

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    model: the architecture. assets: the folder with the tokenizer and the other Hugging Face files.
    weights: the folder of the checkpoint that the run begins from; None where it begins from the seed, or resumes. `init.checkpoint` may name
    another run: which of its checkpoints is the newest is asked once, here.
    tokens: what the weights were trained on before this run. dtype: of an export.
    step: of the run's newest checkpoint, whole or not; 0 where the run has none.
    """

    model: ModelConfig
    assets: Path
    weights: Path | None
    tokens: int
    dtype: str
    step: int

    @property
    def is_resumed(self) -> bool:
        """Say whether the run resumes from a checkpoint of its own."""
        return self.step > 0


def resolve(config: RunConfig) -> Start:
    """Return where a run starts. A run that resumes reads its own folder alone: `init.checkpoint` may be gone by then.

    Raises: InputError where `init.checkpoint` is no checkpoint, or not the one that the config describes.
    """
    if step := run_folder.last_step(config.run_dir):
        origin = run_folder.origin(config.run_dir)
        return Start(origin.model, origin.assets, None, origin.tokens, origin.facts["dtype"], step)
    raise_problems(list(check_origin(config)))
    if config.init.checkpoint is None:
        assert config.model is not None and config.init.tokenizer is not None  # check_origin
        dtype = "bfloat16" if config.precision == "bf16" else "float32"
        return Start(config.model, config.init.tokenizer, None, 0, dtype, 0)
    checkpoint = _read_checkpoint(config.init.checkpoint)
    raise_problems(_check_expected(config.init, config.model, checkpoint.model))
    model = config.init.extend(checkpoint.model)
    return Start(model, checkpoint.assets, checkpoint.root, checkpoint.tokens, checkpoint.facts.get("dtype", "float32"), 0)


def attempt(read: Callable[[], T], key: str = "") -> tuple[T | None, list[Problem]]:
    """Return what `read` returns, and no problems; or None and the problems it raises, placed under the key that named the input.

    A problem that names a key of the same section (data.weights beside data.prepared) stays where it is.
    """
    section = key[: key.find(".") + 1]
    try:
        return read(), []
    except InputError as error:
        return None, [
            problem if problem.where.startswith(section) else replace(problem, where=f"{key} {problem.where}") for problem in error.problems
        ]


def _read_checkpoint(path: Path) -> folder.Checkpoint:
    checkpoint, problems = attempt(lambda: folder.read(path), "init.checkpoint")
    raise_problems(problems)
    assert checkpoint is not None
    return checkpoint


def _check_expected(init: InitConfig, expected: ModelConfig | None, actual: ModelConfig) -> list[Problem]:
    """The checkpoint must be of the architecture that stands in `model`, where one does, and such that it can be extended as asked."""
    if problems := list(check_extension(init, actual)):
        return problems
    if expected is None:
        return []
    said, is_so = flat(expected), flat(actual)
    fix = "the checkpoint is the truth: correct model.* or leave it out; or is it another checkpoint?"
    keys = [key for key in dict.fromkeys((*said, *is_so)) if said.get(key) != is_so.get(key)]
    return [Problem(f"model.{key}", str(said.get(key)), f"{is_so.get(key)}, as in {init.checkpoint}", fix) for key in keys]


def check_tokenizer(config: RunConfig, start: Start, mixtures: Sequence[Prepared]) -> list[Problem]:
    """The data's ids must be rows of the embedding, and made by the tokenizer that the model is written back with."""
    path = start.assets / tokenizer.FILE
    absent_as_imported = config.init.checkpoint is not None and not path.is_file()
    sha256 = None if absent_as_imported else tokenizer.load(start.assets).sha256
    problems = []
    for prepared in mixtures:
        where, is_same = str(prepared.root), sha256 == prepared.tokenizer_sha256
        if prepared.vocab_size > start.model.vocab_size and is_same:
            problems += tokenizer.check_vocabulary(path, start.model.vocab_size)
        elif prepared.vocab_size > start.model.vocab_size:
            ids = f"data of a tokenizer with {prepared.vocab_size} ids"
            fix = "prepare it with the model's tokenizer"
            problems.append(Problem(where, ids, f"at most the model's vocab_size {start.model.vocab_size}", fix))
        elif not absent_as_imported and not is_same:
            required = f"the one in {start.assets}"
            problems.append(Problem(where, "data tokenized by another tokenizer", required, "prepare it again with that tokenizer"))
    return list(dict.fromkeys(problems))
