"""A preparation that ends early: whole shards stay and are gone on from, and nothing half-written is ever read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_prism.core.config import DecontaminateConfig, KeepConfig, PartConfig, PrepareConfig, TurnsConfig
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.core.load import to_yaml
from megatron_prism.data import indexed
from megatron_prism.jobs import prepare
from megatron_prism.prepare import shards, workspace


@pytest.fixture
def config(make_config: Callable[..., PrepareConfig], corpus: Path) -> PrepareConfig:
    """A source of four files, half of each like half of the one before, and one of a single file."""
    for number in range(4):
        records = [
            json.dumps({"text": f"document {index}: " + "odd numbers " * (index % 5)}) for index in range(30 * number, 30 * number + 60)
        ]
        (corpus / f"many{number}.jsonl").write_text("\n".join(records))
    return make_config(
        qa={"name": "many", "path": (str(corpus / "many?.jsonl"),), "text": "{text}", "dedup": "exact", "valid_percent": 10.0}
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return all that was written but the time of it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture
def whole(config: PrepareConfig) -> dict[str, bytes]:
    """What a run without a break writes."""
    prepare.run(config)
    found = contents(config.out)
    shutil.rmtree(config.out)
    return found


def test_equal_documents_of_several_files_are_written_once(config: PrepareConfig) -> None:
    source = prepare.run(config)["sources"][0]
    assert source["train_documents"] + source["valid_documents"] == 150 and source["left_out"] == {"dedup": 90}
    assert [shard["left_out"].get("dedup", 0) for shard in source["shards"]] == [0, 30, 30, 30]


@pytest.mark.parametrize("file", [".bin", ".idx", ".json", "manifest.json"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_full_disk_at_any_file_is_gone_on_from(
    config: PrepareConfig,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk is full when the bytes of the n-th file of a kind are to reach it."""
    real, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        count += file in path and (file != ".json" or "manifest" not in path)
        if count >= number and file in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    if file == "manifest.json" and number == 3:
        pytest.skip("there is one")
    with pytest.raises(EnvironmentFault, match=r"No space left on device; nothing was written to") as caught:
        prepare.run(config)
    assert caught.value.exit_code == 4 and not config.out.exists()
    partial = config.out.with_name("out.partial")
    assert not list(partial.rglob("*.tmp"))
    kept = sorted(path.name for path in partial.glob("*/*.json"))
    assert ("whole shards stay" in caplog.text) == bool(kept) == partial.exists()
    monkeypatch.setattr(os, "fsync", real)
    stand = {(path.parent.name, int(path.stem)) for path in partial.glob("*/*.json")}
    made: set[tuple[str, int]] = set()

    def write(folder: Path, number: int, *rest: object, write: Callable = shards.write) -> object:
        made.add((folder.name, number))
        return write(folder, number, *rest)

    monkeypatch.setattr(shards, "write", write)
    prepare.run(config)
    assert contents(config.out) == whole and not partial.exists()
    assert made == {("many", 0), ("many", 1), ("many", 2), ("many", 3), ("prose", 0)} - stand


