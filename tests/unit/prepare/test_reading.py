"""With `tokens`, what is read of a source: pieces by lot, up to the document where it is enough; the same on any tasks, and gone on from."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_prism.core.config import DataConfig, KeepConfig, PackingConfig, PrepareConfig, SampleConfig, SourceConfig
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.core.load import to_yaml
from megatron_prism.data import indexed, mixture, segments, tokenizer
from megatron_prism.jobs import prepare
from megatron_prism.prepare import pieces, shards, sources

WORDS = ("prime", "sum", "of", "two", "odd", "numbers", "is", "even", "above", "so", "their", "product", "stays", "a", "the", "and")
NUM_FILES, NUM_RECORDS = 4, 400


def record(draw: random.Random, index: int) -> dict[str, Any]:
    special = "</s>" * (index % 4)  # which is counted, and is text
    return {"text": f"{index}: " + " ".join([*draw.choices(WORDS, k=draw.randint(5, 40)), special]), "score": draw.randint(0, 4)}


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Return a folder of .jsonl and .parquet files, NUM_RECORDS records each, some twice and some bad."""
    folder, draw = tmp_path / "many", random.Random(5)
    folder.mkdir()
    for number in range(NUM_FILES):
        records = [record(draw, NUM_RECORDS * number + index) for index in range(NUM_RECORDS)]
        records[7::9] = [record(random.Random(index % 40), 9_000_000 + index % 40) for index in range(len(records[7::9]))]
        lines = [json.dumps(each) for each in records]
        lines[3] = "{"
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
        pq.write_table(pa.Table.from_pylist(records), folder / f"{number}.parquet", row_group_size=40)
    return folder


