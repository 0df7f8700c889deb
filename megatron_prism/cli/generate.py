"""Text from a model: `prism generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import Json, a_path, finish
from megatron_prism.core.errors import InputError, Problem


def generate(
    prompt: Annotated[str, typer.Option(help="The text to continue; empty: from the begin-of-text token.")],
    ckpt: Annotated[Path | None, typer.Option(help="A checkpoint, or a run folder (its latest).", callback=a_path)] = None,
    hf: Annotated[Path | None, typer.Option(help="A Hugging Face folder, run by plain transformers.", callback=a_path)] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature. Without it: 1.", min=0.01)] = None,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens of this probability.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.", min=1)] = 1,
    json: Json = None,
) -> None:
    """Continue a text. Standard output holds only the continuation.

    Example: prism generate --ckpt ckpt/llama --prompt "Once upon a time" --max-tokens 100 --greedy
    """
    if (ckpt is None) == (hf is None):
        raise InputError(Problem("--ckpt, --hf", "both or neither", "one of them"))
    if greedy and temperature is not None:
        raise InputError(Problem("--greedy, --temperature", "both", "one of them, or neither"))
    from megatron_prism.generate.engine import Sampling
    from megatron_prism.jobs import generate as job

    sampling = Sampling(max_tokens=max_tokens, temperature=0.0 if greedy else temperature or 1.0, top_p=top_p)
    if hf is not None:
        text = job.from_hf(hf, prompt, sampling, seed)
    else:
        assert ckpt is not None
        world_size = gang.world_size(tp * pp)
        job.check(tp, pp, world_size, ckpt)
        gang.become(world_size)
        text = job.from_checkpoint(ckpt, prompt, sampling, seed, tp, pp)
    if gang.speaks():
        typer.echo(text)
        finish({"prompt": prompt, "continuation": text}, json, quiet=True)
