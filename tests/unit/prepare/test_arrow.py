"""Columnar files give the documents that the same records give as jsonl; damaged ones are refused, and bad rows named."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_prism.core.config import KeepConfig, SourceConfig, TurnsConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data import indexed, mixture
from megatron_prism.jobs import prepare
from megatron_prism.prepare import arrow, documents, sources

TEXT = "{question}\n{answer}"
ROWS = [
    {"question": f"question {index} \u00e9 " + "x" * (index % 50), "answer": index / 4, "meta": {"x": [index]}} for index in range(1000)
]
BATCH_ROWS = 300  # rows of a row group or a stream's batch: several, and the last one short


def write_parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, row_group_size=BATCH_ROWS, write_page_checksum=True)
    return path


def write_stream(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=BATCH_ROWS)
    return path


WRITERS = pytest.mark.parametrize(("write", "name"), [(write_parquet, "a.parquet"), (write_stream, "a.arrow")])


def save_to_disk(folder: Path, *tables: pa.Table) -> Path:
    """Write tables as `datasets` does, one file a shard."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{len(tables):05d}.arrow" for index in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        write_stream(folder / name, table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read(path: Path, **changes: Any) -> tuple[list[str], list[Problem]]:
    config = SourceConfig(**{"name": "s", "path": (str(path),), "weight": 100.0, "text": TEXT, **changes})
    bad: list[Problem] = []
    files = sources.find([config])[0]
    return [text for file in files for text, _ in documents.read_texts(file, sources.read_records(file), Counter(), bad)], bad


def refused(path: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **changes)
    return str(caught.value)


def test_prepared_bytes_are_those_of_the_jsonl_records(make_config: Callable, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    plain = tmp_path / "a.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    saved = save_to_disk(tmp_path / "saved", table[:600], table[600:])
    prepared = []
    for index, path in enumerate((plain, write_parquet(tmp_path / "a.parquet", table), saved)):
        config = make_config(qa={"path": (str(path),), "valid_percent": 10.0}, out=tmp_path / f"out{index}")
        prepare.run(config)
        source = mixture.read_prepared(config.out).sources[0]
        readers = [indexed.Reader(part.prefixes) for part in (source.train, source.valid)]
        prepared.append([(reader.tokens(0, reader.num_tokens).tolist(), reader.lengths().tolist()) for reader in readers])
    assert prepared[0] == prepared[1] == prepared[2]


def test_saved_folder_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    parts = [pa.table({"text": [name]}) for name in "abc"]
    folder = save_to_disk(tmp_path / "saved", *parts)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert read(folder, text="{text}")[0] == ["c", "b", "a"]


def test_folder_of_splits_and_other_folders_are_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "all" / "train", pa.table({"text": ["x"]}))
    assert "without state.json" in refused(tmp_path / "all")
    (tmp_path / "spark.parquet").mkdir()
    assert f"name its files, as {tmp_path}/spark.parquet/*.parquet" in refused(tmp_path / "*.parquet")
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "sources.0.path: " in refused(tmp_path / "all") and "splits train; required the folder of one split" in refused(tmp_path / "all")
    assert read(tmp_path / "all" / "train", text="{text}")[0] == ["x"]


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ("{", "no list of data files"),
        ("[]", "no list of data files"),
        ('{"_data_files": [1]}', "no list of data files"),
        ('{"_data_files": []}', "no data files"),
        ('{"_data_files": [{"filename": 1}]}', "found '1';"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "../a.arrow"),
        ('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}', "rows behind"),
    ],
)
def test_bad_state_is_refused(tmp_path: Path, state: str, found: str) -> None:
    write_stream(tmp_path / "a.arrow", pa.table({"text": ["x"]}))
    folder = save_to_disk(tmp_path / "saved", pa.table({"text": ["x"]}))
    (folder / "state.json").write_text(state)
    assert found in refused(folder, text="{text}") and "state.json" in refused(folder, text="{text}")


