"""Where a run starts is asked once: all that reads it afterwards reads the same checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_prism.checkpoint import folder, run_folder
from megatron_prism.core.config import BatchConfig, DataConfig, InitConfig, RLConfig, TrainConfig
from megatron_prism.core.errors import InputError
from megatron_prism.core.load import build
from megatron_prism.core.manifest import read_json, write_json
from megatron_prism.jobs import rl_replay, train


def publish(source: Path, checkpoint: Path, step: int) -> Path:
    """Let a run have another checkpoint."""
    path = Path(shutil.copytree(checkpoint, run_folder.step_folder(source, step)))
    folder.write_meta(path, {**folder.read(path).facts, "step": step, "tokens": 100 * step})
    return path


def test_a_source_run_that_goes_on_meanwhile_does_not_change_where_a_run_starts(
    tiny_checkpoint: Path, tiny_mixture: Path, tmp_path: Path
) -> None:
    source, run_dir = tmp_path / "source", tmp_path / "run"
    first = publish(source, tiny_checkpoint, 1)
    data, init = DataConfig(prepared=tiny_mixture, seq_length=16), InitConfig(checkpoint=source)
    config = TrainConfig(run_dir=run_dir, steps=1, precision="fp32", data=data, batch=BatchConfig(global_size=2), init=init)
    resolved = train.resolve(config, 1)
    second = publish(source, tiny_checkpoint, 2)
    assert (resolved.start.weights, resolved.start.tokens) == (first, 100)
    with run_folder._held(config, resolved.start, (), resolved.figures):
        pass
    assert str(first / folder.META) in run_folder.last_start(run_dir)["inputs"]
    assert train.resolve(config, 1).start.weights == second  # the run has saved nothing: it starts anew
    rl = {"run_dir": str(run_dir), "steps": 1, "prompts": "p", "rollout": {"max_tokens": 8}, "batch": {"seq_length": 16}}
    replayed = build({**rl, "init": {"checkpoint": str(source)}}, RLConfig, str)
    assert rl_replay._origin(run_dir, replayed) == first
    assert rl_replay._origin(tmp_path / "of no record", replayed) == source


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "run", "starts": []}', '{"kind": "run", "starts": 3}', '{"kind": "run", "starts": [3]}']
)
def test_a_manifest_that_names_no_start_is_named(tmp_path: Path, text: str) -> None:
    assert run_folder.starts(tmp_path) == [] and run_folder.last_start(tmp_path) == {}
    (tmp_path / run_folder.MANIFEST).write_text(text)
    with pytest.raises(InputError, match=r"manifest.json: found .*; required the manifest of a run, with its starts; restore the file"):
        run_folder.last_start(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"kind": '])
def test_a_run_folder_with_a_broken_manifest_is_not_of_another_kind(tmp_path: Path, text: str, tiny_mixture: Path) -> None:
    data, batch = DataConfig(prepared=tiny_mixture, seq_length=16), BatchConfig(global_size=2)
    config = TrainConfig(run_dir=tmp_path, steps=1, data=data, batch=batch)
    write_json(tmp_path / run_folder.MANIFEST, {"kind": "run"})
    assert run_folder.check_place(config) == [] and read_json(tmp_path / run_folder.MANIFEST) == {"kind": "run"}
    (tmp_path / run_folder.MANIFEST).write_text(text)
    (problem,) = run_folder.check_place(config)
    assert problem.where == str(tmp_path / run_folder.MANIFEST) and problem.found.startswith("no JSON object")
