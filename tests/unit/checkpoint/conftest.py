"""A tiny Hugging Face LLaMA folder of two shards, and its checkpoint."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path], tiny_tokenizer: Path) -> Path:
    """Return a Hugging Face folder (hf) and its checkpoint (ckpt) side by side; tests copy them."""
    from megatron_prism.jobs import convert

    root = tmp_path_factory.mktemp("pristine")
    make_folder(root / "hf", {}, 2)
    for file in tiny_tokenizer.iterdir():
        shutil.copyfile(file, root / "hf" / file.name)
    convert.run_import(root / "hf", root / "ckpt", dry_run=False)
    return root


@pytest.fixture
def hf_root(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the Hugging Face folder that a test may damage."""
    return Path(shutil.copytree(pristine / "hf", tmp_path / "hf"))


@pytest.fixture
def ckpt_root(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(pristine / "ckpt", tmp_path / "ckpt"))


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Stop what would wait for ever."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def limit() -> Callable[[int], AbstractContextManager[None]]:
    """Return `no_longer_than`."""
    return no_longer_than
