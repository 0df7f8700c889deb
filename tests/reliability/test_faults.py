"""Promises of docs/RELIABILITY.md in one process: damaged checkpoints, a full disk, writers that die or hang, numbers that go wrong.

Each fault is built into a child of tests/reliability/worker.py, which then runs `jobs/train.run` as the command line does.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.checkpoint import folder, integrity, run_folder

from .conftest import losses

pytestmark = pytest.mark.slow

Damage = Callable[[Path, Path], Any]  # (the newest checkpoint, the one before)


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda newest, before: (newest / name).write_bytes(change((newest / name).read_bytes()))


def flip(name: str, part: float) -> Damage:
    def change(data: bytes) -> bytes:
        place = int(len(data) * part)
        return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

    return rewrite(name, change)


def take_from_before(name: str) -> Damage:
    return lambda newest, before: shutil.copyfile(before / name, newest / name)


TENSORS = "state/__0_0.distcp"
DAMAGES: dict[str, Damage] = {
    "tensors cut in half": rewrite(TENSORS, lambda data: data[: len(data) // 2]),
    "tensors short of a byte": rewrite(TENSORS, lambda data: data[:-1]),
    "tensors empty": rewrite(TENSORS, lambda data: b""),
    "tensors gone": lambda newest, before: (newest / TENSORS).unlink(),
    "a bit flipped at the start": flip(TENSORS, 0.0),
    "a bit flipped in the middle": flip(TENSORS, 0.5),
    "a bit flipped at the end": flip(TENSORS, 0.999),
    "a hole of zeros": rewrite(TENSORS, lambda data: data[:4096] + bytes(4096) + data[8192:]),
    "a byte more": rewrite(TENSORS, lambda data: data + b"\0"),
    "metadata gone": lambda newest, before: (newest / "state/.metadata").unlink(),
    "metadata cut off": rewrite("state/.metadata", lambda data: data[:-10]),
    "metadata flipped": flip("state/.metadata", 0.4),
    "Megatron's marker gone": lambda newest, before: (newest / "state/metadata.json").unlink(),
    "Megatron's marker cut off": rewrite("state/metadata.json", lambda data: data[:5]),
    "prism.json gone": lambda newest, before: (newest / folder.META).unlink(),
    "prism.json cut off": rewrite(folder.META, lambda data: data[: len(data) // 2]),
    "another step in prism.json": rewrite(folder.META, lambda data: data.replace(b'"step": 4', b'"step": 5')),
    "sums gone": lambda newest, before: (newest / integrity.SUMS).unlink(),
    "sums flipped": flip(integrity.SUMS, 0.3),
    "tensors of the checkpoint before": take_from_before(TENSORS),
    "metadata of the checkpoint before": take_from_before("state/.metadata"),
    "sums of the checkpoint before": take_from_before(integrity.SUMS),
    "the checkpoint before under this name": lambda newest, before: (shutil.rmtree(newest), shutil.copytree(before, newest)),
    "a stale file too many": lambda newest, before: shutil.copyfile(before / TENSORS, newest / "state/__7_0.distcp"),
    "nothing but a folder": lambda newest, before: (shutil.rmtree(newest), newest.mkdir()),
    "a tokenizer of another model": rewrite("hf/tokenizer.json", lambda data: data.replace(b"<unk>", b"<UNK>")),
}
WRITTEN = ("state/common.pt", TENSORS, "state/.metadata", "state/metadata.json", "hf", "prism.json", "SHA256SUMS")
FULL = (
    [*((TENSORS, part) for part in (0.01, 0.2, 0.6, 0.95)), ("state/.metadata", 0.1), ("state/.metadata", 0.6)]
    + [(path, 0.5) for path in ("state/common.pt", "hf", "prism.json")]
    + [("SHA256SUMS", -2.0)]
)
SLACK_KIB = 8  # for what the run writes beside the checkpoint
NONFINITE = ("loss nan", "gradient nan", "gradient inf", "weights nan", "loss spike")
POLICIES = ("stop", "skip", "rewind")


@pytest.fixture(scope="module")
def whole(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 6 steps with all its checkpoints."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    found = run_cases([{"name": "whole", "run_dir": run_dir, "config": {"save": {"keep_last": 9}}}])["whole"]
    assert found["code"] == 0, found["stderr"]
    return run_dir


@pytest.fixture(scope="module")
def damaged(run_cases: Any, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what became of runs that were cut off at step 4, whose newest checkpoint was damaged, and that went on."""
    root = tmp_path_factory.mktemp("damaged")
    for name, damage in [*DAMAGES.items(), ("all", DAMAGES["tensors gone"])]:
        shutil.copytree(whole, root / name)
        shutil.rmtree(run_folder.step_folder(root / name, 6))
        newest, before = run_folder.step_folder(root / name, 4), run_folder.step_folder(root / name, 2)
        damage(newest, before)
        if name == "all":
            damage(before, newest)
    cases: list[dict[str, Any]] = [
        {"name": name, "run_dir": root / name, "config": {"save": {"keep_last": 9}}} for name in [*DAMAGES, "all"]
    ]
    shutil.copytree(whole, root / "unreadable")
    shutil.rmtree(run_folder.step_folder(root / "unreadable", 6))
    cases.append({"name": "unreadable", "run_dir": root / "unreadable", "fault": {"kind": "unreadable", "within": "step_00000004/state"}})
    return run_cases(cases)


