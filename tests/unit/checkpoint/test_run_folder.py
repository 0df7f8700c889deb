"""What a run that goes on may change, and what it may not."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prism.checkpoint import folder, run_folder
from megatron_prism.checkpoint.start import Start
from megatron_prism.core.config import BatchConfig, DataConfig, FP8Config, InitConfig, MixtureChange, ParallelConfig, RLConfig, TrainConfig
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.core.load import build, load, to_yaml
from megatron_prism.jobs import train

EARLY, LATE, OTHER = (
    MixtureChange(step=3, weights={"a": 100.0}),
    MixtureChange(step=6, weights={"b": 100.0}),
    MixtureChange(step=3, weights={"b": 100.0}),
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run of 10 steps that stands at step 5, its mixture changed at step 3."""
    monkeypatch.setattr(run_folder, "is_started", lambda path: True)
    monkeypatch.setattr(run_folder, "last_step", lambda path: 5)
    data = DataConfig(prepared=Path("data/a"), seq_length=8, changes=(EARLY,))
    found = TrainConfig(run_dir=tmp_path, steps=10, data=data, batch=BatchConfig(global_size=4), init=InitConfig(checkpoint=Path("ckpt")))
    (tmp_path / run_folder.CONFIG).write_text(to_yaml(found))
    return found


@pytest.mark.parametrize(
    ("changes", "is_held"),
    [
        ((EARLY,), True),
        ((EARLY, LATE), True),
        ((EARLY, replace(LATE, step=5)), True),
        ((), False),
        ((OTHER,), False),
        ((EARLY, replace(LATE, step=4)), False),
    ],
)
def test_a_mixture_may_change_from_now_on_and_not_before(config: TrainConfig, changes: tuple[MixtureChange, ...], is_held: bool) -> None:
    problems = run_folder.check_resume(replace(config, data=replace(config.data, changes=changes)), ())
    assert [problem.where for problem in problems] == ([] if is_held else ["data.changes"])


