"""`prism JOB ...`: parse, load, check, call the job. Nothing else.

Standard output carries a job's result, standard error the rest. Exit codes: 0 done, 1 the result is a failure,
2 the input is wrong, 3 stopped by a signal with the state saved, 4 an environment fault.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_prism import __version__
from megatron_prism.core import log
from megatron_prism.core.errors import EnvironmentFault, InputError, PrismError, Problem, ResultFailure

if TYPE_CHECKING:
    from megatron_prism.parallel.launch import Span

EPILOG = "Every job takes --help, with an example. Documentation: docs/ beside the source."
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False, epilog=EPILOG, pretty_exceptions_enable=False)
convert = typer.Typer(
    no_args_is_help=True,
    help="Convert between Hugging Face folders and Megatron checkpoints.",
    epilog="Example: prism convert import --hf Llama-3.1-8B --out ckpt/llama",
)
app.add_typer(convert, name="convert")

Config = Annotated[Path, typer.Argument(help="A YAML config.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, as a.b=c.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")]


def _in_a_folder(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise InputError(Problem("--json", str(path), f"a file in a folder that is there: {path.parent} is not"))
    if path is not None and path.is_dir():
        raise InputError(Problem("--json", f"{path}, a folder", "a file"))
    return path


Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.", callback=_in_a_folder)]
Nproc = Annotated[int | None, typer.Option(help="Start this many processes on this machine (torchrun).", min=1)]
Out = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """PRISM on Megatron-Core: mid-train a Hugging Face base model, keep what it knew, write it back."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if os.environ.get(UNSAFE):
        raise EnvironmentFault(f"{UNSAFE} is set: it lets a checkpoint run code when it is loaded; unset it")


@app.command()
def doctor(json: Json = None) -> None:
    """Tell what this machine has and what each absence costs.

    Example: prism doctor
    """
    from megatron_prism.jobs import doctor as job

    found = job.run()
    job.show(found)
    _finish(found, json, quiet=True)
    if found["missing"]:
        raise EnvironmentFault(f"required but absent: {', '.join(found['missing'])}")


@convert.command("import")
def convert_import(
    hf: Annotated[Path, typer.Option(help="A Hugging Face model folder.")], out: Out, dry_run: DryRun = False, json: Json = None
) -> None:
    """Write a Hugging Face folder as a Megatron checkpoint, readable at any TP and PP.

    Example: prism convert import --hf Llama-3.1-8B --out ckpt/llama
    """
    from megatron_prism.jobs import convert as job

    _finish(job.run_import(hf, out, dry_run), json)


