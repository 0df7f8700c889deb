"""`prism status`: the progress of a run, or of a pipeline's jobs, from their files and from Slurm if there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import run_folder
from megatron_prism.core import disk, log
from megatron_prism.core.config import RLConfig, RunConfig, TrainConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem
from megatron_prism.core.load import closest, load
from megatron_prism.core.manifest import read_json
from megatron_prism.jobs import submit
from megatron_prism.launch import pipeline, slurm
from megatron_prism.study import record
from megatron_prism.train.metrics import METRICS


def run(path: Path) -> dict[str, Any]:
    """Return {"run", "rows"}: one row per job (or array element), or one row for a run that was not submitted.

    Raises: InputError where the path holds neither a run nor a submission.
    """
    folder = pipeline.submission_folder(path)
    if not (folder / submit.SUBMITTED).is_file():
        if (path / record.FOLDER / record.STUDY).is_file():
            fix = "prism study CONFIG --status, with the study's overrides, shows how its stages stand"
            raise InputError(Problem(str(path), "a study", "a run or a submission", fix))
        if not (path / run_folder.CONFIG).is_file():
            raise InputError(
                Problem(
                    str(path),
                    "neither a run nor a submission",
                    f"a folder with {run_folder.CONFIG} or {pipeline.FOLDER}/{submit.SUBMITTED}",
                )
            )
        stage = "rl" if isinstance(_config(path), RLConfig) else "train"
        there = progress(path)
        return {"run": str(path), "rows": [{"stage": stage, **_not_submitted(path, there), **there}]}
    submitted = read_json(folder / submit.SUBMITTED)
    jobs, root = submitted["stages"], Path(submitted.get("submitted_from", ""))
    root = Path() if root == Path.cwd() else root
    states = _states([entry["job"] for entry in jobs])
    return {"run": str(path), "rows": [row for entry in jobs for row in _rows(folder, entry, states[entry["job"]], root)]}


def _states(ids: Sequence[str]) -> dict[str, str]:
    """Return the state of each job, or why it is not known."""
    if not slurm.is_here():
        return dict.fromkeys(ids, "no scheduler")
    try:
        return dict.fromkeys(ids, "not in the queue") | slurm.states(ids)
    except EnvironmentFault as error:
        log.get().warning("%s", error)
        return dict.fromkeys(ids, "unknown")


def _not_submitted(path: Path, there: Mapping[str, Any]) -> dict[str, Any]:
    is_done = there["checkpoint_step"] == there["steps"]  # by the checkpoint: a run that is killed after its last step is not done
    state = "training" if disk.is_held(path / run_folder.LOCK) else "done" if is_done else "not training"
    return {"job": None, "state": state, "last_event": None, "faults": 0}


def _rows(folder: Path, entry: Mapping[str, Any], state: str, root: Path) -> list[dict[str, Any]]:
    """Return a job's rows. root: the folder of submission, which the run folders are relative to."""
    rows = []
    for index, lines in enumerate(submit.events(folder, entry)):
        told = [parts for line in lines if len(parts := line.split(" ", 2)) == 3]
        is_array = bool(entry["array"])
        row = {
            "stage": f"{entry['name']}[{index}]" if is_array else entry["name"],
            "job": f"{entry['job']}_{index}" if is_array else entry["job"],
            "state": state,
            "last_event": " ".join((told[-1][0], told[-1][2])) if told else None,
            "faults": sum(what.startswith("fault") for _, _, what in told),
        }
        rows.append(row | (progress(root / entry["run_dirs"][index]) if entry["run_dirs"] else {}))
    return rows


def _config(run_dir: Path) -> RunConfig:
    """Return a run's config, of training or of reinforcement learning."""
    path = run_dir / run_folder.CONFIG
    config: RunConfig = load(path, closest(path, (TrainConfig, RLConfig)))
    return config


def progress(run_dir: Path) -> dict[str, Any]:
    """Return a run's progress: step and steps, last loss, tokens/s, seconds left, restarts, the newest checkpoint's step.

    Of reinforcement learning the mean reward too.
    """
    if not (run_dir / run_folder.CONFIG).is_file():
        return {"run_dir": str(run_dir), "step": 0}
    config, last = _config(run_dir), _last(run_dir / METRICS)
    steps, step, step_s = config.steps, last.get("step", 0), last.get("step_s")
    restarts = [start for start in run_folder.starts(run_dir)[1:] if start.get("from_step", 0) < steps]  # the others had nothing to do
    return {
        "run_dir": str(run_dir),
        "step": step,
        "steps": steps,
        "loss": last.get("loss"),
        **({"reward": last.get("reward")} if isinstance(config, RLConfig) else {}),
        "tokens_per_s": last.get("tokens_per_s"),
        "left_s": None if step_s is None else step_s * (steps - step),
        "restarts": len(restarts),
        "checkpoint_step": run_folder.last_step(run_dir) or None,
    }


def _last(path: Path, tail_bytes: int = 1 << 16) -> dict[str, Any]:
    """Return the last whole metrics line of a training step (a validation's line has no loss)."""
    if not path.is_file():
        return {}
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - tail_bytes))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
        except ValueError:
            continue  # still being written, or cut at the front
        if isinstance(metrics, dict) and "loss" in metrics:
            return metrics
    return {}


def show(status: Mapping[str, Any]) -> None:
    """Print the rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file has no width
        console.width = 200
    table = Table(
        title=Text(f"prism status {status['run']}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    reward = ["reward"] if any("reward" in row for row in status["rows"]) else []
    for name in ("stage", "job", "state", "step", "loss", *reward, "tokens/s", "left", "restarts", "checkpoint", "last event"):
        table.add_column(name, no_wrap=name != "last event", overflow="fold")
    for row in status["rows"]:
        step = f"{row['step']:,}/{row['steps']:,}" if "steps" in row else ""
        left = "" if row.get("left_s") is None else log.duration(row["left_s"])
        rewards = [_short(row.get(name), ".3f") for name in reward]
        numbers = (
            _short(row.get("loss"), ".4f"),
            *rewards,
            _short(row.get("tokens_per_s"), ",.0f"),
            left,
            _short(row.get("restarts"), "d"),
        )
        cells = (
            row["stage"],
            row["job"] or "",
            row["state"],
            step,
            *numbers,
            _short(row.get("checkpoint_step"), "d"),
            row["last_event"] or "",
        )
        table.add_row(*map(Text, cells))  # Text: no markup from a file's content
    console.print(table)


def _short(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
