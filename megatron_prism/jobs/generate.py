"""`prism generate`: continue a text with a Megatron checkpoint on any TP x PP layout, or with plain transformers as its oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_prism.checkpoint import convert, folder
from megatron_prism.core import log
from megatron_prism.core.check.model import check_split
from megatron_prism.core.config import GangConfig, ParallelConfig, Precision
from megatron_prism.core.errors import CheckpointError, InputError, Problem, raise_problems
from megatron_prism.models.generate import Sampling

Emit = Callable[[str], None]


def check(tp: int, pp: int, world_size: int, ckpt: Path) -> None:
    """Check a layout against the gang and the model before anything starts.

    Raises: InputError with every problem.
    """
    problems = check_split(folder.read(ckpt).model, tp, pp, "--tp", "--pp")
    if min(tp, pp) < 1 or tp * pp != world_size:
        problems.insert(0, Problem("--tp, --pp", f"tp {tp} x pp {pp} on {world_size} processes", "as many processes as tp x pp"))
    raise_problems(problems)


def from_checkpoint(ckpt: Path, prompt: str, max_tokens: int, sampling: Sampling, tp: int, pp: int) -> str:
    """Return the continuation of a prompt by a checkpoint (or the latest of a run); every rank of the gang calls this."""
    from megatron_prism.checkpoint import sharded
    from megatron_prism.models import build
    from megatron_prism.models import generate as generation
    from megatron_prism.parallel.groups import gang

    checkpoint = folder.read(ckpt)
    tokenizer = _Text(checkpoint.assets)
    ids = tokenizer.encode(prompt)
    if len(ids) + max_tokens > (longest := checkpoint.model.max_position_embeddings):
        log.get().warning("%d tokens and %d more: the model was made for %d positions", len(ids), max_tokens, longest)
    precision: Precision = "bf16" if checkpoint.facts.get("dtype") == "bfloat16" else "fp32"
    config = GangConfig(parallel=ParallelConfig(tp=tp, pp=pp), precision=precision, seed=sampling.seed)
    with gang(config) as groups:
        chunks = build.build(checkpoint.model, groups, config)
        sharded.require_whole(checkpoint.root)
        sharded.load_weights(checkpoint.root, chunks)
        tokens = list(generation.generate(chunks[0], ids, max_tokens, tokenizer.eos_ids, sampling, groups))
    return tokenizer.continuation(ids, tokens)


def from_hf(root: Path, prompt: str, max_tokens: int, sampling: Sampling) -> str:
    """Return the continuation of a prompt by plain transformers: what a converted checkpoint must agree with."""
    import torch

    from megatron_prism.checkpoint import reference

    tokenizer = _Text(root)
    ids = tokenizer.encode(prompt)
    torch.manual_seed(sampling.seed)
    model = reference.load(root)
    choice = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {"do_sample": False}
    )
    eos = {"eos_token_id": list(tokenizer.eos_ids)} if tokenizer.eos_ids else {}
    output = model.generate(torch.tensor([ids]), max_new_tokens=max_tokens, pad_token_id=0, **choice, **eos)
    return tokenizer.continuation(ids, [token for token in output[0, len(ids) :].tolist() if token not in tokenizer.eos_ids])


class _Text:
    """A Hugging Face folder's tokenizer, with what its config says of begin and end of text."""

    def __init__(self, root: Path):
        from tokenizers import Tokenizer

        path = root / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(Problem(str(path), "no such file", "a tokenizer of the `tokenizers` library"))
        self._tokenizer = Tokenizer.from_file(str(path))
        config = convert.read_config(root)
        eos = config.get("eos_token_id")
        self.eos_ids: Sequence[int] = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self._bos = config.get("bos_token_id")

    def encode(self, prompt: str) -> list[int]:
        """Return a prompt's ids; an empty prompt is the begin-of-text token alone."""
        ids = self._tokenizer.encode(prompt).ids if prompt else []
        if not ids and self._bos is not None:
            ids = [self._bos]
        if not ids:
            raise InputError(Problem("--prompt", "an empty prompt", "some text, since the model names no begin-of-text token"))
        return ids

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Return the text of the tokens after the prompt, as it reads behind it (spaces and split characters included)."""
        before = self._tokenizer.decode(list(prompt))
        return self._tokenizer.decode([*prompt, *tokens])[len(before) :]