def test_a_checkpoint_that_cannot_be_read_now_is_no_damaged_one(damaged: dict[str, Any]) -> None:
    found, run_dir = damaged["unreadable"], Path(damaged["unreadable"]["run_dir"])
    assert found["code"] == 4 and "Input/output error" in found["stderr"], found["stderr"][-3000:]
    assert sorted(run_folder.checkpoints(run_dir)) == [2, 4] and not list((run_dir / "checkpoints").glob("damaged*"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_taken(damaged: dict[str, Any], whole: Path, damage: str) -> None:
    found = damaged[damage]
    assert found["code"] == 0, found["stderr"][-3000:]
    assert "step_00000004 is damaged, and now damaged_step_00000004_1; going on from step_00000002" in found["stderr"]
    assert "continuing after step 2" in found["stderr"]
    assert losses(Path(found["run_dir"])) == losses(whole)
    assert {step: integrity.check(path) for step, path in run_folder.checkpoints(Path(found["run_dir"])).items()} == {2: [], 4: [], 6: []}


def test_without_a_whole_checkpoint_a_run_ends_and_changes_nothing(damaged: dict[str, Any]) -> None:
    found = damaged["all"]
    assert (
        found["code"] == 2
        and "step_00000004/state/__0_0.distcp: found no such file" in found["stderr"]
        and "step_00000002" in found["stderr"]
    )
    assert list(run_folder.checkpoints(Path(found["run_dir"]))) == [2, 4]


def test_every_flipped_bit_is_seen(whole: Path, soak: int | None, seed: int) -> None:
    """Single bits of a real checkpoint, at random: --soak many."""
    root, chance = run_folder.step_folder(whole, 6), random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for _ in range(soak or 100):
        path = chance.choices(files, [path.stat().st_size + 100 for path in files])[0]
        place, bit = chance.randrange(max(path.stat().st_size, 1)), 1 << chance.randrange(8)
        with path.open("r+b") as stream:
            stream.seek(place)
            was = stream.read(1)
            stream.seek(place)
            stream.write(bytes([was[0] ^ bit]))
            stream.flush()
            assert integrity.check(root), f"{path}: byte {place}, bit {bit} (seed {seed})"
            stream.seek(place)
            stream.write(was)
    assert integrity.check(root) == []


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Path]]:
    """Return a function that makes a disk of so many KiB."""
    mounted: list[Path] = []

    def make(name: str, size_kib: int) -> Path:
        path = tmp_path_factory.mktemp("disks") / name.replace(" ", "_")
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            if os.environ.get("PRISM_REQUIRE_SHARED"):
                pytest.fail(f"no disk could be mounted: {done and done.stderr}")
            pytest.skip("mounting a small disk needs root")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def size_kib(*paths: Path) -> int:
    """Return what files take on a disk, in whole pages."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(-(-file.stat().st_size // 4096) * 4 for file in files)


@pytest.fixture(scope="module")
def starved(run_cases: Any, whole: Path, small_disk: Callable[[str, int], Path]) -> dict[str, Any]:
    """Return what became of runs that went on from step 2 on a disk that had room for step 4's checkpoint up to a part of a file."""
    cases, saved = [], run_folder.step_folder(whole, 4)
    used = size_kib(*(path for path in whole.iterdir() if path.name != "checkpoints"), run_folder.step_folder(whole, 2))
    for number, (path, part) in enumerate([*FULL, ("checked", 0.0)]):
        before = WRITTEN[: WRITTEN.index(path)] if path in WRITTEN else WRITTEN
        room = size_kib(*(saved / each for each in before)) + int(part * size_kib(saved / path) if path in WRITTEN else 0)
        run_dir = small_disk(f"{number}", used + room + SLACK_KIB) / "run"
        shutil.copytree(whole, run_dir, ignore=lambda path, names: [each for each in names if each in ("step_00000004", "step_00000006")])
        cases.append({"name": f"{path} {part}", "run_dir": run_dir, "fault": None if path == "checked" else {"kind": "full"}})
    return run_cases(cases)


