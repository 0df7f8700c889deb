"""Two or three tiny models of one architecture, as folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.merge.folders import moved


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path], tiny_tokenizer: Path) -> Path:
    """Return a LLaMA of two shards with tokenizer, generation config, licence and card."""
    root = tmp_path_factory.mktemp("merge") / "base"
    make_folder(root, {"rope_theta": 500000.0}, 2)
    for file in tiny_tokenizer.iterdir():
        shutil.copyfile(file, root / file.name)
    (root / "LICENSE").write_text("free\n")
    (root / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\nmodel-index:\n- name: a\n---\nScores 90.\n")
    return root


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "base"))


@pytest.fixture
def mid(base: Path, tmp_path: Path) -> Path:
    """Return the same model, moved."""
    return moved(base, tmp_path / "mid", 1)


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    """Return the same model, moved elsewhere."""
    return moved(base, tmp_path / "other", 2)