@pytest.fixture
def config(many: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Two sources that hold several times what is needed of them, one that holds too little; pieces of 2 KiB."""
    monkeypatch.setattr(pieces, "LEAST_BYTES", 2 << 10)
    common = {"keep": (KeepConfig(field="score", at_least=1),)}
    listed = (
        SourceConfig(name="lines", path=(str(many / "*.jsonl"),), weight=40, dedup="exact", valid_percent=5, **common),
        SourceConfig(name="rows", path=(str(many / "*.parquet"),), weight=50, **common),
        SourceConfig(name="small", path=(str(many / "0.parquet"),), weight=10, sample=SampleConfig(counts={"all": 30})),
    )
    return PrepareConfig(
        out=tmp_path / "out", tokenizer=tokenizer_folder, sources=listed, num_workers=1, tokens=30_000, on_bad_record="skip"
    )


def contents(folder: Path) -> dict[str, Any]:
    """Return all that was written, of the manifest what is the same in each run."""
    files: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    return files | {key: manifest[key] for key in ("inputs", "sources", "blend")}


def beside(config: PrepareConfig, name: str, **changes: Any) -> PrepareConfig:
    """Return a config that writes another folder."""
    return replace(config, out=config.out.with_name(name), **changes)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the shards that are made from text, as they are: (source, number)."""
    made: list[tuple[str, int]] = []

    def write(folder: Path, number: int, *rest: Any, write: Callable[..., Any] = shards.write) -> Any:
        made.append((folder.name, number))
        return write(folder, number, *rest)

    monkeypatch.setattr(shards, "write", write)
    return made


def test_what_is_needed_is_read_and_the_rest_is_named(config: PrepareConfig, many: Path) -> None:
    result = prepare.run(config)
    lines, rows, small = result["sources"]
    for source, weight in ((lines, 40), (rows, 50)):
        need = 30_000 * weight / 100 * 1.02
        assert need <= source["train_tokens"] < need + 250, "a document has fewer tokens"
        facts = source["reading"]
        assert facts["num_files"] == NUM_FILES and not facts["unread_files"], "the lot spreads over all files"
        assert facts["is_last_cut"] and facts["num_bytes"] < 0.25 * (facts["num_bytes"] + facts["unread_bytes"])
        whole = prepare.run(beside(config, f"all_{weight}", tokens=None))["sources"][0 if weight == 40 else 1]["train_tokens"]
        assert facts["unread_tokens_estimate"] == pytest.approx(whole - source["train_tokens"], rel=0.15)
    assert all(source["special_tokens_in_text"]["texts"] > 0.5 * source["train_documents"] for source in (lines, rows))
    assert small["epochs"] > 1 and small["train_documents"] == 30 and not small["reading"]["unread_bytes"], "it holds less than is needed"
    assert [part["share"] for part in result["blend"]["sources"]] == [0.4, 0.5, 0.1]
    read = [name for name in result["inputs"] if "many" in name]
    assert sum("jsonl [bytes" in name for name in read) == lines["reading"]["num_pieces"] and str(many / "1.jsonl") not in read
    assert [source["shards"][0]["input"] in read for source in (lines, rows)] == [True, True]


def test_all_is_read_where_that_is_asked_for(config: PrepareConfig) -> None:
    whole, asked = prepare.run(beside(config, "whole", tokens=None)), prepare.run(config := beside(config, "asked", read="all"))
    assert [source["shards"] for source in asked["sources"]] == [source["shards"] for source in whole["sources"]]
    assert len(asked["sources"][0]["shards"]) == NUM_FILES and all(not source["reading"]["unread_pieces"] for source in asked["sources"])
    assert not list(config.out.glob("*/*.npy"))


def test_a_file_that_is_not_read_is_only_counted(config: PrepareConfig, many: Path) -> None:
    few = beside(config, "few", tokens=600)
    first = prepare.run(few)
    unread = first["sources"][1]["reading"]["unread_files"]
    assert len(unread) == 3 and all(Path(path).stat().st_size == size_bytes for path, size_bytes in unread.items())
    assert prepare.run(few) == first
    path = Path(next(iter(unread)))
    path.write_bytes(data := path.read_bytes() + b"x")
    with pytest.raises(InputError, match=rf"a mixture prepared before .*{path.name} changed|{path.name}: found damaged"):
        prepare.run(few)
    path.write_bytes(data[:-1])
    (many / "9.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"a mixture prepared before .*9.jsonl.* changed"):
        prepare.run(few)


def test_a_file_that_changed_is_named_once_however_many_pieces_of_it_were_read(config: PrepareConfig, many: Path) -> None:
    prepare.run(config)
    (many / "1.jsonl").write_text((many / "1.jsonl").read_text().replace("odd", "add"))
    with pytest.raises(InputError, match=r"a mixture prepared before \S*/1.jsonl changed"):
        prepare.run(config)


def test_a_source_whose_part_is_less_than_a_token_has_a_document(config: PrepareConfig) -> None:
    heavy, light, _ = config.sources
    result = prepare.run(replace(config, sources=(replace(heavy, weight=99.999), replace(light, weight=0.001)), tokens=1000))
    assert [source["tokens"] for source in result["sources"]] == [1000, 0] and result["sources"][1]["train_documents"] == 1


def test_the_bytes_are_those_of_any_tasks_even_where_one_is_killed(config: PrepareConfig, written: list, monkeypatch: Any) -> None:
    prepare.run(config)
    whole = contents(config.out)
    by_tasks = beside(config, "tasks")
    for task in range(4):
        assert not by_tasks.out.exists()
        prepare.run_task(by_tasks, task, 4)
    in_tasks = set(written)
    written.clear()
    prepare.run(by_tasks)
    assert contents(by_tasks.out) == whole and len(in_tasks) > 20 and len(written) <= 4, "what is left is the last shard of a source, or so"

    stopped = beside(config, "stopped")
    for place in (("lines", 9), ("rows", 5)):
        with monkeypatch.context() as patch, pytest.raises(EnvironmentFault):
            patch.setattr(shards, "write", kill_at(place))
            prepare.run(stopped)
    written.clear()
    prepare.run(stopped)
    assert contents(stopped.out) == whole and not any(name == "rows" and number < 5 for name, number in written)

    killed = beside(config, "killed")
    for task in (3, 1, 0, 2):
        with monkeypatch.context() as patch:
            if task == 1:
                patch.setattr(shards, "write", kill_at(("rows", 5)))
                with pytest.raises(EnvironmentFault):
                    prepare.run_task(killed, task, 4)
                patch.undo()
        before = {path: path.stat().st_mtime_ns for path in killed.out.with_name("killed.partial").glob("*/*.json")}
        prepare.run_task(killed, task, 4)
        (killed.out.with_name("killed.partial") / "rows" / ".00009.train.bin.99.tmp").write_bytes(b"what a killed process leaves")
        assert before.items() <= {path: path.stat().st_mtime_ns for path in killed.out.with_name("killed.partial").glob("*/*.json")}.items()
    prepare.run(replace(killed, num_workers=2))
    assert contents(killed.out) == whole
    assert prepare.run_task(killed, 0, 4)["shards"] == {}, "it is prepared already"


def kill_at(place: tuple[str, int]) -> Callable[..., Any]:
    def write(folder: Path, number: int, *rest: Any, write: Callable[..., Any] = shards.write) -> Any:
        if (folder.name, number) == place:
            raise EnvironmentFault("killed")
        return write(folder, number, *rest)

    return write


def test_tasks_keep_out_of_the_way_of_the_job_that_finishes(config: PrepareConfig) -> None:
    code = "import sys, pathlib; from megatron_prism.prepare import workspace\nwith workspace.of_task(pathlib.Path(sys.argv[1]), 0): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(config.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        with pytest.raises(EnvironmentFault, match=rf"process {process.pid} on .* writes there"):
            prepare.run(config)
        with pytest.raises(EnvironmentFault, match=rf"process {process.pid} on .* writes there"):
            prepare.run_task(config, 0, 2)
        process.kill()
    with pytest.raises(InputError, match=r"--task: found 4/4; required I/N, with I from 0 to N - 1 = 3"):
        prepare.run_task(config, 4, 4)


def test_one_of_several_tasks_draws_a_sample_and_the_others_wait(config: PrepareConfig, tmp_path: Path) -> None:
    held_out = replace(config.sources[1], valid_path=(str(tmp_path / "many" / "0.parquet"),), weight=50)
    sampled = replace(config.sources[2], path=(str(tmp_path / "many" / "*.parquet"),), sample=SampleConfig(counts={"all": 900}), weight=50)
    config = replace(config, sources=(sampled, held_out), tokens=20_000)
    result = prepare.run(config)
    assert [source["valid_documents"] > 0 for source in result["sources"]] == [False, True]
    by_tasks = beside(config, "tasks")
    (tmp_path / "tasks.yaml").write_text(to_yaml(by_tasks))
    code = "import sys; from megatron_prism.prepare import pieces; pieces.LEAST_BYTES = 2048; from megatron_prism.cli import main; main()"
    command = [sys.executable, "-c", code, "prepare", str(tmp_path / "tasks.yaml"), "--task"]
    tasks = [subprocess.Popen([*command, f"{task}/3"], stderr=subprocess.PIPE, text=True) for task in range(3)]
    said = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    prepare.run(by_tasks)
    assert contents(by_tasks.out) == contents(config.out)
    assert len([name for name in result["inputs"] if name.endswith(".parquet")]) == NUM_FILES, "the sampled files are hashed whole"


def test_more_is_added_without_making_again_what_is_there(config: PrepareConfig, written: list, many: Path) -> None:
    prepare.run(config)
    small = contents(config.out)
    fresh = prepare.run(beside(config, "fresh", tokens=60_000))
    written.clear()
    with pytest.raises(
        InputError, match=r"another config; required the same config; choose another out, with reuse=.*out: only what it lacks"
    ):
        prepare.run(replace(config, tokens=60_000))
    more = beside(config, "more", tokens=60_000, reuse=config.out)
    assert [source["shards"] for source in prepare.run(more)["sources"]] == [source["shards"] for source in fresh["sources"]]
    assert contents(more.out) == contents(more.out.with_name("fresh")) and contents(config.out) == small
    first = {source["name"]: len(source["shards"]) - 1 for source in small["sources"]}
    new = {(source["name"], number) for source in fresh["sources"][:2] for number in range(first[source["name"]], len(source["shards"]))}
    made = {(name, number) for name, number in written if name != "small"}
    assert new <= made and all(number >= first[name] for name, number in made), "what was cut, and what is new"
    assert (more.out / "rows/00000.train.bin").samefile(config.out / "rows/00000.train.bin")
    written.clear()
    for task in range(2):
        prepare.run_task(by_tasks := beside(config, "by_tasks", tokens=60_000, reuse=config.out), task, 2)
    prepare.run(by_tasks)
    assert contents(by_tasks.out) == contents(more.out)
    assert not {(name, number) for name, number in written if name != "small" and number < first[name]}
    less = beside(config, "less", tokens=15_000, reuse=more.out)
    prepare.run(less)
    prepare.run(beside(config, "less_fresh", tokens=15_000))
    assert contents(less.out) == contents(less.out.with_name("less_fresh"))


def test_a_file_that_is_added_leaves_what_was_made_of_the_others(config: PrepareConfig, written: list, many: Path) -> None:
    """Its pieces take their places among the others', whose numbers change."""
    rows = replace(config, sources=(replace(config.sources[1], weight=100),))
    prepare.run(rows)
    shutil.copy(many / "2.parquet", many / "9.parquet")
    written.clear()
    more = beside(rows, "more", tokens=50_000, reuse=rows.out)
    source = prepare.run(more)["sources"][0]
    num_made = len(written)
    prepare.run(beside(rows, "fresh", tokens=50_000))
    assert contents(more.out) == contents(more.out.with_name("fresh"))
    inputs = {shard["input"] for shard in source["shards"]}
    old = {shard["input"] for shard in json.loads((rows.out / "manifest.json").read_text())["sources"][0]["shards"][:-1]}
    assert old < inputs and any("9.parquet" in name for name in inputs)
    assert num_made == len(inputs - old)


def test_a_copy_is_dropped_wherever_its_first_is(config: PrepareConfig, tokenizer_folder: Path) -> None:
    """Every text of the mixture is there once, whichever piece and task it came from; without dedup it is not."""
    one = replace(config, sources=(replace(config.sources[0], weight=100, valid_percent=0),), tokens=50_000)
    prepare.run(one)
    texts = decoded(one, tokenizer_folder)
    assert len(texts) == len(set(texts)) > 500
    plain = beside(one, "plain", sources=(replace(one.sources[0], dedup="none"),))
    prepare.run(plain)
    again = decoded(plain, tokenizer_folder)
    assert len(again) > len(set(again)), "else there was nothing to drop"
    assert texts[: len(set(again))] == list(dict.fromkeys(again))[: len(texts)], "the first of equal ones stays, in the order of the lot"


def test_with_packing_the_budget_is_one_epoch(config: PrepareConfig) -> None:
    for source in prepare.run(replace(config, packing=PackingConfig(seq_length=128)))["sources"][:2]:
        assert 0.9 < source["epochs"] <= 1


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".txt", ".json"])
def test_a_file_of_one_piece_is_read_from_its_start_as_far_as_needed(config: PrepareConfig, many: Path, suffix: str) -> None:
    """A .json file of lines has pieces as a .jsonl file has."""
    texts = [json.loads(line)["text"] for line in (many / "0.jsonl").read_text().splitlines() if line != "{"]
    data = ("\n\n".join(texts) if suffix == ".txt" else "\n".join(json.dumps({"text": text}) for text in texts)).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(suffix).suffix, bytes)
    (many / f"one{suffix}").write_bytes(pack(data))
    source = SourceConfig(name="one", path=(str(many / f"one{suffix}"),), weight=100, split="paragraph")
    result = prepare.run(replace(config, sources=(source,), tokens=5_000))["sources"][0]
    assert 5_100 <= result["train_tokens"] < 5_350 and result["reading"]["is_last_cut"]
    assert (result["reading"]["num_pieces"] == 1) == (suffix != ".json")