@pytest.mark.parametrize("offset", [*(f"{path} {part}" for path, part in FULL), "checked 0.0"])
def test_a_full_disk_is_named_and_costs_no_older_checkpoint(starved: dict[str, Any], offset: str) -> None:
    found = starved[offset]
    run_dir = Path(found["run_dir"])
    assert found["code"] == 4, found["stderr"][-3000:]
    last = found["stderr"].strip().splitlines()[-1].lower()
    assert "no space left on device" in last and str(run_dir) in last, found["stderr"][-3000:]
    assert {step: integrity.check(path) for step, path in run_folder.checkpoints(run_dir).items()} == {2: []}
    assert not list((run_dir / "checkpoints").glob(".*"))


WRITERS = ("killed", "killed half-way", "stopped", "raises")


@pytest.fixture(scope="module")
def broken(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("writers")
    config = {"save": {"timeout_s": 3.0}}
    cases = [{"name": how, "run_dir": root / how, "config": config, "fault": {"kind": "writer", "how": how}} for how in WRITERS]
    hang = {"limits": {"hang_timeout_s": 15.0, "collective_timeout_s": 10.0}}
    cases += [
        {"name": "hang", "run_dir": root / "hang", "config": {**hang, "save": {"timeout_s": 5.0}}, "fault": {"kind": "hang", "step": 3}}
    ]
    twice = {"steps": 2, "save": {"timeout_s": 20.0}}
    cases += [{"name": "threads", "run_dir": root / "threads", "config": twice, "fault": {"kind": "threads"}}]
    return run_cases(cases)


@pytest.mark.parametrize("how", WRITERS)
def test_a_writer_that_dies_or_hangs_is_an_error(broken: dict[str, Any], how: str) -> None:
    found = broken[how]
    words = {
        "killed": "killed by SIGKILL",
        "killed half-way": "killed by SIGKILL",
        "stopped": "not written after 3 s",
        "raises": "No such file",
    }
    assert found["code"] == 4 and words[how] in found["stderr"] and "step_00000002 was not saved" in found["stderr"], found["stderr"][
        -3000:
    ]
    assert run_folder.checkpoints(Path(found["run_dir"])) == {} and not list(Path(found["run_dir"], "checkpoints").iterdir())


def test_a_process_with_threads_of_its_own_saves(broken: dict[str, Any]) -> None:
    """A forked process has none of its parent's OpenMP threads, and would wait for them for ever."""
    assert broken["threads"]["code"] == 0, broken["threads"]["stderr"][-3000:]


def test_a_step_that_hangs_ends_the_process_and_says_where(broken: dict[str, Any]) -> None:
    found = broken["hang"]
    assert found["code"] == 4
    assert "in step 3 for" in found["stderr"] and "sleepy" in found["stderr"], found["stderr"][-3000:]


@pytest.fixture(scope="module")
def nonfinite(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root, cases = tmp_path_factory.mktemp("nonfinite"), []
    for site in NONFINITE:
        for policy in POLICIES:
            guard = {"on_nonfinite": policy, "on_spike": policy, "spike_window": 3}
            fault = {"kind": "nonfinite", "site": site, "step": 6 if site == "weights nan" else 5}
            config = {"steps": 8, "guard": guard, "save": {"keep_last": 9}}
            cases.append(
                {"name": f"{site}/{policy}", "run_dir": root / f"{site}_{policy}".replace(" ", "_"), "config": config, "fault": fault}
            )
    once = {"steps": 8, "guard": {"on_nonfinite": "skip", "max_events": 0}}
    cases.append(
        {"name": "too many", "run_dir": root / "many", "config": once, "fault": {"kind": "nonfinite", "site": "loss nan", "step": 5}}
    )
    early = {"steps": 8, "guard": {"on_nonfinite": "rewind"}}
    cases.append(
        {"name": "too early", "run_dir": root / "early", "config": early, "fault": {"kind": "nonfinite", "site": "loss nan", "step": 1}}
    )
    last = {
        "steps": 8,
        "guard": {"on_nonfinite": "skip"},
        "save": {"keep_last": 9},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    }
    cases.append(
        {"name": "the last", "run_dir": root / "last", "config": last, "fault": {"kind": "nonfinite", "site": "weights nan", "step": 8}}
    )
    cases.append({"name": "without", "run_dir": root / "without", "config": {"steps": 8, "save": {"keep_last": 9}}})
    return run_cases(cases)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("site", NONFINITE)
def test_a_step_that_cannot_be_right_is_never_taken(nonfinite: dict[str, Any], site: str, policy: str) -> None:
    """Injected at step 5 (the weights after step 6, which is saved): before it nothing changes, no bad checkpoint stands."""
    found, right = nonfinite[f"{site}/{policy}"], nonfinite["without"]
    run_dir = Path(found["run_dir"])
    ours, theirs = losses(run_dir), losses(Path(right["run_dir"]))
    at = 6 if site == "weights nan" else 5
    before = {step: loss for step, loss in theirs.items() if step < at}
    assert {step: ours[step] for step in before} == before
    saved = {step: integrity.check(path) for step, path in run_folder.checkpoints(run_dir).items()}
    if policy == "stop":
        assert found["code"] == 1 and f"step {at}: " in found["stderr"].strip().splitlines()[-1], found["stderr"][-3000:]
        assert saved == {2: [], 4: []}
        return
    assert found["code"] == 0, found["stderr"][-3000:]
    assert saved == {2: [], 4: [], 6: [], 8: []}, "step 6, whose weights were not numbers, is that of the weights gone back to"
    assert all(loss is not None and loss < 20 for step, loss in ours.items() if step > at)
    assert ours[8] != theirs[8], "a step was passed over, and nothing changed"
    went_back = policy == "rewind" or site == "weights nan"
    assert ("back to the weights of step 4" in found["stderr"]) == went_back


def test_a_run_passes_over_so_many_steps_and_no_more(nonfinite: dict[str, Any]) -> None:
    assert nonfinite["too many"]["code"] == 1 and "guard.max_events" in nonfinite["too many"]["stderr"]
    assert nonfinite["too early"]["code"] == 1 and "no checkpoint to go back to" in nonfinite["too early"]["stderr"]


def test_the_last_step_is_saved_whatever_befell_it(nonfinite: dict[str, Any]) -> None:
    """Also where weights arrive with the next forward pass (overlap_param_gather): what is saved is what was gone back to."""
    found, run_dir = nonfinite["the last"], Path(nonfinite["the last"]["run_dir"])
    assert found["code"] == 0 and "back to the weights of step 6" in found["stderr"], found["stderr"][-3000:]
    assert list(run_folder.checkpoints(run_dir)) == [2, 4, 6, 8] and integrity.check(run_folder.step_folder(run_dir, 8)) == []


def test_a_step_passed_over_is_noted(nonfinite: dict[str, Any]) -> None:
    path = Path(nonfinite["gradient nan/skip"]["run_dir"]) / "metrics.jsonl"
    lines = {line["step"]: line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line}
    assert lines[5]["passed_over"] == 1.0 and lines[5]["grad_norm"] is None and "passed_over" not in lines[6]
