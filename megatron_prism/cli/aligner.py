"""Other trainers for an RL run: `prism rl export nemo_aligner`, `prism rl export nemo_rl`, `prism rl serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prism.cli.options import Config, DryRun, Json, Out, Overrides, a_path, finish

export = typer.Typer(
    no_args_is_help=True,
    help="Write a run for another trainer: NVIDIA's NeMo-Aligner 0.7.0, or NeMo-RL.",
    epilog="Example: prism rl export nemo_aligner my_aligner.yaml --cluster configs/clusters/h100_pyxis.yaml --out aligner",
)


@export.command("nemo_aligner")
def export_nemo_aligner(
    config: Config,
    cluster: Annotated[Path, typer.Option(help="The cluster's YAML (configs/clusters/).", show_default=False, callback=a_path)],
    out: Out,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    json: Json = None,
) -> None:
    """Write what NeMo-Aligner is started with: prompts, answers, overrides, an sbatch het-job, the conversion there and back.

    Example: prism rl export nemo_aligner my_aligner.yaml --cluster configs/clusters/h100_pyxis.yaml --out aligner steps=500
    """
    from megatron_prism.jobs import aligner as job

    finish(job.run_export(config, overrides or [], cluster, out, dry_run), json)


@export.command("nemo_rl")
def export_nemo_rl(config: Config, out: Out, overrides: Overrides = None, json: Json = None) -> None:
    """Write a GRPO config and its data for NeMo-RL, NeMo-Aligner's successor.

    Example: prism rl export nemo_rl my_nemo_rl.yaml --out nemo_rl max_staleness=1 num_nodes=4 num_generation_nodes=2
    """
    from megatron_prism.core.config.nemo_rl import NemoRlConfig
    from megatron_prism.core.load import load, placed
    from megatron_prism.jobs import aligner as job

    given = overrides or []
    with placed(config, NemoRlConfig, given):
        finish(job.export_nemo_rl(load(config, NemoRlConfig, given), out), json)


def serve(
    folder: Annotated[Path, typer.Argument(help="A folder of prism rl export nemo_aligner.", show_default=False, callback=a_path)],
    host: Annotated[str, typer.Option(help="The address to serve on; any but a loopback one needs PRISM_REWARD_TOKEN.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="The port; the folder's where none is given, 0 for a free one.", min=0, max=65535)
    ] = None,
) -> None:
    """Serve rewards to NeMo-Aligner, over KServe v2, until a signal stops it.

    Example: prism rl serve aligner --port 5555
    """
    from megatron_prism.jobs import aligner as job

    job.run_serve(folder, host, port)