def test_the_lot_spreads_and_depends_on_seed_and_names_alone(many: Path, config: PrepareConfig, tmp_path: Path) -> None:
    (files, *_) = sources.find(config.sources)
    lot = pieces.in_lot_order(files, 1, "lines")
    assert len(lot) > 60 and sorted(piece.file.name for piece in lot) != [piece.file.name for piece in lot]
    covered = sorted((piece.file.path, piece.file.span) for piece in lot)
    for (path, span), (next_path, next_span) in itertools.pairwise(covered):
        assert span[1] == next_span[0] if path == next_path else (span[1], next_span[0]) == (path.stat().st_size, 0)
    for count in (8, 20, 60):
        shares = [sum(piece.file.path == file.path for piece in lot[:count]) for file in files]
        assert max(shares) - min(shares) <= 2
    moved = Path(shutil.copytree(many, tmp_path / "elsewhere" / "many"))
    (there, *_) = sources.find((replace(config.sources[0], path=(f"{moved}/*.jsonl",)),))
    order = [(piece.file.path.name, piece.file.span) for piece in lot]
    assert [(piece.file.path.name, piece.file.span) for piece in pieces.in_lot_order(there, 1, "lines")] == order
    for seed, source in ((2, "lines"), (1, "rows")):
        assert [(piece.file.path.name, piece.file.span) for piece in pieces.in_lot_order(there, seed, source)] != order


