"""A file that cannot be read now is the machine's fault; one that is absent or forbidden is wrong input."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prism.checkpoint.torch_dist import TensorReader
from megatron_prism.core import disk
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.data import mixture, prompts
from megatron_prism.eval import folder
from megatron_prism.hf import files
from megatron_prism.rl import passes

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN)
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a mixture": ("manifest.json", mixture.read_prepared),
    "prompts": ("manifest.json", prompts.manifest_of),
    "pass counts": ("manifest.json", passes.manifest_of),
    "an evaluation": ("summary.json", folder.summary_of),
    "a checkpoint's tensors": (".metadata", TensorReader),
    "a file of a Hugging Face folder": ("config.json", lambda root: files.read_object(root / "config.json", "a config")),
}


def failing(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Let every file that is opened fail, as on a mount that is gone."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "there")

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)


@pytest.mark.parametrize("name", READERS)
def test_a_passing_fault_is_no_wrong_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = READERS[name]
    with pytest.raises(InputError):  # absent
        read(tmp_path)
    (tmp_path / file).write_text("{}")
    for code in PASSING:
        with monkeypatch.context() as patched:
            failing(patched, code)
            with pytest.raises(EnvironmentFault, match="cannot be read now"):
                read(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.ENAMETOOLONG, None])
def test_an_absent_or_forbidden_file_stays_what_it_is(code: int | None) -> None:
    with pytest.raises(OSError), disk.reading(Path("a")):
        raise OSError(code, "no") if code else OSError("a library's own")


@pytest.mark.parametrize("module", ["megatron_prism.launch.slurm", "typer"])
def test_a_command_line_that_cannot_be_imported_is_the_machines_fault(module: str, tmp_path: Path) -> None:
    """Python's own exit code of an error, 1, would be that of a result's failure, which ends a job for good."""
    (tmp_path / "sitecustomize.py").write_text(f"""import sys
class Fails:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise OSError(5, "Input/output error", name)
sys.meta_path.insert(0, Fails())
""")
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    ended = subprocess.run([sys.executable, "-m", "megatron_prism.cli", "--version"], env=environment, capture_output=True, text=True)
    assert ended.returncode == EnvironmentFault.exit_code and "prism: the command line cannot be imported" in ended.stderr, ended.stderr
