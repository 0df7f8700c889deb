"""Choose how code is contained: each backend is attacked, and runs a plain program, before it is trusted. None that holds: refuse."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.grade.sandbox import seccomp
from megatron_prism.grade.sandbox.backend import Backend, Interpreter, candidates, interpreter
from megatron_prism.grade.sandbox.result import Limits
from megatron_prism.grade.sandbox.sandbox import Sandbox

PLAIN = """
import collections, math, sys, threading
def main(): print(int(sys.stdin.read()) + math.isqrt(16) + len(collections.Counter("abc")))
thread = threading.Thread(target=main)
thread.start()
thread.join()
"""
# each line of ATTACKS is tried; the names of those that succeed are printed, then `tried`
ATTACK = """
import os, signal, socket, sys
folder, port, pid = sys.stdin.read().split("\\n")
def reads(): return open(folder + "/secret").read() == "secret"
def writes(): return open(folder + "/written", "w").write("x")
def empties(): os.truncate(folder + "/secret", 0); return True
def lists_home(): return os.listdir(os.path.dirname(folder) + "/" + os.path.basename(folder))
def connects(): return socket.create_connection(("127.0.0.1", int(port)), 1)
def forks():
    child = os.fork()
    if not child: os._exit(0)
    return os.waitpid(child, 0)
def signals(): os.kill(int(pid), 0); return True
def environment(): return os.environ.get("HOME")
def processes(): return os.listdir("/proc")
def memory(): return len(bytearray(8 << 30))
for attack in (reads, writes, empties, lists_home, connects, forks, signals, environment, processes, memory):
    try:
        if attack(): print(attack.__name__)
    except (OSError, MemoryError): pass
print("tried")
"""


@dataclass(frozen=True)
class Probe:
    """What trying a backend showed. why: empty where it holds."""

    backend: Backend
    why: str

    @property
    def holds(self) -> bool:
        return not self.why


def probe(backend: Backend, limits: Limits | None = None, python: Interpreter | None = None) -> Probe:
    """Attack a backend with programs that must be contained, and run one that must work."""
    sandbox = Sandbox(backend=backend, limits=limits or Limits(), interpreter=python or interpreter())
    plain = sandbox.run(PLAIN, "35")
    if plain.is_fault or plain.stdout.strip() != b"42":
        return Probe(backend, f"a plain program does not run: {plain.why.strip() or plain.ended}")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        Path(folder, "secret").write_text("secret")
        attacked = sandbox.run(ATTACK, f"{folder}\n{server.getsockname()[1]}\n{os.getpid()}")
    said = attacked.stdout.decode("ascii", "replace").split()
    if said != ["tried"]:
        return Probe(backend, f"an attack got through, or did not end: {' '.join(said)} {attacked.ended} {attacked.why.strip()}")
    return Probe(backend, "")


def choose(limits: Limits | None = None, backends: Sequence[Backend] | None = None) -> Sandbox:
    """Return a sandbox whose backend has held on this machine.

    Raises: EnvironmentFault: none holds; code is then not run at all.
    """
    if platform.machine() not in seccomp.AUDIT_ARCH:
        raise EnvironmentFault(
            f"code cannot be contained on {platform.machine()}: the filter of system calls knows {', '.join(seccomp.AUDIT_ARCH)}"
        )
    tried = []
    for backend in candidates() if backends is None else backends:
        tried.append(probe(backend, limits))
        if tried[-1].holds:
            return Sandbox(backend=backend, limits=limits or Limits())
    raise EnvironmentFault(
        "code is not run: nothing on this machine contains it; "
        + "; ".join(f"{one.backend.name} {one.backend.bwrap}: {one.why}" for one in tried)
        + "; install bubblewrap, allow user namespaces, or use a kernel with Landlock"
    )