def stop(config: PrepareConfig) -> Path:
    """Return the folder of a run that ends just before its end: every shard is there, and no manifest of the mixture."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EnvironmentFault):
        patch.setattr(prepare.workspace, "tidy", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        prepare.run(config)
    partial = config.out.with_name("out.partial")
    assert len(list(partial.glob("*/*.json"))) == 5
    return partial


@pytest.fixture
def stopped(config: PrepareConfig, whole: dict[str, bytes]) -> Path:
    return stop(config)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "00001.train.bin": cut,
    "00001.train.idx": Path.unlink,
    "00001.json": cut,
    "00001.valid.bin": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_shard_that_is_not_whole_is_written_again(config: PrepareConfig, whole: dict[str, bytes], stopped: Path, name: str) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in stopped.glob("many/*.json")}
    DAMAGE[name](stopped / "many" / name)
    prepare.run(config)
    after = {path.name: path.stat().st_mtime_ns for path in config.out.glob("many/*.json")}
    assert contents(config.out) == whole
    assert [number for number in range(4) if after[f"0000{number}.json"] != before[f"0000{number}.json"]] == [1]


def test_a_shard_of_another_file_is_written_again_and_those_that_depend_on_it(config: PrepareConfig, stopped: Path, corpus: Path) -> None:
    """File 1 loses a record that the third has too: with dedup every later shard follows from it."""
    lines = (corpus / "many1.jsonl").read_text().splitlines()
    (corpus / "many1.jsonl").write_text("\n".join(lines[:-1]))
    before = {path.name: path.stat().st_mtime_ns for path in stopped.glob("many/*.json")}
    source = prepare.run(config)["sources"][0]
    assert [shard["left_out"].get("dedup", 0) for shard in source["shards"]] == [0, 30, 29, 30]
    after = {path.name: path.stat().st_mtime_ns for path in config.out.glob("many/*.json")}
    assert [number for number in range(4) if after[f"0000{number}.json"] != before[f"0000{number}.json"]] == [1, 2, 3]


def test_what_another_config_left_is_not_taken(config: PrepareConfig, whole: dict[str, bytes], stopped: Path) -> None:
    shutil.copytree(stopped / "many", stopped / "old")
    shutil.copy(stopped / "many" / "00003.json", stopped / "many" / "00004.json")
    changed = replace(config, append_eos=False)
    assert prepare.run(changed)["sources"][0]["train_tokens"] < sum(
        shard["train"]["num_tokens"] for shard in map(json.loads, shards_of(whole))
    )
    assert set(contents(config.out)) == set(whole)


def shards_of(found: dict[str, bytes]) -> list[bytes]:
    return [data for name, data in found.items() if name.startswith("many/") and name.endswith(".json")]


def test_bad_record_in_a_later_file_keeps_the_earlier_ones(config: PrepareConfig, whole: dict[str, bytes], corpus: Path) -> None:
    good = (corpus / "many2.jsonl").read_text()
    (corpus / "many2.jsonl").write_text(good + "\n{")
    with pytest.raises(InputError, match=r"many2.jsonl:61: found a line that is not JSON"):
        prepare.run(config)
    assert sorted(path.name for path in config.out.with_name("out.partial").glob("*/*.json")) == ["00000.json", "00001.json"]
    (corpus / "many2.jsonl").write_text(good)
    prepare.run(config)
    assert contents(config.out) == whole


SLOW = """
import sys, time
from megatron_prism.prepare import shards, workspace

def write(folder, number, *rest, real=shards.write):
    if number == 2:
        print("here", flush=True)
        time.sleep(60)
    return real(folder, number, *rest)

if __name__ == "__main__":
    shards.write = write
    from megatron_prism.cli.entry import app
    app(["prepare", sys.argv[1]])
