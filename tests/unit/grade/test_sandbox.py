"""The sandbox: attacks are contained, and each is seen to succeed bare; faults are told from ends; nothing is left behind."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.grade.sandbox import backend, choose
from megatron_prism.grade.sandbox.result import Limits
from megatron_prism.grade.sandbox.sandbox import Sandbox
from tests import attacks

LIMITS = Limits(wall_s=1.5, cpu_s=1)
SYSTEM = backend.Interpreter(Path("/usr/bin/python3").resolve(), Path("/usr"))  # which users other than root may read
NUM_SOAK_RUNS = int(os.environ.get("PRISM_SOAK_RUNS", "60"))


@pytest.fixture(scope="module", params=["bubblewrap", "landlock", pytest.param("bubblewrap as nobody", marks=pytest.mark.slow)])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Return a sandbox of each kind; a machine that has no such backend is told by name.

    As nobody: root drops its uid before bubblewrap starts, which needs an interpreter that others may read, such as the system's.
    """
    python = backend.interpreter()
    wanted = [one for one in backend.candidates() if one.name.startswith(request.param)]
    if request.param == "bubblewrap as nobody":
        if os.getuid() or not Path("/usr/bin/python3").exists():
            pytest.skip("root alone drops its uid, and runs the system's Python then")
        python = SYSTEM
        wanted = [one for one in backend.candidates() if one.drops_uid]
    tried = [choose.probe(one, LIMITS, python) for one in wanted]
    for one in tried:
        if one.holds:
            return Sandbox(backend=one.backend, limits=LIMITS, interpreter=python)
    if os.environ.get("PRISM_REQUIRE_SANDBOX") == "1":
        choose.choose(LIMITS)  # one backend is enough: without any, this says what each of them lacks
    pytest.skip(f"{request.param} does not work on this machine: {[one.why for one in tried]}")


@pytest.fixture(scope="module")
def aim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with attacks.targets(tmp_path_factory.mktemp("targets")) as text:
        yield text


def doom(aim: str) -> None:
    Path(aim.split("\n")[0], "doomed").write_text("")


@pytest.mark.parametrize("name", attacks.HARMLESS)
def test_an_attack_succeeds_bare(name: str, aim: str) -> None:
    doom(aim)
    said = attacks.run_bare(attacks.HARMLESS[name], aim)
    if "refused" in said and name in ("opens an io_uring", "makes a user namespace", "uses the kernel's keys"):
        pytest.skip(f"{name}: this machine refuses it to everybody")
    if os.getuid() and name in ("writes under the system's folder", "traces a process", "reads another process's memory"):
        pytest.skip(f"{name}: root alone can")
    assert "REACHED" in said or "exit code 137" in said, said


@pytest.mark.parametrize("name", [*attacks.HARMLESS, *attacks.HARMFUL])
def test_an_attack_is_contained(name: str, aim: str, sandbox: Sandbox) -> None:
    doom(aim)
    threads = threading.active_count()
    result = sandbox.run(attacks.program({**attacks.HARMLESS, **attacks.HARMFUL}[name]), aim)
    assert not result.is_fault or "too busy" in result.why, result  # nothing that a program does is a fault
    assert b"REACHED" not in result.stdout, result.stdout[:100]
    assert len(result.stdout) <= LIMITS.output_bytes and result.seconds < LIMITS.wall_s + 2
    ends = {
        "says too much": ["output"],
        "says too much as an error": ["output"],
        "sleeps": ["time"],
        "computes without end": ["cpu", "time", "fault"],
    }
    assert result.ended in ends.get(name, [result.ended])  # a busy machine gives no CPU-second within the time
    assert Path(aim.split("\n")[0], "doomed").exists() and threading.active_count() == threads


