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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from megatron_prism.core.check.cluster import element_name
from megatron_prism.core.config import ClusterConfig
from megatron_prism.core.errors import EnvironmentFault

EXIT_CODES = "PRISM_EXIT_CODES"  # the variable by which a script tells its tasks where to note their exit codes
TASK_WAIT_S = 60  # srun: the time that the other tasks get once one has ended
ANSWER_S = 60  # a command of Slurm that takes longer does not answer
PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # before a command that failed in passing is run again

# Variables by which Slurm's commands take options, and that they set in a job. They would overrule a script, or narrow an answer.
OPTIONS = ("SBATCH_", "SLURM_", "SRUN_", "SQUEUE_", "SACCT_", "SCONTROL_")
KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")  # which cluster, and as whom
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the gang of whoever submits
# What sbatch prints where asking again may help, and of these, where the controller has certainly not taken the job.
PASSING = re.compile(r"timed? ?out|unable to contact|connect|temporarily|transmitted or received|receive failure|standby", re.IGNORECASE)
NOT_TAKEN = re.compile(r"unable to contact|connect failure|connection refused|temporarily|standby", re.IGNORECASE)
FORGOTTEN = "Invalid job id"  # squeue, of an id that left the queue
# A cluster's wrapper, or Slurm under SLURM_CLUSTERS, prints other lines beside the answer.
ROW = re.compile(r"(\d+)[^|]*\|([A-Z_]+)[^|]*(?:\|(.*))?")
TAKEN = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;.*)?$", re.MULTILINE)
# The states of a job that is over. Slurm has many others, such as STOPPED and STAGE_OUT. Source: man squeue, job state codes.
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")


@dataclass(frozen=True)
class Job:
    """A job for Slurm: prism's arguments, the number of nodes, and the ranks per node (0: no gang, one process on the cluster's `cpu`).

    array: the words that each element of a job array adds to the command, by index. checkpoints: the folders of a run's checkpoints (a filter's
    shards, an evaluation's samples and grades), by which the script knows its progress; of each element of an array, as many of each. Empty: the
    job keeps none.
    """

    name: str
    title: str
    folder: Path
    command: tuple[str, ...]
    nodes: int = 1
    ranks_per_node: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    array: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    checkpoints: tuple[tuple[Path, ...], ...] = ()

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sbatch"

    def events(self, index: int | None = None) -> Path:
        """Return the file to which the script writes events."""
        return self.folder / f"{self.name if index is None else element_name(self.name, index)}.events"


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
        is_absolute=job.folder.is_absolute(),
        max_restarts=cluster.max_restarts,
        environment=[(name, quote(value)) for name, value in job.environment.items()],
        exit_codes=EXIT_CODES,
        is_gang=job.ranks_per_node > 0,
        setup=[_words(command) for command in setup],
        array=[(index, _words(words)) for index, words in job.array.items()],
        checkpoints=[quote(str(path)) for folders in job.checkpoints for path in folders],
        num_folders=len(job.checkpoints[0]) if job.checkpoints else 0,
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
        *(f"--{key}={slurm_quote(str(value))}" for key, value in values.items() if value is not None),
        "--requeue",
        *flags,
        *("=".join([name, *map(slurm_quote, value)]) for name, *value in given),
    ]