@pytest.mark.parametrize(("num_bytes", "size"), [(10**3, 1 << 14), (10**8, 1 << 15), (6 * 10**10, 1 << 24), (10**13, 1 << 26)])
def test_pieces_are_some_thousands_of_a_source_within_bounds(num_bytes: int, size: int) -> None:
    assert pieces.piece_bytes(num_bytes) == size


def decoded(config: PrepareConfig, folder: Path) -> list[str]:
    spec = tokenizer.load(folder, need_eos=True)
    reader = indexed.Reader(mixture.read_prepared(config.out).sources[0].train.prefixes)
    starts = [reader.start(document) for document in range(reader.num_documents + 1)]
    return [tokenizer.decode(reader.tokens(start, end - start), spec) for start, end in itertools.pairwise(starts)]


def test_a_run_that_repeats_what_is_left_unread_says_so(config: PrepareConfig) -> None:
    prepare.run(config)

    def said(num_sequences: int) -> list[str]:
        read = segments.read(DataConfig(prepared=config.out, seq_length=64), 4, 1)
        return segments.repeated(segments.realised(read, num_sequences), read)

    assert not said(450)
    lines, rows = said(900)
    assert re.fullmatch(r"source lines is read 1\.\d\d times while 8\d % of its bytes are unread: prepare more tokens", lines)
    assert rows.startswith("source rows is read 1.") and "small" not in lines + rows, "of small nothing is left"