@WRITERS
def test_bad_rows_are_named_by_file_and_row(tmp_path: Path, write: Callable, name: str) -> None:
    values = pa.array([b"a", None, b"\xff", b" ", *[b"x"] * 400, None], pa.binary())
    file = write(tmp_path / name, pa.table({"text": values.view(pa.string()), "n": range(405)}))
    found, bad = read(file, text="{text}{n}")
    assert len(found) == 402 and (found[0], found[-1]) == ("a0", "x403")
    assert [problem.where for problem in bad] == [f"{file}: row {number}" for number in (2, 3, 405)]
    assert "NoneType" in bad[0].found and "invalid UTF-8" in bad[1].found
    assert "empty text" in read(file, text="{text}")[1][2].found


@WRITERS
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_every_type_of_text_is_read(tmp_path: Path, kind: pa.DataType, write: Callable, name: str) -> None:
    texts = pa.array(["one", "zw\u00f6lf", "one"])
    texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    assert read(write(tmp_path / name, pa.table({"text": texts})), text="{text}") == (["one", "zw\u00f6lf", "one"], [])


@WRITERS
def test_every_wrong_column_is_named_with_the_file(tmp_path: Path, write: Callable, name: str) -> None:
    exact = decimal.Decimal("1.5")
    table = pa.table({"day": [datetime.date(2026, 1, 1)], "list": [[exact]], "struct": [{"a": exact}], "text": ["x"]})
    message = refused(write(tmp_path / name, table), text="{day}{list}{struct}{absent}{text}")
    assert message.count(f"{name}: found") == message.count("\n") + 1 == 4
    for found in ("'day' of type date32", "'list' of type list<", "'struct' of type struct", "no column 'absent'"):
        assert found in message
    assert "required one for each field that the config reads; the file has 'day', 'list'" in message  # of keep, turns and sample too
    assert "at least one {field}" in refused(tmp_path / name, text="fixed")


@WRITERS
def test_turns_and_conditions_read_what_json_gives_them(tmp_path: Path, write: Callable, name: str) -> None:
    """A chat set as published: a list of turns, each with a time beside what is read, of invalid UTF-8 in one; a nested field; a bool."""

    def turn(role: str, text: bytes) -> dict[str, Any]:
        return {"role": role, "content": text, "at": datetime.datetime(2026, 1, 1)}

    rows = [
        {
            "turns": [turn("user", b"q%d" % index), turn("assistant", b"\xff" if index == 3 else b"a")],
            "meta": {"model": f"gpt-{index}"},
            "toxic": index == 5,
        }
        for index in range(6)
    ]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary()), ("at", pa.timestamp("us"))]))
    wanted = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("us"))]))
    turns = pa.array([row["turns"] for row in rows], kind).cast(wanted, safe=False)
    meta = pa.array([row["meta"] for row in rows])
    file = write(tmp_path / name, pa.table({"turns": turns, "meta": meta, "toxic": [row["toxic"] for row in rows]}))
    keep = (KeepConfig(field="meta.model", one_of=("gpt-1", "gpt-3", "gpt-4", "gpt-5")), KeepConfig(field="toxic", equals=False))
    found, bad = read(file, text="{text}", turns=TurnsConfig(field="turns", prefix=True), keep=keep)
    assert found == ["User: q1\nAssistant: a", "User: q4\nAssistant: a"]
    assert [(problem.where, "invalid UTF-8" in problem.found) for problem in bad] == [(f"{file}: row 4", True)]


