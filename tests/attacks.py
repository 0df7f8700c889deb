"""Attacks on a sandbox, as programs that print REACHED where they succeed. What they aim at comes on stdin (`Targets`).

HARMLESS ones are run bare as well, where each must succeed: an attack that cannot succeed shows nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START = """
import ctypes, os, resource, signal, socket, subprocess, sys, threading, time
folder, tcp, udp, victim, address = sys.stdin.read().split()
tcp, udp, victim, address = int(tcp), int(udp), int(victim), int(address)
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
def syscall(x86_64, aarch64, *arguments):
    got = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in (x86_64 if x86 else aarch64, *arguments)])
    if got < 0: raise OSError(ctypes.get_errno(), "refused")
    return got
def reached(got=True):
    if got or got == 0 and got is not False: print("REACHED", flush=True)
"""
# each body runs in a `try` that lets OSError, MemoryError, RuntimeError and the like pass
HARMLESS = {
    "reads a file": "reached(open(folder + '/secret').read() == 'secret')",
    "lists a folder": "reached('secret' in os.listdir(folder))",
    "writes a file": "open(folder + '/written', 'w').write('x'); reached()",
    "truncates a file": "os.truncate(folder + '/log', 0); reached()",
    "opens a file to be emptied": "os.close(os.open(folder + '/log', 3 | os.O_TRUNC)); reached()",  # neither read nor written
    "appends to a file": "open(folder + '/log', 'a').write('x'); reached()",
    "deletes a file": "os.remove(folder + '/doomed'); reached()",
    "renames a file": "os.rename(folder + '/log', folder + '/gol'); os.rename(folder + '/gol', folder + '/log'); reached()",
    "changes a mode": "os.chmod(folder + '/secret', 0o644); reached()",
    "links a file": "os.link(folder + '/secret', folder + '/linked'); os.remove(folder + '/linked'); reached()",
    "follows its own symlink": "p = f'/tmp/link{os.getpid()}'; os.symlink(folder + '/secret', p)\ntry: reached(open(p).read())\nfinally: os.remove(p)",
    "makes a folder": "os.mkdir(folder + '/made'); os.rmdir(folder + '/made'); reached()",
    "reads the password file": "reached(open('/etc/passwd').read())",
    "reads another process's environment": "reached(open(f'/proc/{victim}/environ', 'rb').read() is not None)",
    "lists processes": "reached(str(victim) in os.listdir('/proc'))",
    "writes under the system's folder": "p = '/usr/attack'; open(p, 'w').close(); os.remove(p); reached()",
    "fills the disk by one file": "p = f'/tmp/big{os.getpid()}'\ntry:\n  open(p, 'wb').write(bytes(40 << 20)); reached()\nfinally: os.remove(p)",
    "fills the disk by many files": (
        "d = f'/tmp/many{os.getpid()}'; os.mkdir(d)\ntry:\n  for i in range(40): open(f'{d}/{i}', 'wb').write(bytes(1 << 20))\n"
        "  reached()\nfinally:\n  import shutil; shutil.rmtree(d)"
    ),
    "connects by TCP": "socket.create_connection(('127.0.0.1', tcp), 2); reached()",
    "sends by UDP": "reached(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp)))",
    "connects to a Unix socket": "socket.socket(socket.AF_UNIX).connect(folder + '/socket'); reached()",
    "connects to an abstract Unix socket": "socket.socket(socket.AF_UNIX).connect('\\0attack' + str(tcp)); reached()",
    "opens a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); reached()",
    "listens": "socket.create_server(('127.0.0.1', 0)); reached()",
    "forks": "p = os.fork()\nif not p: os._exit(0)\nos.waitpid(p, 0); reached()",
    "starts a program": "reached(subprocess.run(['/bin/echo', 'x'], capture_output=True).stdout)",
    "spawns a program": "p = os.posix_spawn('/bin/true', ['true'], {}); os.waitpid(p, 0); reached()",
    "clones itself": "p = syscall(56, 220, 17, 0, 0, 0, 0)\nif not p: os._exit(0)\nos.waitpid(p, 0); reached()",
    "signals a process": "os.kill(victim, 0); reached()",
    "signals a group": "os.killpg(os.getpgid(victim), 0); reached()",
    "traces a process": "syscall(101, 117, 16, victim, 0, 0); os.waitpid(victim, 0); syscall(101, 117, 17, victim, 0, 0); reached()",
    "reads another process's memory": (
        "import struct; b = ctypes.create_string_buffer(8); l = struct.pack('PN', ctypes.addressof(b), 8); r = struct.pack('PN', address, 8)\n"
        "reached(syscall(310, 270, victim, l, 1, r, 1, 0) == 8)"
    ),
    "opens a process": "reached(os.pidfd_open(victim))",
    "limits another process": "resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0)); reached()",
    "slows another process": "os.setpriority(os.PRIO_PROCESS, victim, 1); reached()",
    "pins itself to a processor": "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); reached()",
    "takes 2 GiB": "b = bytearray(2 << 30); reached(len(b))",
    "takes memory that is not counted": "fd = os.memfd_create('x'); reached(os.write(fd, bytes(1 << 20)))",
    "makes a user namespace": "syscall(272, 97, 0x10000000); reached()",
    "opens a shared memory segment": "i = syscall(29, 194, 0, 4096, 0o1600); syscall(31, 195, i, 0, 0); reached()",
    "looks at the machine's shared memory segments": "syscall(31, 195, 0, 14, ctypes.create_string_buffer(256)); reached()",
    "opens an io_uring": "reached(syscall(425, 425, 1, bytes(120)))",
    "uses the kernel's keys": "reached(syscall(250, 219, 0, -1, 1))",
    "would outlive whoever started it": "reached(libc.prctl(1, 0, 0, 0, 0) == 0)",
    "changes its personality": "syscall(135, 92, 0x0040000); reached()",
    "reads a secret of the environment": "reached(os.environ['ATTACK_SECRET'])",
    "starts a session": "p = os.fork()\nif not p: os.setsid(); print('REACHED', flush=True); os._exit(0)\nos.waitpid(p, 0)",
    "is killed by a timer": "syscall(222, 107, 1, __import__('struct').pack('qii48x', 0, 9, 0), ctypes.create_string_buffer(8)); reached()",
    "has a pipe signal it": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, 10, 9); reached()",
    "writes into itself at exit code 137": "os._exit(137)",
}
# not run bare: they would harm the machine or wait too long
HARMFUL = {
    "forks without end": "while True: os.fork()",
    "signals everybody": "os.kill(-1, 9)",
    "says too much": "while True: os.write(1, b'x' * 65536)",
    "says too much as an error": "while True: os.write(2, b'x' * 65536)",
    "computes without end": "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "sleeps": "time.sleep(1000)",
    "closes its pipes and lives on": "[os.close(fd) for fd in range(3)]; time.sleep(1000)",
    "leaves a thread": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "recurses by C": "f = lambda: f()\nsys.setrecursionlimit(10**9)\nfor _ in range(10**6): f = (lambda g: lambda: map(g, [1]).__next__())(f)\nf()",
    "mounts": "syscall(165, 40, b'none', b'/tmp', b'tmpfs', 0, 0); reached()",
    "loads a program into the kernel": "reached(syscall(321, 280, 0, bytes(128), 128))",
    "changes the host's name": "socket.sethostname('attacked'); reached()",
    "reboots": "syscall(169, 142, 1, 2, 3, 0); reached()",
    "writes a device": "fd = os.open('/dev/mem', os.O_RDWR); reached()",
}


def program(body: str) -> str:
    """Return an attack as a whole program."""
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    return f"{START}\ntry:\n{lines}\nexcept (OSError, MemoryError, RuntimeError, KeyError, subprocess.SubprocessError) as e: print(type(e), e, file=sys.stderr)\n"


@contextmanager
def targets(folder: Path) -> Iterator[str]:
    """Yield the text that tells an attack where to aim: a folder, ports, a process that sleeps and an address in it."""
    folder.chmod(0o777)
    (folder / "secret").write_text("secret")
    (folder / "log").write_text("")
    os.environ["ATTACK_SECRET"] = "secret"
    sleeper = "import ctypes, time; b = ctypes.create_string_buffer(8); print(ctypes.addressof(b), flush=True); time.sleep(600)"
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with (
        subprocess.Popen([sys.executable, "-I", "-S", "-c", sleeper], stdout=subprocess.PIPE, text=True, start_new_session=True) as victim,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        datagrams,
        unix,
        abstract,
    ):
        try:
            datagrams.bind(("127.0.0.1", 0))
            here = os.getcwd()
            os.chdir(folder)  # a socket's path has at most 107 bytes
            unix.bind("socket")
            os.chdir(here)
            unix.listen(64)
            port = tcp.getsockname()[1]
            abstract.bind(f"\0attack{port}")
            abstract.listen(64)
            assert victim.stdout is not None
            yield f"{folder}\n{port}\n{datagrams.getsockname()[1]}\n{victim.pid}\n{int(victim.stdout.readline())}"
        finally:
            os.environ.pop("ATTACK_SECRET")
            victim.kill()


def run_bare(body: str, text: str) -> str:
    """Run one of HARMLESS without a sandbox and return what it says."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program(body)], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return f"{done.stdout}exit code {done.returncode}\n{done.stderr}"
