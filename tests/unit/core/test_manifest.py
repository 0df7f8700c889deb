"""Hashes, versions, and JSON that a reader never sees half of."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

import megatron_prism
from megatron_prism.core import manifest


def test_description_names_inputs_versions_and_facts(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (9 << 20))  # more than one block
    found = manifest.describe("import", manifest.sha256_files([tmp_path / "a"]), source="s")
    assert found["inputs"] == {str(tmp_path / "a"): hashlib.sha256(b"x" * (9 << 20)).hexdigest()}
    assert (found["kind"], found["source"], found["versions"]["megatron_prism"]) == ("import", "s", megatron_prism.__version__)
    assert "torch" in found["versions"] and "transformer-engine" not in found["versions"]
    assert found["created"].endswith("Z")
    json.dumps(found)


def test_hash_of_json_ignores_the_order_of_keys() -> None:
    assert manifest.sha256_json({"a": 1, "b": [2]}) == manifest.sha256_json({"b": [2], "a": 1})
    assert manifest.sha256_json({"a": 1}) != manifest.sha256_json({"a": 1.5})


def test_json_is_written_whole(tmp_path: Path) -> None:
    manifest.write_json(tmp_path / "a.json", {"text": "caf\u00e9", "n": 1})
    assert manifest.read_json(tmp_path / "a.json") == {"text": "caf\u00e9", "n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*args: object) -> None:
        raise OSError("no space")

    manifest.write_json(tmp_path / "a.json", {"n": 1})
    monkeypatch.setattr(os, "fsync", full) if step == "fsync" else monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        manifest.write_json(tmp_path / "a.json", {"n": 2})
    assert manifest.read_json(tmp_path / "a.json") == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """Most readers refuse a file with a NaN in it as a whole."""
    value = {"loss": math.nan, "by": [1.5, (math.inf, -math.inf)], "nested": {"a": {"b": math.nan, "c": "NaN"}}, "n": 3, "yes": True}
    manifest.write_json(tmp_path / "a.json", value)
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert read == {"loss": None, "by": [1.5, [None, None]], "nested": {"a": {"b": None, "c": "NaN"}}, "n": 3, "yes": True}


def test_a_commit_is_dirty_by_the_package_and_not_by_models_and_data_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "megatron_prism" / "core" / "manifest.py"
    source.parent.mkdir(parents=True)
    source.write_text("one\n")
    author = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(manifest, "__file__", str(source))
    commit = manifest.git_commit()
    assert commit and len(commit) == 40
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_text("")
    (tmp_path / "my_cluster.yaml").write_text("")
    assert manifest.git_commit() == commit
    (source.parent / "new.py").write_text("")
    assert manifest.git_commit() == f"{commit}+dirty"