@convert.command("export")
def convert_export(
    ckpt: Annotated[Path, typer.Option(help="A checkpoint, or a run folder (its latest).")],
    out: Out,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Write a Megatron checkpoint as a Hugging Face folder: same files, shard layout and dtypes as it came from.

    Example: prism convert export --ckpt runs/mid --out Llama-3.1-8B-mid
    """
    from megatron_prism.jobs import convert as job

    _finish(job.run_export(ckpt, out, dry_run), json)


@convert.command("verify")
def convert_verify(
    hf: Annotated[Path, typer.Option(help="A Hugging Face model folder.")],
    ckpt: Annotated[Path, typer.Option(help="A checkpoint, or a run folder (its latest).")],
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

    world_size = _world_size(tp * pp)
    job.check_verify(hf, ckpt, tp, pp, world_size)
    _become_gang(world_size)
    found = job.run_verify(hf, ckpt, tokens, precision, tolerance, tp, pp, seed)  # type: ignore[arg-type]
    if _speaks():
        _finish(found, json)
        if not found["passed"]:
            raise ResultFailure(
                f"{ckpt} is not {hf}: token {found['worst_position']}, vocabulary entry {found['worst_token_id']}: logit "
                f"{found['worst_checkpoint_logit']:.6g}, transformers {found['worst_hf_logit']:.6g}; {found['relative_difference']:.2e} of the "
                f"largest logit, tolerance {found['tolerance']:.0e}"
            )


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The text to continue; empty: from the begin-of-text token.")],
    ckpt: Annotated[Path | None, typer.Option(help="A checkpoint, or a run folder (its latest).")] = None,
    hf: Annotated[Path | None, typer.Option(help="A Hugging Face folder, run by plain transformers.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time.")] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.", min=0.01)] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens of this probability.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.", min=1)] = 1,
    json: Json = None,
) -> None:
    """Continue a text; standard output is the continuation alone.

    Example: prism generate --ckpt ckpt/llama --prompt "Once upon a time" --max-tokens 100 --greedy
    """
    if (ckpt is None) == (hf is None):
        raise InputError(Problem("--ckpt, --hf", "both or neither", "one of them"))
    from megatron_prism.jobs import generate as job

    sampling = job.Sampling(0.0 if greedy else temperature, top_p, seed)
    if hf is not None:
        text = job.from_hf(hf, prompt, max_tokens, sampling)
    else:
        assert ckpt is not None
        world_size = _world_size(tp * pp)
        job.check(tp, pp, world_size, ckpt)
        _become_gang(world_size)
        text = job.from_checkpoint(ckpt, prompt, max_tokens, sampling, tp, pp)
    if _speaks():
        typer.echo(text)
        _finish({"prompt": prompt, "continuation": text}, json, quiet=True)


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    report: Annotated[
        bool, typer.Option("--report", help="Draw the blend and show sample documents, into OUT/report; a dry run's into OUT.plan.")
    ] = False,
    json: Json = None,
) -> None:
    """Tokenize a weighted mixture of sources into Megatron data files.

    Example: prism prepare configs/mixtures/math.yaml out=data/math --dry-run
    """
    from megatron_prism.core.config import PrepareConfig
    from megatron_prism.core.load import load, placed

    settings = load(config, PrepareConfig, overrides or [])  # before the job brings torch along
    from megatron_prism.jobs import prepare as job

    with placed(config, PrepareConfig, overrides or []):
        result = job.run(settings, dry_run=dry_run)
    if report:
        result |= job.report(settings, result)
    _finish(result, json, quiet=True)
    for path in result.get("report", []):
        typer.echo(f"report: {path}")
    if not dry_run:
        typer.echo(f"out: {settings.out}")


@app.command()
def train(config: Config, overrides: Overrides = None, nproc: Nproc = None, dry_run: DryRun = False, json: Json = None) -> None:
    """Train from a checkpoint or from scratch; started again, it goes on from its last checkpoint.

    Example, after examples/quickstart.sh: prism train configs/tiny/mid.yaml run_dir=runs/other optimizer.lr=1e-3 --nproc 2

    Under torchrun or srun it joins their gang instead of starting one; with --nproc, under an srun of one task a node, it starts each
    node's part of one gang.
    """
    from megatron_prism.core.config import TrainConfig
    from megatron_prism.core.load import load, placed
    from megatron_prism.parallel import environment, launch

    launch.heed_signals_while_starting()
    settings = load(config, TrainConfig, overrides or [])  # before the job brings torch along
    from megatron_prism.jobs import train as job

    span = launch.slurm_span() if nproc else launch.ALONE
    world_size = (
        nproc * span.num_nodes if nproc and span.num_nodes > 1 else _world_size(nproc or (settings.world_size if dry_run else None))
    )
    with placed(config, TrainConfig, overrides or []):
        figures = job.resolve(settings, world_size).figures
    if dry_run:
        _finish(figures, json)
        return
    environment.set_variables(settings)  # before there are ranks: a process reads some of them as it starts
    _become_gang(world_size, span)
    result = job.run(settings, world_size)
    if _speaks():
        _finish(result, json)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="On so many GPUs: the same as world_size=N.", min=1)] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Rank every layout that is valid and fits.")] = False,
    usd_per_gpu_hour: Annotated[float, typer.Option(help="The price that the cost assumes.", min=0.0)] = 2.5,
    json: Json = None,
) -> None:
    """Tell what a training run needs on H100s: memory, time, cost. It reads the config alone, and writes nothing.

    Example: prism plan configs/recipes/llama-3.1-8b/midtrain.yaml --gpus 64
    """
    from megatron_prism.core.config import TrainConfig
    from megatron_prism.core.load import load, placed

    given = [*(overrides or []), *([f"world_size={gpus}"] if gpus and not sweep else [])]  # a sweep needs no layout of that size
    settings = load(config, TrainConfig, given)
    from megatron_prism.jobs import plan as job

    with placed(config, TrainConfig, given):
        found = job.sweep(settings, gpus or job.num_gpus(settings), usd_per_gpu_hour) if sweep else job.run(settings, usd_per_gpu_hour)
        _finish(found, json, quiet=True)
        job.show(found)
        if not found["fits"]:
            raise InputError(job.too_large(settings, found))


@app.command()
def locate(
    config: Config,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="What this step reads (1 is the first).")] = None,
    rank: Annotated[int, typer.Option(help="Data-parallel rank.")] = 0,
    sample: Annotated[int, typer.Option(help="Its sequence of the step, from 0.")] = 0,
    source: Annotated[str | None, typer.Option(help="Or which step reads a document of this source.")] = None,
    document: Annotated[int, typer.Option(help="The document, from 0.")] = 0,
    token: Annotated[int, typer.Option(help="Its token, from 0.")] = 0,
    epoch: Annotated[int, typer.Option(help="In which pass over the source, from 0.", min=0)] = 0,
    nproc: Annotated[int | None, typer.Option(help="The run's world size, where its config does not say.", min=1)] = None,
    json: Json = None,
) -> None:
    """Name the documents that a step of a run reads, or the step that reads a document.

    Example, after examples/quickstart.sh: prism locate configs/tiny/mid.yaml --step 40 --sample 3 --nproc 2
    """
    from megatron_prism.core.config import TrainConfig
    from megatron_prism.core.load import load, placed

    if (step is None) == (source is None):
        raise InputError(Problem("--step, --source", "neither" if step is None else "both", "one of them"))
    settings = load(config, TrainConfig, overrides or [])
    world_size = nproc or settings.world_size or 1
    from megatron_prism.data.locate import Sample
    from megatron_prism.jobs import locate as job

    with placed(config, TrainConfig, overrides or []):
        if step is not None:
            _finish(job.contents(settings, world_size, Sample(step, rank, sample)), json)
        else:
            assert source is not None
            _finish(job.reader_of(settings, world_size, source, epoch, document, token), json)


@app.command()
def submit(
    config: Config,
    cluster: Annotated[Path, typer.Option(help="The cluster's YAML (configs/clusters/).", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch scripts; needs neither Slurm nor data, writes nothing.")
    ] = False,
    json: Json = None,
) -> None:
    """Submit a training run, a mixture to prepare, or a pipeline of stages to Slurm.

    Example: prism submit configs/tiny/mid.yaml world_size=2 --cluster configs/clusters/test.yaml --dry-run

    Overrides that begin with `cluster.` are the cluster's: cluster.partition=long.
    """
    from megatron_prism.jobs import submit as job

    result = job.run(config, overrides or [], cluster, dry_run)
    for text in result.pop("texts", []):
        typer.echo(text, nl=False)
    _finish(result, json, quiet=dry_run)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run folder, or a pipeline's.", show_default=False)], json: Json = None) -> None:
    """Show how far a run or a pipeline is: its jobs, steps, loss, speed, time left, newest checkpoint.

    Example: prism status runs/quickstart/mid
    """
    from megatron_prism.jobs import status as job

    found = job.run(run)
    job.show(found)
    _finish(found, json, quiet=True)


def _world_size(nproc: int | None) -> int:
    """Return the gang's size: that of the gang this process is in, or the one asked for."""
    from megatron_prism.parallel import launch

    return launch.world_size() if launch.in_gang() else nproc or 1


def _become_gang(world_size: int, span: Span | None = None) -> None:
    """Join the gang this process was started in; outside one, start it where several processes are asked for, and exit as it does.

    span: the machines of the gang to start, where they are several.
    """
    from megatron_prism.parallel import launch

    span = span or launch.ALONE
    if span.num_nodes == 1:
        launch.adopt_slurm()
    if span.num_nodes > 1 or (world_size > 1 and not launch.in_gang()):
        code = launch.start_gang(world_size // span.num_nodes, ["-m", "megatron_prism.cli", *sys.argv[1:]], span)
        sys.stdout.flush()
        os._exit(code)  # the gang has said everything


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _finish(result: dict[str, Any], path: Path | None, quiet: bool = False) -> None:
    """Print a result on standard output, a line a value; write it to a file as JSON where asked."""
    from megatron_prism.core.manifest import write_json
    from megatron_prism.report import lines

    if path is not None:
        try:
            write_json(path, result)
        except OSError as error:
            raise EnvironmentFault(f"--json {path}: {error.strerror or error}; the job itself is done") from error
    for line in [] if quiet else lines.lines(result):
        typer.echo(line)


def main() -> None:
    """Run the command line; every expected error becomes a message and an exit code."""
    log.setup()
    try:
        app()
    except PrismError as error:
        if _speaks() or not error.is_agreed:
            rank = "" if _speaks() else f"rank {os.environ['RANK']}: "
            for line in str(error).splitlines():
                sys.stderr.write(f"prism: {rank}{line}\n")  # at once: other ranks speak too
        _leave(error.exit_code)
    except Exception:  # the device, a library, a defect: no result, and no word about the input
        traceback.print_exc()
        _leave(EnvironmentFault.exit_code)


def _leave(code: int) -> None:
    """End the process. One whose process group stands ends at once: its libraries' farewells would wait for peers that wait for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
