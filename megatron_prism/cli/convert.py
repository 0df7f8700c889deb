"""Between Hugging Face folders and Megatron checkpoints: `prism convert import`, `export`, `verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_prism.cli import gang
from megatron_prism.cli.options import Ckpt, DryRun, Hf, Json, Out, finish
from megatron_prism.core.errors import InputError, Problem, ResultFailure

app = typer.Typer(
    no_args_is_help=True,
    help="Convert between Hugging Face folders and Megatron checkpoints.",
    epilog="Example: prism convert import --hf Llama-3.1-8B --out ckpt/llama",
)


@app.command("import")
def convert_import(hf: Hf, out: Out, dry_run: DryRun = False, json: Json = None) -> None:
    """Write a Hugging Face folder as a Megatron checkpoint, readable at any TP and PP.

    Example: prism convert import --hf Llama-3.1-8B --out ckpt/llama
    """
    from megatron_prism.jobs import convert as job

    finish(job.run_import(hf, out, dry_run), json)


@app.command("export")
def convert_export(
    ckpt: Ckpt,
    out: Out,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Write a Megatron checkpoint as a Hugging Face folder: same files and dtypes as it came from.

    Example: prism convert export --ckpt runs/mid --out Llama-3.1-8B-mid
    """
    from megatron_prism.jobs import convert as job

    finish(job.run_export(ckpt, out, dry_run), json)


@app.command("verify")
def convert_verify(
    hf: Hf,
    ckpt: Ckpt,
    tokens: Annotated[int, typer.Option(help="Compare on this many tokens.", min=2)] = 64,
    precision: Annotated[str, typer.Option(help="fp32 or bf16: what both models compute in.")] = "fp32",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference allowed, as a share of the largest logit (fp32: 1e-4, bf16: 5e-2).", min=0.0)
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random ids, where the folder has no tokenizer.")] = 0,
    json: Json = None,
) -> None:
    """Compare a checkpoint's logits with those of transformers; exit code 1 where they differ.

    Example: prism convert verify --hf Llama-3.1-8B --ckpt ckpt/llama
    """
    if precision not in ("fp32", "bf16"):
        raise InputError(Problem("--precision", repr(precision), "fp32 or bf16"))
    from megatron_prism.jobs import convert as job

    world_size = gang.world_size(tp * pp)
    job.check_verify(hf, ckpt, tp, pp, world_size)
    gang.become(world_size)
    comparison = job.run_verify(hf, ckpt, tokens, precision, tolerance, tp, pp, seed)  # type: ignore[arg-type]
    if gang.speaks():
        finish(comparison, json)
        if not comparison["rotary_passed"]:
            words = "; ".join(
                f"{reader}: {comparison[key]}"
                for reader, key in (("transformers", "rotary_transformers"), ("a reader of transformers 4's kind", "rotary_v4_reading"))
                if comparison[key] != "same"
            )
            raise ResultFailure(f"{ckpt} and {hf / 'config.json'} rotate positions differently (ours, theirs): {words}")
        if not comparison["passed"]:
            raise ResultFailure(
                f"{ckpt} is not {hf}: token {comparison['worst_position']}, vocabulary entry {comparison['worst_token_id']}: logit "
                f"{comparison['worst_checkpoint_logit']:.6g}, transformers {comparison['worst_hf_logit']:.6g}; {comparison['relative_difference']:.2e} of the "
                f"largest logit, tolerance {comparison['tolerance']:.0e}"
            )