def test_more_shards_are_read_than_files_may_be_open_at_first(config: PrepareConfig) -> None:
    """As at the paper's size, where a source has hundreds of shards and a shell allows 1,024 open files."""
    prepare.run(config)
    code = """
import resource, sys
from pathlib import Path
from megatron_prism.data import mixture
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))
readers = [source.reader(None) for source in mixture.read_prepared(Path(sys.argv[1])).sources for _ in range(20)]
print(sum(len(source.train.prefixes) for source in mixture.read_prepared(Path(sys.argv[1])).sources) * 40)
"""
    done = subprocess.run([sys.executable, "-c", code, str(config.out)], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 1000, done.stderr[-2000:]


def test_duplicates_are_found_in_more_shards_than_files_may_be_open_at_first(tmp_path: Path, tokenizer_folder: Path) -> None:
    """As of a source that is read whole, in some 2,000 pieces, or that has as many files."""
    for number in range(120):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"number {number % 100}"}) + "\n")
    source = SourceConfig(name="files", path=(str(tmp_path / "*.jsonl"),), weight=100, dedup="exact")
    file = tmp_path / "mixture.yaml"
    file.write_text(to_yaml(PrepareConfig(out=tmp_path / "out", tokenizer=tokenizer_folder, sources=(source,), num_workers=1)))
    code = """
import resource, sys
from megatron_prism.cli.entry import main
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 4096))
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "prepare", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert mixture.read_prepared(tmp_path / "out").sources[0].train.num_documents == 100