@pytest.mark.parametrize("flags", ["truncate", "O_RDONLY", "O_ACCMODE"])
def test_landlock_before_linux_6_2_lets_no_program_empty_a_file(
    flags: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ABI 2 has no right to truncate: the filter alone keeps a checkpoint, and what the interpreter reads, whole."""
    if sandbox.backend.name != "landlock":
        pytest.skip("namespaces show the program no file that it could empty")
    target, readable = tmp_path / "model.safetensors", sandbox.interpreter.readable()
    target.write_text("weights")
    monkeypatch.setattr(backend.Interpreter, "readable", lambda _: [*readable, str(tmp_path)])
    old = dataclasses.replace(sandbox, landlock=sandbox.landlock.replace('abi = call("syscall", 444, None, 0, 1)', "abi = 2"))
    empties = "os.truncate(path, 0)" if flags == "truncate" else f"os.open(path, os.{flags} | os.O_TRUNC)"
    result = old.run(f"import os\npath = {str(target)!r}\nprint(open(path).read())\n{empties}")
    assert old.landlock != sandbox.landlock and result.stdout == b"weights\n"
    assert target.read_text() == "weights" and "PermissionError" in result.why, result


def test_a_plain_program_runs(sandbox: Sandbox) -> None:
    source = (
        "from __future__ import annotations\nimport sys, os, json, threading, tempfile, decimal, heapq, re, random\n"
        "t = threading.Thread(target=print, args=(dict(os.environ).keys() <= {'PWD', 'LC_CTYPE'}, __name__)); t.start(); t.join()\n"
        "print(sys.stdin.readline().strip(), input(), sys.argv)\nsys.exit(3)"
    )
    result = sandbox.run(source, "caf\u00e9\n7\n")
    assert (result.exit_code, result.ended, result.is_fault) == (3, "exit", False), result
    assert result.stdout.decode() == "True __main__\ncaf\u00e9 7 ['program.py']\n"


def test_a_program_reads_its_input_by_name_and_does_not_write_it(sandbox: Sandbox) -> None:
    writes = "try:\n  with open('/dev/stdin', 'r+b', 0) as file: file.write(b'9')\nexcept OSError: print('refused')"
    for given in ("7", "", "8\n" * 1000):
        result = sandbox.run(f"{writes}\nprint(open('/dev/stdin').read() == {given!r})", given)
        assert result.stdout == b"refused\nTrue\n", result


THREAD = "import threading\nt = threading.Thread(target=print, args=('ran',)); t.start(); t.join()"


class AsUser(backend.Backend):
    """Landlock, of a user who is not root."""

    def command(self, interpreter: backend.Interpreter, limits: Limits) -> list[str]:
        return ["setpriv", "--reuid=54321", "--clear-groups"]


@pytest.mark.skipif(os.getuid() != 0 or not SYSTEM.program.exists(), reason="root alone becomes another user, with the system's Python")
def test_threads_of_the_same_user_leave_a_program_its_own() -> None:
    """Without a user namespace the kernel counts a user's threads over all of the machine."""
    lives = "import threading, time\nfor _ in range(60): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint(flush=True)\ntime.sleep(60)"
    sandbox = Sandbox(backend=AsUser(name="landlock"), limits=LIMITS, interpreter=SYSTEM)
    command = [*sandbox.backend.command(SYSTEM, LIMITS), str(SYSTEM.program), "-I", "-S", "-c", lives]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None and busy.stdout.readline() == b"\n"
            result = sandbox.run(THREAD)
            assert result.stdout == b"ran\n", result
            bounded = dataclasses.replace(sandbox, limits=dataclasses.replace(LIMITS, memory_bytes=256 << 20))
            many = bounded.run(
                "import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
            )
            assert many.ended == "exit" and many.exit_code == 1 and "start new thread" in many.why, many  # the memory bounds them
        finally:
            busy.kill()


@pytest.mark.skipif(os.getuid() != 0 or not SYSTEM.program.exists(), reason="root alone becomes another user, with the system's Python")
def test_a_backend_that_starts_no_thread_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose.probe(AsUser(name="landlock"), LIMITS, SYSTEM).holds
    monkeypatch.setattr(Limits, "inside", lambda limits, counts_threads: {"RLIMIT_NPROC": 1})
    one = choose.probe(AsUser(name="landlock"), LIMITS, SYSTEM)
    assert "a plain program does not run" in one.why and "start new thread" in one.why, one


def test_a_program_holds_no_descriptor_of_ours(sandbox: Sandbox) -> None:
    probe = "import os\nfor fd in range(64):\n  try: os.fstat(fd); print(fd)\n  except OSError: pass"
    assert sandbox.run(probe).stdout.split() == [b"0", b"1", b"2"]


def test_an_exit_code_does_not_pass_for_a_fault(sandbox: Sandbox) -> None:
    assert sandbox.run("raise SystemExit(7)").exit_code == 7
    for end in ("import os; os._exit(137)", "raise SystemExit(137 + 256)", "import os; os.abort()"):
        assert sandbox.run(end).ended == "signal"
    lowered = "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nexcept (OSError, ValueError): raise SystemExit(7)\nwhile True: pass"
    assert sandbox.run(lowered).exit_code == 7
    stubborn = dataclasses.replace(sandbox, limits=Limits(wall_s=30, cpu_s=1))
    assert stubborn.run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass").ended == "cpu"
    said = sandbox.run("import sys; sys.stderr.write('bwrap: Cannot fork'); sys.exit(1)")
    assert (said.ended, said.exit_code) == ("exit", 1)


def test_a_sandbox_that_does_not_start_is_a_fault_and_is_tried_again(sandbox: Sandbox, tmp_path: Path) -> None:
    broken = dataclasses.replace(sandbox, inside=f"import os; os.write(2, b'machine full'); raise SystemExit(1)  # {tmp_path}")
    result = broken.run("print(1)")
    assert result.is_fault and "machine full" in result.why
    nowhere = backend.Interpreter(Path("/nowhere/python"), Path("/usr"))
    assert dataclasses.replace(sandbox, interpreter=nowhere).run("print(1)").is_fault


@pytest.mark.slow
def test_a_program_that_the_machine_kills_is_tried_again(sandbox: Sandbox) -> None:
    """As the kernel does where no memory is left, after a part of its CPU-seconds. Killed once, it is run again; killed each time, it is a fault."""
    patient = dataclasses.replace(sandbox, limits=Limits(wall_s=30, cpu_s=5))
    ours = psutil.Process()
    others = {one.pid for one in ours.children(recursive=True)}
    for kills, ended in ((1, "exit"), (2, "fault")):
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(patient.run, "import time\nwhile time.process_time() < 1.2: pass\ntime.sleep(4); print('whole')")
            killed: set[int] = set()
            while not running.done() and len(killed) < kills:
                programs = [one for one in ours.children(recursive=True) if not one.children() and one.pid not in killed | others]
                if programs and sum(programs[-1].cpu_times()[:2]) > 1.1:  # user, system
                    killed.add(programs[-1].pid)
                    programs[-1].kill()
                time.sleep(0.05)
            result = running.result()
        assert (result.ended, len(killed)) == (ended, kills), result


@pytest.mark.slow
def test_a_program_that_a_busy_machine_starves_is_a_fault(sandbox: Sandbox) -> None:
    processors = os.sched_getaffinity(0)
    spin = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    os.sched_setaffinity(0, {min(processors)})  # the spinners and the program share one
    # each in a session of its own: a kernel with autogroups divides its time among sessions, and the program has its own
    spinners = [subprocess.Popen([sys.executable, "-I", "-S", "-c", spin], start_new_session=True) for _ in range(8)]
    try:
        patient = dataclasses.replace(sandbox, limits=Limits(wall_s=3, cpu_s=2))
        starved = patient.run("while True: pass")
        assert starved.is_fault and ("too busy" in starved.why or "not gone in time" in starved.why), starved
        asleep = patient.run("import time; time.sleep(60)")
        assert asleep.ended == "time", asleep  # it waits for no processor
    finally:
        os.sched_setaffinity(0, processors)
        for one in spinners:
            one.kill()
            one.wait()


def test_nothing_is_left_behind(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sources = [
        "print(1)",
        "import os, time; open('x', 'w').write('x')",
        "1/0",
        "import time; time.sleep(9)",
        "while True: print('x' * 9999)",
    ]

    def state() -> tuple[int, list[str], list[int]]:
        """Return the number of open descriptors, what stands in the folder of temporary files, and the processes that are ours or orphans."""
        contained = [one for one in psutil.process_iter(["ppid", "cmdline"]) if "job_fd" in " ".join(one.info["cmdline"] or [])]
        orphans = [one.pid for one in contained if one.info["ppid"] == 1]  # others may be of another worker of the tests
        children = [one.pid for one in psutil.Process().children(recursive=True)]
        return len(os.listdir("/proc/self/fd")), os.listdir(tmp_path), [*orphans, *children]

    sandbox.run("print(1)")
    before = state()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda number: sandbox.run(sources[0 if number % 10 > 4 else number % 5]), range(NUM_SOAK_RUNS)))
    assert not [result for result in results if result.is_fault]
    time.sleep(0.1)
    assert state() == before


def test_four_at_once_do_not_disturb_each_other(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(4) as pool:
        bombs = [pool.submit(sandbox.run, "import os\nwhile True: os.fork()") for _ in range(2)]
        neighbours = [pool.submit(sandbox.run, "print(int(input()) + 1)", str(number)) for number in range(20)]
        assert [one.result().stdout for one in neighbours] == [b"%d\n" % (number + 1) for number in range(20)]
        assert not any(bomb.result().is_fault for bomb in bombs)


class Bare(backend.Backend):
    """A backend that contains nothing."""

    def command(self, interpreter: backend.Interpreter, limits: Limits) -> list[str]:
        return ["env"]


def test_the_probe_sees_a_backend_that_contains_nothing_and_nothing_is_then_run() -> None:
    bare = Bare(name="bare", bwrap="env")
    assert "reads writes" in choose.probe(bare).why
    absent = backend.Backend(name="absent", bwrap="/nowhere/bwrap")
    assert "does not run" in choose.probe(absent).why
    with pytest.raises(EnvironmentFault, match=r"code is not run.*bare.*reads writes.*absent"):
        choose.choose(backends=[bare, absent])
