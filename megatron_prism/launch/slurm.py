"""Write a job as a readable sbatch script, submit it, and ask Slurm for its state.

Every text from a user is quoted in the script, so that a process gets it byte for byte: by shlex.quote in bash, and in double quotes on an
#SBATCH line, which Slurm reads itself. core/check/cluster.py has refused texts that cannot be quoted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from megatron_prism.core.config import ClusterConfig
from megatron_prism.core.errors import EnvironmentFault

EXIT_CODES = "PRISM_EXIT_CODES"  # the variable by which a script tells its tasks where to note their exit codes
TASK_WAIT_S = 60  # srun: the time that the other tasks get once one has ended


@dataclass(frozen=True)
class Job:
    """A job for Slurm: prism's arguments, the number of nodes, and the ranks per node (0: no gang, one process on the cluster's `cpu`).

    array: the words that each element of a job array adds to the command, by index.
    """

    name: str
    title: str
    folder: Path
    command: tuple[str, ...]
    nodes: int = 1
    ranks_per_node: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    array: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sbatch"

    def events(self, index: int | None = None) -> Path:
        """Return the file to which the script writes events."""
        return self.folder / (f"{self.name}.events" if index is None else f"{self.name}_{index}.events")


def render(job: Job, cluster: ClusterConfig) -> str:
    """Return a job's script."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).get_template("job.sbatch.j2")
    setup = [*cluster.setup, *([("source", f"{cluster.venv}/bin/activate")] if cluster.venv else [])]
    return template.render(
        options=_options(job, cluster),
        script=quote(str(job.script)),
        events=quote(str(job.folder / job.name)),
        max_restarts=cluster.max_restarts,
        environment=[(name, quote(value)) for name, value in job.environment.items()],
        exit_codes=EXIT_CODES,
        is_gang=job.ranks_per_node > 0,
        setup=[_words(command) for command in setup],
        array=[(index, _words(words)) for index, words in job.array.items()],
        srun=_srun(job, cluster),
    )


def _words(words: Sequence[str]) -> str:
    return " ".join(map(quote, words))


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Return the #SBATCH options of a job."""
    is_gang, cpu = job.ranks_per_node > 0, cluster.cpu
    log = f"{str(job.folder).replace('%', '%%')}/{job.name}.{'%A_%a' if job.array else '%j'}.out"
    gpus = min(job.ranks_per_node, cluster.gpus_per_node)
    values: dict[str, object] = {
        "job-name": job.title,
        "account": cluster.account,
        "partition": cluster.partition if is_gang else cpu.partition or cluster.partition,
        "qos": cluster.qos,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gres": f"{cluster.gres}:{gpus}" if gpus and cluster.gres else None,
        "gpus-per-node": gpus if gpus and not cluster.gres else None,
        "cpus-per-task": cluster.cpus_per_task if is_gang else cpu.cpus_per_task,
        "mem": cluster.mem if is_gang else cpu.mem,
        "time": cluster.time_limit if is_gang else cpu.time_limit,
        "signal": f"B:USR1@{cluster.signal_before_s}",
        "open-mode": "append",
        "output": log,
        "array": ",".join(map(str, job.array)) or None,
    }
    flags = ["--exclusive"] if is_gang and cluster.exclusive else []
    given = [option.split("=", 1) for option in cluster.sbatch]
    return [
        *(f"--{key}={_slurm_quote(str(value))}" for key, value in values.items() if value is not None),
        "--requeue",
        *flags,
        *("=".join([name, *map(_slurm_quote, value)]) for name, *value in given),
    ]


def _slurm_quote(text: str) -> str:
    """Quote a value for an #SBATCH line. Within double quotes sbatch takes the character after a backslash literally."""
    if re.fullmatch(r"[A-Za-z0-9%._/:@,+=-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _srun(job: Job, cluster: ClusterConfig) -> str:
    """Return the command that starts the tasks. It repeats the options, since newer versions of Slurm pass fewer of them on to srun."""
    cpus = cluster.cpus_per_task if job.ranks_per_node else cluster.cpu.cpus_per_task
    lines = [f"srun --nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1 {f'--cpus-per-task={cpus} ' if cpus else ''}--export=ALL"]
    lines.append(f"--kill-on-bad-exit=0 --wait={TASK_WAIT_S}")
    if container := cluster.container:
        lines.append(f"--container-image={quote(container.image)} --no-container-mount-home")
        if container.mounts:
            lines.append(f"--container-mounts={quote(','.join(container.mounts))}")
        workdir = quote(container.workdir) if container.workdir else '"$PWD"'
        lines.append(f"--container-workdir={workdir}")
        if job.environment:  # otherwise the image's own values win
            lines.append(f"--container-env={','.join(job.environment)}")
    ranks = f" --nproc {job.ranks_per_node}" if job.ranks_per_node else ""
    lines.append(f"prism {_words(job.command)}" + (' "${words[@]}"' if job.array else "") + ranks)
    return " \\\n    ".join(lines)


def note_exit_code(code: int) -> None:
    """In a task of a job's script, note its exit code for the script. A rank that the task started notes nothing.

    Where the folder is not there (in a container without it), nothing is noted, and the script has srun's exit code alone.
    """
    prefix, task = os.environ.get(EXIT_CODES), os.environ.get("SLURM_PROCID")
    if prefix and task and "RANK" not in os.environ:
        with contextlib.suppress(OSError):
            Path(f"{prefix}.{task}").write_text(f"{code}\n")


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """Submit a script and return its job id. after: jobs that must succeed first; if one fails, Slurm cancels this job.

    Raises: EnvironmentFault where there is no Slurm, or Slurm refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentFault("sbatch is not here: submit from a login node of the cluster, or look at the script with --dry-run")
    waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    done = subprocess.run(["sbatch", "--parsable", *waits, "--", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentFault(f"sbatch refuses {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def states(ids: Sequence[str]) -> dict[str, str]:
    """Return the Slurm states of jobs, by id: from squeue for queued jobs, else from Slurm's accounting if there is one.

    A job array lists each distinct state of its elements. An id that Slurm no longer knows is absent.
    """
    by_id: dict[str, list[str]] = {}
    queue = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", "--format=%F|%T|%r"]
    past = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}", "--format=JobID,State"]
    for command in (queue, past) if ids else ():
        missing = set(ids) - set(by_id)
        for line in _lines(command) if missing else ():
            number, state, *reason = line.split("|")
            if (number := number.split("_")[0]) in missing:
                waits = f" ({reason[0]})" if reason and state == "PENDING" else ""
                by_id.setdefault(number, []).append(state.split(" ")[0] + waits)
    return {number: ", ".join(dict.fromkeys(each)) for number, each in by_id.items()}


def is_active(state: str) -> bool:
    """Say whether a job (or any element of an array) in this state waits or runs."""
    return any(word in state for word in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE"))


def is_here() -> bool:
    """Say whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def _lines(command: Sequence[str]) -> list[str]:
    """Return the output lines of a Slurm command; none where it is absent or fails (squeue fails for an id it has forgotten)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