"""


def test_a_killed_run_is_gone_on_from(config: PrepareConfig, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    partial = config.out.with_name("out.partial")
    (tmp_path / "slow.py").write_text(SLOW)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline() == "here\n"
        with pytest.raises(EnvironmentFault, match=rf"out.partial: process {process.pid} on .* writes there"):
            prepare.run(config)
        process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in partial.glob("*/*.json")) == ["00000.json", "00001.json"]
    prepare.run(config)
    assert contents(config.out) == whole and not partial.exists()


def test_only_shards_that_are_whole_are_read(config: PrepareConfig) -> None:
    prepare.run(config)
    folder = config.out / "many"
    made_from = json.loads((folder / "00000.json").read_text())["made_from"]
    assert shards.read(folder, 0, made_from) is not None
    assert shards.read(folder, 0, "else") is None and shards.read(folder, 9, made_from) is None
    indexed.idx_path(folder / "00000.valid").unlink()
    assert shards.read(folder, 0, made_from) is None


def test_another_end_of_a_document_is_another_shard(config: PrepareConfig, stopped: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """The tokenizer.json is the same, its EOS is named elsewhere."""
    other = Path(shutil.copytree(tokenizer_folder, tmp_path / "other"))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<unk>"}))
    prepare.run(replace(config, tokenizer=other))
    for name in ("many", "prose"):
        reader = indexed.Reader([config.out / name / "00000.train"])
        assert reader.tokens(reader.num_tokens - 1, 1) == [0]


def test_another_named_end_token_is_another_shard(config: PrepareConfig, corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """It becomes special by its name alone: a text that spells it gets its id no longer. tokenizer.json and the EOS stay."""
    other = Path(shutil.copytree(tokenizer_folder, tmp_path / "other"))
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(other / "tokenizer.json"))
    with (corpus / "many1.jsonl").open("a") as stream:
        stream.write('\n{"text": "one <think> two"}')

    def has_id(folder: Path) -> bool:
        reader = indexed.Reader([folder / "many/00001.train"])
        return tokenizer.token_to_id("<think>") in reader.tokens(0, reader.num_tokens)

    config = replace(config, tokenizer=other)
    assert has_id(stop(config))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokenizer.token_to_id("<think>")]}))
    prepare.run(config)
    assert not has_id(config.out)


READINGS = {
    "text": {"text": "{other}"},
    "turns": {"turns": TurnsConfig(field="turns")},
    "keep": {"keep": (KeepConfig(field="text", equals="document 33"),)},
}


@pytest.mark.parametrize("changed", READINGS)
def test_evaluation_texts_that_are_read_another_way_make_other_shards(config: PrepareConfig, corpus: Path, changed: str) -> None:
    """Of the same file: in a run that is gone on from, and in a mixture that is reused. One that only moved is reused."""
    spoken = [{"role": "user", "content": "document 22"}]
    lines = [{"text": f"document {number}", "other": "document 11", "turns": spoken} for number in (33, 44)]
    (corpus / "evaluation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shutil.copy(corpus / "evaluation.jsonl", corpus / "moved.jsonl")

    def against(out: str, file: str = "evaluation.jsonl", **reading: Any) -> PrepareConfig:
        part = PartConfig(path=(str(corpus / file),), **reading)
        return replace(config, out=config.out.with_name(out), decontaminate=DecontaminateConfig(against=(part,), shortest=1))

    prepare.run(first := against("first"))
    prepare.run(fresh := against("fresh", **READINGS[changed]))
    assert contents(fresh.out) != contents(first.out)
    stop(against("out"))
    prepare.run(resumed := against("out", **READINGS[changed]))
    prepare.run(reusing := replace(against("reusing", **READINGS[changed]), reuse=first.out))
    assert contents(resumed.out) == contents(reusing.out) == contents(fresh.out)
    prepare.run(moved := replace(against("moved", "moved.jsonl"), reuse=first.out))
    assert (moved.out / "prose/00000.train.bin").samefile(first.out / "prose/00000.train.bin")


def test_a_file_that_cannot_grow_ends_the_run_and_is_gone_on_from(config: PrepareConfig, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A write that fails half-way, as on a full disk or under a quota: the limit is below the largest file's size."""
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    limit = max(map(len, whole.values())) - 100
    command = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); from megatron_prism.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", command, "prepare", str(tmp_path / "config.yaml")], capture_output=True, text=True)
    assert done.returncode == 4 and "File too large; nothing was written to" in done.stderr and "Traceback" not in done.stderr
    assert not config.out.exists() and not list(tmp_path.rglob("*.tmp"))
    prepare.run(config)
    assert contents(config.out) == whole


def test_bad_records_skipped_before_are_named_once_they_are_an_error(config: PrepareConfig, corpus: Path) -> None:
    (corpus / "many1.jsonl").write_text((corpus / "many1.jsonl").read_text() + "\n{")
    (corpus / "many3.jsonl").write_text("bad")
    skipping = replace(config, on_bad_record="skip", max_epochs=1e-9)
    with pytest.raises(InputError, match="max_epochs"):
        prepare.run(skipping)
    with pytest.raises(InputError, match=r"many1.jsonl:61: found a line that is not JSON"):
        prepare.run(config)


def test_a_shard_whose_keys_are_gone_is_made_again_where_they_are_needed(
    config: PrepareConfig, whole: dict[str, bytes], stopped: Path
) -> None:
    """As after a crash between the tidying and the renaming, and an input that is then changed and changed back."""
    for path in stopped.glob("*/*.keys.npy"):
        path.unlink()
    (stopped / "many" / "00003.json").unlink()
    prepare.run(config)
    assert contents(config.out) == whole


def test_out_as_a_link_is_written_through_and_a_mount_point_refused(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/out").symlink_to(tmp_path / "disk/real")
    with workspace.folder(tmp_path / "here/out") as work:
        assert work.parent == tmp_path / "disk" and [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
        (work / "file").write_text("x")
    assert (tmp_path / "here/out/file").read_text() == "x"
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mount")
    (tmp_path / "mount").mkdir()
    with pytest.raises(InputError, match="mount: found the mount point of a disk"):
        prepare.run(replace(config, out=tmp_path / "mount"))
    assert not list(tmp_path.glob("mount*/*")) and not list(tmp_path.glob("mount.*"))