def slurm_quote(text: str) -> str:
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

    Where the folder is not there (in a container without it), nothing is noted: the script then has srun's exit code alone, whose 1 it takes for a fault.
    """
    prefix, task = os.environ.get(EXIT_CODES), os.environ.get("SLURM_PROCID")
    if prefix and task and "RANK" not in os.environ:
        with contextlib.suppress(OSError):
            Path(f"{prefix}.{task}").write_text(f"{code}\n")


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """Submit a script and return its job id. after: jobs that must succeed first; if one fails, Slurm cancels this job.

    A failure that may pass is asked again, but where the controller may have taken the job, only once squeue does not list it.
    Raises: EnvironmentFault where there is no Slurm, it refuses the script, or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentFault("sbatch is not here: submit from a login node of the cluster, or look at the script with --dry-run")
    waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    for pause_s in (*PAUSES_S, None):
        code, output, failure = _run(["sbatch", "--parsable", *waits, "--", str(script)])
        if code == 0:
            if taken := next(reversed(TAKEN.findall(output)), None) or _in_queue(script):
                return taken
            raise EnvironmentFault(f"sbatch prints no job id, but {output!r}; look for the job with squeue before you submit again")
        if not PASSING.search(failure):
            raise EnvironmentFault(f"sbatch refuses {script}: {failure}")
        if not NOT_TAKEN.search(failure) and (taken := _in_queue(script)):
            return taken
        if pause_s is None:
            raise EnvironmentFault(f"sbatch does not take {script}, asked {len(PAUSES_S) + 1} times: {failure}; submit again later")
        time.sleep(pause_s)
    raise AssertionError


def _in_queue(script: Path) -> str | None:
    """Return the id of this user's job whose script is this one."""
    lines = _answer(["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F|%o"])
    ids = [number for number, bar, command in (line.partition("|") for line in lines) if command == os.path.abspath(script)]
    return ids[-1] if ids else None


def states(ids: Sequence[str]) -> dict[str, str]:
    """Return the Slurm states of jobs, by id: from squeue for queued jobs, else from Slurm's accounting if there is one.

    A job array lists each distinct state of its elements. An id that Slurm no longer knows is absent.
    Raises: EnvironmentFault where squeue does not answer: such a job may run.
    """
    by_id: dict[str, list[str]] = {}

    def read(lines: Sequence[str]) -> None:
        missing = set(ids) - set(by_id)
        for number, state, reason in (row.groups() for line in lines if (row := ROW.fullmatch(line.strip()))):
            if number in missing:
                by_id.setdefault(number, []).append(f"{state} ({reason})" if reason and state == "PENDING" else state)

    if ids:
        read(_answer(["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", "--format=%F|%T|%r"]))
    if set(ids) - set(by_id):
        past = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}", "--format=JobID,State"]
        code, output, _ = _run(past)  # it fails where the cluster keeps no accounts
        read(output.splitlines() if code == 0 else [])
    return {number: ", ".join(dict.fromkeys(each)) for number, each in by_id.items()}


def is_active(state: str) -> bool:
    """Say whether a job (or any element of an array) in this state waits or runs."""
    return any(each.split(" ")[0] not in ENDED for each in state.split(", ") if each)


def is_here() -> bool:
    """Say whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def _answer(command: Sequence[str]) -> list[str]:
    """Return the lines that squeue prints; none for ids that it has forgotten. It is asked again while it fails.

    Raises: EnvironmentFault where it is absent, or does not answer.
    """
    if not is_here():
        raise EnvironmentFault("squeue is not here: whether a job runs can be seen from a login node of the cluster alone")
    for pause_s in (*PAUSES_S, None):
        code, output, failure = _run(command)
        if code == 0 or FORGOTTEN in failure:
            return output.splitlines() if code == 0 else []
        if pause_s is not None:
            time.sleep(pause_s)
    raise EnvironmentFault(
        f"squeue does not answer, asked {len(PAUSES_S) + 1} times: {failure}; a job may be in the queue: try again later"
    )


def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """Run a command of Slurm; return its exit code, its output, and why it failed on one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, env=without_options(os.environ))
    except subprocess.TimeoutExpired:
        return 1, "", f"timed out after {ANSWER_S} s"
    except OSError as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, " ".join(done.stderr.split()) or f"exit code {done.returncode}"


def without_options(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for Slurm's commands, and so for a job: all but options of Slurm, and of launchers, in the submitter's shell."""
    return {name: value for name, value in given.items() if name in KEPT or not (name in LAUNCHERS or name.startswith(OPTIONS))}