def test_a_held_folder_names_the_job_that_asks_for_it(config: TrainConfig, tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    rl = {"run_dir": str(tmp_path), "steps": 1, "prompts": "p", "rollout": {"max_tokens": 8}, "batch": {"seq_length": 16}}
    looked = Start(config.model, Path("assets"), None, 0, "float32", 5)  # type: ignore[arg-type]
    command = [sys.executable, "-c", hold, str(tmp_path / run_folder.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for job, one in (("train", config), ("rl", build({**rl, "init": {"checkpoint": "c"}}, RLConfig, str))):
            with pytest.raises(EnvironmentFault, match=f"one prism {job} at a time"), run_folder._held(one, looked, (), {}):
                raise AssertionError("the run began")
        holder.communicate()


def test_what_to_do_belongs_to_the_key(config: TrainConfig) -> None:
    """A seed is not mended by a mixture that changes later."""
    data = replace(config.data, changes=(OTHER,))
    fixes = {problem.where: problem.fix for problem in run_folder.check_resume(replace(config, data=data, seed=config.seed + 1), ())}
    assert "a mixture may change" in fixes["data.changes"] and "a mixture may change" not in fixes["seed"]


def test_a_run_folder_that_moved_on_since_it_was_looked_at_is_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    """It stands at step 5: a start that found it empty would train random weights, or weights whose config was not compared."""
    before = sorted(tmp_path.iterdir())
    for step in (0, 4):
        looked = Start(config.model, Path("assets"), None, 0, "float32", step)  # type: ignore[arg-type]
        said = f"stood at step {step} when this run looked, and stands at step 5"
        with pytest.raises(EnvironmentFault, match=said), run_folder._held(config, looked, (), {}):
            raise AssertionError("the run began")
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != run_folder.LOCK] == before


def test_where_it_runs_may_change_and_what_it_computes_may_not(config: TrainConfig) -> None:
    grid = ParallelConfig(cp=4, cp_comm_type="a2a+p2p", cp_a2a_size=2)
    assert run_folder.check_resume(replace(config, batch=BatchConfig(global_size=4, micro_size=2), parallel=grid), ()) == []
    assert run_folder.check_resume(replace(config, environment={"NCCL_DEBUG": "INFO"}, deterministic=True), ()) == []
    data = replace(config.data, prepared=Path("data/b"))
    changed = replace(config, batch=BatchConfig(global_size=8), data=data, seed=config.seed + 1, trainable=("*.mlp.*",))
    assert {problem.where for problem in run_folder.check_resume(changed, ())} == {
        "batch.global_size",
        "data.prepared",
        "seed",
        "trainable",
    }


def test_fp8_may_neither_begin_nor_end_in_a_run(config: TrainConfig, tmp_path: Path) -> None:
    eighth = replace(config, fp8=FP8Config())
    assert "fp8.recipe" in {problem.where for problem in run_folder.check_resume(eighth, ())}
    (tmp_path / run_folder.CONFIG).write_text(to_yaml(eighth))
    assert run_folder.check_resume(eighth, ()) == []
    assert "fp8.recipe" in {problem.where for problem in run_folder.check_resume(config, ())}


def test_a_run_that_extends_its_model_writes_so_and_nothing_else(tiny_checkpoint: Path, tiny_mixture: Path, tmp_path: Path) -> None:
    had = folder.read(tiny_checkpoint)
    data, batch = DataConfig(prepared=tiny_mixture, seq_length=2 * had.model.max_position_embeddings), BatchConfig(global_size=2)
    init = InitConfig(checkpoint=tiny_checkpoint)
    plain = TrainConfig(run_dir=tmp_path / "run", steps=1, precision="fp32", data=data, batch=batch, init=init, model=had.model)
    with pytest.raises(InputError, match=r"data\.seq_length"):
        train.resolve(plain, 1)
    longer = replace(plain, init=replace(init, max_position_embeddings=data.seq_length))
    resolved = train.resolve(longer, 1)
    with run_folder._held(longer, resolved.start, (), resolved.figures):
        pass
    began = run_folder.origin(longer.run_dir)
    assert began.model == replace(had.model, max_position_embeddings=data.seq_length)
    config_json = json.loads((had.assets / "config.json").read_text())
    assert json.loads((began.assets / "config.json").read_text()) == config_json | {
        "max_position_embeddings": data.seq_length,
        "rope_theta": had.model.rotary_base,  # for transformers 4
    }
    with pytest.raises(InputError, match=r"init\.max_position_embeddings: found 1; required at least"):
        train.resolve(replace(plain, run_dir=tmp_path / "other", init=replace(init, max_position_embeddings=1)), 1)
    run_folder.step_folder(longer.run_dir, 1).mkdir(
        parents=True
    )  # a resume: without the checkpoint it began with, and with no other number
    gone = replace(longer, init=replace(longer.init, checkpoint=tmp_path / "gone"))
    assert train.resolve(gone, 1).start.step == 1
    with pytest.raises(InputError, match=r"init\.max_position_embeddings: found None"):
        train.resolve(replace(gone, init=replace(gone.init, max_position_embeddings=None)), 1)


def test_a_checkpoint_of_another_architecture_than_expected_is_refused(tiny_checkpoint: Path, tiny_mixture: Path, tmp_path: Path) -> None:
    expected = replace(folder.read(tiny_checkpoint).model, num_layers=7, rotary_base=5e5)
    config = TrainConfig(
        run_dir=tmp_path / "run",
        steps=1,
        precision="fp32",
        data=DataConfig(prepared=tiny_mixture, seq_length=8),
        batch=BatchConfig(global_size=2),
        init=InitConfig(checkpoint=tiny_checkpoint),
        model=expected,
    )
    with pytest.raises(InputError) as caught:
        train.resolve(config, 1)
    assert [problem.where for problem in caught.value.problems] == ["model.num_layers", "model.rotary_base"]


@pytest.mark.parametrize(
    ("made", "is_held"),
    [
        ([], True),
        ([".lock"], True),
        ([".lock", "config.yaml", "manifest.json:run"], True),
        (["slurm/", "log.txt"], True),
        (["config.yaml", "manifest.json:run"], True),
        (["config.yaml"], False),
        (["origin/", "notes.txt"], False),
        ([".lock", "prism.json"], False),
        (["manifest.json:prepared"], False),
        ([".lock", "manifest.json:prepared"], False),
    ],
)
def test_a_run_folder_is_new_or_a_runs(config: TrainConfig, tmp_path: Path, made: list[str], is_held: bool) -> None:
    """What else stands there would be overwritten, and a checkpoint or a mixture be no longer whole."""
    run_dir = tmp_path / "run"
    for name in made:
        path = run_dir / name.split(":")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(json.dumps({"kind": name.split(":")[1]}) if ":" in name else "")
    problems = run_folder.check_place(replace(config, run_dir=run_dir))
    assert [problem.where for problem in problems] == ([] if is_held else ["run_dir"])


@pytest.mark.parametrize("below", ["", "sub/run"])
def test_a_file_is_no_run_folder(config: TrainConfig, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    assert [problem.where for problem in run_folder.check_place(replace(config, run_dir=tmp_path / "file" / below))] == ["run_dir"]


def test_a_run_that_goes_on_keeps_the_record_of_where_it_began(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "sha256_files", lambda paths: {})
    resumed = Start(config.model, Path("assets"), None, 0, "float32", step=1)  # type: ignore[arg-type]
    run_folder._lay_out(replace(config, init=InitConfig(checkpoint=Path("other"))), resumed, (), {})
    assert load(tmp_path / run_folder.CONFIG, TrainConfig).init.checkpoint == Path("ckpt") and "other is not read" in caplog.text


def test_a_checkpoint_that_cannot_be_moved_or_removed_stays_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("prism"), "propagate", True)
    steps = [run_folder.step_folder(tmp_path, step) for step in (1, 2, 3)]
    for path in (*steps, steps[0].with_name(f".{steps[0].name}.old") / "of a removal that failed"):
        path.mkdir(parents=True)
    moved = run_folder.prune(tmp_path, keep_last=1, keep_every=0)
    assert moved == [steps[1].with_name(f".{steps[1].name}.old")] and list(run_folder.checkpoints(tmp_path)) == [1, 3]
    assert f"{steps[0]} is no longer kept, and cannot be moved away: Directory not empty" in caplog.text

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path / ".nfs0001"))

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", busy)
        run_folder.tidy(tmp_path)
    assert f"{moved[0] / '.nfs0001'} is not removed: Device or resource busy" in caplog.text and moved[0].is_dir()
    (steps[0].parent / ".snapshot").mkdir()  # a file system's own
    run_folder.tidy(tmp_path)
    assert sorted(path.name for path in steps[0].parent.iterdir()) == [".snapshot", steps[0].name, steps[2].name]