@WRITERS
def test_what_is_not_read_may_be_of_any_type(tmp_path: Path, write: Callable, name: str) -> None:
    """Beside the text, and within the struct of a turn or of a field. What is read must be a value of JSON."""
    exact, pairs = decimal.Decimal("1.5"), pa.map_(pa.string(), pa.string())
    odd = {"price": exact, "tags": [("k", "v")], "vector": [1.0, 2.0], "day": datetime.date(2026, 1, 1)}
    odd_types = [("price", pa.decimal128(5, 2)), ("tags", pairs), ("vector", pa.list_(pa.float32(), 2)), ("day", pa.date32())]
    turn = pa.struct([*odd_types, ("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.string())])
    columns = {key: pa.array([value], kind) for (key, value), (_, kind) in zip(odd.items(), odd_types, strict=True)}
    columns |= {
        "text": pa.array(["t"]),
        "blob": pa.array([b"\xff"]),
        "count": pa.array([2**64 - 1], pa.uint64()),
        "meta": pa.array([{**odd, "lang": "py"}], pa.struct([*odd_types, ("lang", pa.string())])),
        "turns": pa.array([[{**odd, "role": "user", "content": "hi"}] * 2], pa.list_(turn)),
    }
    file = write(tmp_path / name, pa.table(columns))
    assert read(file, text="{text} {meta.lang} {count}") == ([f"t py {2**64 - 1}"], [])
    assert read(file, text="{text}", turns=TurnsConfig(field="turns")) == (["hi\nhi"], [])
    message = refused(file, text="{price}{tags}{meta.price}{meta.tags}{text}")
    for found in ("'price' of type decimal", "'tags' of type map", "'meta.price' of type decimal", "'meta.tags' of type map"):
        assert f"{name}: found column {found}" in message
    assert message.count("found") == 4
    assert "no field 'meta.absent'" in read(file, text="{meta.absent}")[1][0].found
    assert "of type list" in read(file, text="{vector}")[1][0].found


@WRITERS
def test_a_column_with_a_dot_in_its_name_is_read_as_json_would_be(tmp_path: Path, write: Callable, name: str) -> None:
    row = {"meta.lang": "py", "meta": {"lang": "cpp", "year": 7}, "a.b.c": "deep", "text": "t", "text.n": 3}
    template = "{meta.lang}|{meta.year}|{a.b.c}|{text}|{text.n}"
    file = write(tmp_path / name, pa.Table.from_pylist([row]))
    plain = tmp_path / "a.jsonl"
    plain.write_text(json.dumps(row))
    assert read(file, text=template) == read(plain, text=template) == (["py|7|deep|t|3"], [])
    assert "no column 'a'" in refused(file, text="{a.b}")


@WRITERS
def test_parts_of_a_turn_and_calls_are_those_of_json(tmp_path: Path, write: Callable, name: str) -> None:
    def row(content: Any, calls: Any = None) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content, "tool_calls": calls}]}

    rows = [
        row([{"type": "text", "text": "one", "url": None}, {"type": "text", "text": " two", "url": None}]),
        row([{"type": "image_url", "text": None, "url": "x"}]),
        row(None, [{"name": "f"}]),
        row(None),
    ]
    plain = tmp_path / "a.jsonl"
    plain.write_text("".join(json.dumps(item) + "\n" for item in rows))
    for file in (plain, write(tmp_path / name, pa.Table.from_pylist(rows))):
        found, bad = read(file, text="{text}", turns=TurnsConfig())
        assert found == ["one two"]
        for problem, words in zip(bad, ("part 1 of type 'image_url'", "with tool_calls", "with content null"), strict=True):
            assert f"turn 1 of 'messages' by 'user'{'' if words.startswith('with') else ':'} {words}" == problem.found


@WRITERS
def test_file_cut_anywhere_is_refused(tmp_path: Path, write: Callable, name: str) -> None:
    file = write(tmp_path / name, pa.Table.from_pylist(ROWS))
    whole = file.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 100, len(whole) - 8, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert f"{name}: found" in refused(file) and "read to its end" in refused(file)
    file.write_bytes(b"text, not columns\n" * 100)
    assert "read to its end" in refused(file)


@WRITERS
def test_damaged_bytes_never_crash(tmp_path: Path, write: Callable, name: str) -> None:
    file = write(tmp_path / name, pa.Table.from_pylist(ROWS[:400]))
    whole = file.read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[generator.randrange(len(whole))] = generator.randrange(256)
        file.write_bytes(damaged)
        try:
            read(file)
        except InputError:
            num_refused += 1
    assert num_refused


def test_row_group_is_streamed_and_only_its_needed_columns(tmp_path: Path) -> None:
    texts = [random.Random(index).randbytes(2500).hex() for index in range(1000)]
    table = pa.table({"text": texts, "image": [random.Random(0).randbytes(10_000)] * 1000})
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, use_dictionary=False, compression="none", write_batch_size=50, data_page_size=100_000)
    num_bytes = 0

    def advance(count: int) -> None:
        nonlocal num_bytes
        num_bytes += count

    with sources.Watched(file, advance) as raw:
        for number, record in arrow.records(file, io.BufferedReader(raw, 1 << 16), ["text"]):
            assert record["text"].decode() == texts[number - 1]
            assert num_bytes < (4_000_000 if number == 1 else 7_000_000)
        assert number == len(texts) and file.stat().st_size > 15_000_000
    assert num_bytes == file.stat().st_size  # the bar ends full
