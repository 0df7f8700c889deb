"""The command `prism`: every job by name, and the exit of the process.

Standard output carries a job's result, standard error the rest. Exit codes: 0 done, 1 the result is a failure,
2 the input is wrong, 3 stopped by a signal with the state saved, 4 the machine or a library is at fault, 70 a defect of ours.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from typing import Annotated

import typer

from megatron_prism import __version__
from megatron_prism.cli import analyze, convert, data, evaluate, gang, generate, grade, merge, report, report_page, rl, study, submit, train
from megatron_prism.core import defect, log
from megatron_prism.core.errors import EnvironmentFault, PrismError
from megatron_prism.launch import slurm
from megatron_prism.parallel import launch

EPILOG = "Every job takes --help, with an example. Documentation: docs/ beside the source."
LAST_WORD_S = 1.0  # a rank with exit code 4 waits this long for a rank with another code
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False, epilog=EPILOG, pretty_exceptions_enable=False)
for job in (
    report.doctor,
    generate.generate,
    grade.grade,
    data.prepare,
    data.prompts,
    data.contaminate,
    train.train,
    train.plan,
    merge.merge,
    data.locate,
    submit.submit,
    study.study,
    report.status,
    report.config,
    report_page.report,
):
    app.command()(job)
app.add_typer(convert.app, name="convert")
app.add_typer(rl.app, name="rl")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(analyze.app, name="analyze")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """PRISM on Megatron-Core: mid-train a Hugging Face base model, keep what it knew, write it back."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if os.environ.get(UNSAFE):
        raise EnvironmentFault(f"{UNSAFE} is set: it lets a checkpoint run code when it is loaded; unset it")


def main() -> None:
    """Run the command line. Every error becomes a message and an exit code."""
    launch.drop_leftovers()
    log.setup()
    try:
        app()
    except PrismError as error:
        if gang.speaks() or not error.is_agreed:
            _say(str(error))
        _leave(error.exit_code, error.is_agreed)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException and a Rust panic are not Exceptions
        traceback.print_exc()
        if defect.is_defect(error):
            _say(defect.REPORT)
            _leave(defect.EXIT_CODE)
        _leave(EnvironmentFault.exit_code)


def _say(text: str) -> None:
    rank = "" if gang.speaks() else f"rank {os.environ['RANK']}: "
    with contextlib.suppress(OSError):  # the terminal may be gone
        for line in text.splitlines():
            sys.stderr.write(f"prism: {rank}{line}\n")  # in one write: other ranks write too


def _leave(code: int, is_agreed: bool = False) -> None:
    """End the process. While its process group exists it ends at once: the libraries' exit handlers could wait for peers that wait for it.

    Code 4 may only mean that another rank is gone. Such a rank ends last, because the launcher reports the first, which may know the cause.
    """
    slurm.note_exit_code(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if code == EnvironmentFault.exit_code and not is_agreed and gang.has_peers():
        time.sleep(LAST_WORD_S)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
