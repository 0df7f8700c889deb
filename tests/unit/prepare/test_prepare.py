from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prism.core.config import DataConfig, PackingConfig
from megatron_prism.core.errors import InputError
from megatron_prism.data import indexed, mixture, segments
from megatron_prism.jobs import prepare
from megatron_prism.prepare import documents


def nothing_left(config) -> bool:
    return not list(config.out.parent.glob("out*"))


def sentence_of(number: int) -> str:
    return f"{number}: "


def tree(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_manifest_tells_what_was_written(make_config: Callable, tokenizer_folder: Path, corpus: Path) -> None:
    config = make_config(qa={"valid_percent": 20.0}, tokens=1000)
    result = prepare.run(config)
    manifest = json.loads((config.out / "manifest.json").read_text())
    assert manifest["kind"] == "prepared"
    assert manifest["tokenizer"] == {
        "path": str(tokenizer_folder),
        "sha256": hashlib.sha256((tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest(),
        "vocab_size": 384,
        "eos_id": 2,
        "end_ids": {"tokenizer_config.json": [2]},
    }
    pairs = {
        f"{source['name']}/{shard['number']:05}.{split}": shard[split]
        for source in manifest["sources"]
        for shard in source["shards"]
        for split in ("train", "valid")
        if shard[split]
    }
    files = {f"{name}.{kind}": pair[kind] for name, pair in pairs.items() for kind in ("bin", "idx")}
    manifests = ["manifest.json", "qa/00000.json", "prose/00000.json"]
    assert sorted([*files, *manifests]) == sorted(tree(config.out)) and len(files) == 6
    for name, facts in files.items():
        data = (config.out / name).read_bytes()
        assert facts == {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, pair in pairs.items():
        held = indexed.verify(config.out / name)
        assert (held.num_tokens, held.num_documents) == (pair["num_tokens"], pair["num_documents"])
    assert json.loads((config.out / "qa/00000.json").read_text()) == manifest["sources"][0]["shards"][0]
    assert set(manifest["inputs"]) == {
        str(corpus / "qa.jsonl"),
        str(corpus / "prose.txt"),
        str(tokenizer_folder / "tokenizer.json"),
        str(tokenizer_folder / "tokenizer_config.json"),
    }
    blend = manifest["blend"]
    assert blend["tokens"] == 1000 == sum(part["tokens"] for part in blend["sources"])
    assert [(part["name"], part["tokens"], part["share"]) for part in blend["sources"]] == [("qa", 700, 0.7), ("prose", 300, 0.3)]
    for source, part in zip(result["sources"], blend["sources"], strict=True):
        assert part.items() <= source.items()
        assert part["epochs"] == part["tokens"] / source["train_tokens"]
        assert source["train_tokens"] == sum(shard["train"]["num_tokens"] for shard in source["shards"])
    assert not list(config.out.parent.glob("out.*"))


def test_no_budget_is_what_the_scarcest_source_gives(make_config: Callable) -> None:
    epochs = [part["epochs"] for part in prepare.run(make_config())["sources"]]
    assert max(epochs) <= 1 and max(epochs) > 0.99


def test_text_comes_back_from_the_files(make_config: Callable, corpus: Path, tokenizer_folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    config = make_config()
    prepare.run(config)
    decode = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).decode
    dataset = IndexedDataset(str(config.out / "qa" / "00000.train"))
    records = [json.loads(line) for line in (corpus / "qa.jsonl").read_text().splitlines()]
    assert [decode(document.tolist()) for document in dataset[:]] == [f"{record['question']}\n{record['answer']}" for record in records]
    assert all(document[-1] == 2 for document in dataset[:])


def test_bytes_are_those_of_any_number_of_workers(make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BATCH_BYTES", 500)
    configs = [
        make_config(qa={"valid_percent": 20.0, "dedup": "minhash"}, out=tmp_path / f"w{count}", num_workers=count) for count in (1, 2)
    ]
    one, two = ([source["shards"] for source in prepare.run(config)["sources"]] for config in configs)
    assert one == two


def test_packing_is_written_and_read_back(make_config: Callable) -> None:
    config = make_config(packing=PackingConfig(seq_length=64, overlap=8), qa={"valid_percent": 20.0})
    result = prepare.run(config)
    for source, read, part in zip(result["sources"], mixture.read_prepared(config.out).sources, result["blend"]["sources"], strict=True):
        held = source["packing"]
        assert read.packing == mixture.Packing(**held)
        assert read.stream_tokens == held["num_sequences"] * 64 and part["epochs"] == part["tokens"] / read.stream_tokens
        reader = read.reader(pad_id=2)
        lengths = indexed.Reader(read.train.prefixes).lengths()
        assert len(reader) == held["num_sequences"]
        assert (
            held["efficiency"]
            == sum(piece[2] for number in range(len(reader)) for piece in reader.pieces(number)) / read.stream_tokens
            > 0.7
        )
        wanted = {(document, token) for document, length in enumerate(lengths) for token in range(length)}
        pieces = [piece for number in range(len(reader)) for piece in reader.pieces(number)]
        assert {(document, start + index) for document, start, length in pieces for index in range(length)} == wanted
    data = DataConfig(prepared=config.out, seq_length=32)
    with pytest.raises(InputError, match=r"data.seq_length \(.*source qa\): found 32; required 64, which it is packed into"):
        segments.read(data, 4, 1)
    (config.out / "qa" / "train.pieces.npy").unlink()
    with pytest.raises(InputError, match="train.pieces.npy: found no such file"):
        mixture.read_prepared(config.out)


def test_report_draws_the_blend_and_shows_documents(make_config: Callable, capsys: pytest.CaptureFixture) -> None:
    config = make_config(qa={"domain": "math"})
    planned = prepare.report(
        config,
        prepare.run(config, dry_run=True)
        | {
            "blend": {
                "sources": [{"name": name, "share": share, "tokens": None, "epochs": None} for name, share in (("qa", 0.7), ("prose", 0.3))]
            }
        },
    )
    assert [Path(path).name for path in planned["report"]] == ["blend.png", "blend.svg"] and not config.out.exists()
    result = prepare.run(config)
    paths = [Path(path) for path in prepare.report(config, result)["report"]]
    assert [path.relative_to(config.out).as_posix() for path in paths] == ["report/blend.png", "report/blend.svg", "report/samples.md"]
    samples, shown = paths[2].read_text(), capsys.readouterr().err
    for number in (0, 20, 40):
        assert sentence_of(number) in samples and sentence_of(number) in shown
    assert prepare.run(config) == result  # and is still known as what was prepared


def test_brackets_in_a_path_are_shown(make_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rich would take them for its markup, and fail once the mixture is finished."""
    prepare.run(make_config(out=tmp_path / "a[b]" / "x[" / "c]"), dry_run=True)
    assert "a[b]/x[/c]" in "".join(capsys.readouterr().err.split())


def test_second_run_is_idempotent(make_config: Callable) -> None:
    config = make_config(qa={"valid_percent": 20.0})
    first = prepare.run(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    said = {"hf_id": "another", "available_tokens": 7}  # of where the source comes from: no part of what is prepared
    assert prepare.run(make_config(qa={"valid_percent": 20.0, **said}, num_workers=2)) == first
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before


def test_a_file_that_names_another_special_token_is_a_changed_one(make_config: Callable, tokenizer_folder: Path, tmp_path: Path) -> None:
    """special_tokens_map.json has no sum in the manifest, but what it names is encoded otherwise where a text spells it."""
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "own"))
    config = make_config(tokenizer=folder)
    prepare.run(config)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')  # as the other files say
    prepare.run(config)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<unk>"}')
    with pytest.raises(InputError, match=r"prepared before .*own/special_tokens_map.json changed"):
        prepare.run(config)


def test_out_that_holds_anything_else_is_refused(make_config: Callable, corpus: Path) -> None:
    config = make_config()
    config.out.mkdir()
    prepare.run(config)  # an empty folder is free
    with pytest.raises(InputError, match="another config"):
        prepare.run(make_config(tokens=5))
    (corpus / "qa.jsonl").write_text((corpus / "qa.jsonl").read_text().replace("odd", "add"))
    with pytest.raises(InputError, match=r"prepared before .*qa.jsonl changed"):
        prepare.run(config)
    (config.out / "qa" / "00000.train.bin").unlink()
    with pytest.raises(InputError, match=r"qa/00000.train.bin: found no such file"):
        prepare.run(config)
    (config.out / "manifest.json").unlink()
    with pytest.raises(InputError, match="files that prepare did not write"):
        prepare.run(config)


def test_dry_run_plans_from_the_config_alone(make_config: Callable) -> None:
    config = make_config(qa={"path": ("absent/*.jsonl",)}, tokenizer=Path("absent"), tokens=27 * 10**9)
    result = prepare.run(config, dry_run=True)
    assert result["sources"] == [
        {"name": "qa", "weight": 70.0, "tokens": 18_900_000_000, "share": 0.7, "epochs": None},
        {"name": "prose", "weight": 30.0, "tokens": 8_100_000_000, "share": 0.3, "epochs": None},
    ]
    assert [part["tokens"] for part in prepare.run(make_config(), dry_run=True)["sources"]] == [None, None]
    assert nothing_left(config)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"qa": {"weight": 60.0}}, "sum to 90"),
        ({"prose": {"name": "qa"}}, r"sources.1.name: found 'qa'"),
        ({"qa": {"path": ("absent.jsonl",)}}, "sources.0.path: found no file at 'absent.jsonl'"),
        ({"tokenizer": Path("absent")}, "tokenizer: found no file absent/tokenizer.json"),
        ({"num_workers": 0}, "num_workers: found 0"),
        ({"qa": {"valid_percent": 99.999}}, "no train document"),
        ({"packing": PackingConfig(seq_length=1)}, r"packing.seq_length: found 1; required"),
    ],
)
def test_wrong_config_is_refused(make_config: Callable, changes: dict, match: str) -> None:
    config = make_config(**changes)
    with pytest.raises(InputError, match=match):
        prepare.run(config)
    assert not config.out.exists()


def test_a_source_whose_files_are_all_held_out_is_refused(make_config: Callable, corpus: Path) -> None:
    with pytest.raises(InputError, match=r"sources.qa.path: found no train document .*; valid_path holds out every file of it"):
        prepare.run(make_config(qa={"valid_path": (str(corpus / "qa.jsonl"),)}))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_record_is_refused_or_counted(make_config: Callable, corpus: Path, num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    with (corpus / "qa.jsonl").open("ab") as stream:
        stream.write(b'{"question": \n{"question": "\xff", "answer": 1}\n')
    config = make_config(num_workers=num_workers)
    with pytest.raises(InputError, match=r"qa.jsonl:61: found a line that is not JSON"):
        prepare.run(config)
    assert nothing_left(config)
    if num_workers == 1:
        caplog.set_level(logging.INFO)
        result = prepare.run(make_config(on_bad_record="skip"))
        assert [(source["train_documents"], source["bad_records"]) for source in result["sources"]] == [(60, 2), (20, 0)]
        assert "qa.jsonl:61" in caplog.text and "2 bad records skipped" in caplog.text
        assert "source qa: records left out: bad 2" in caplog.text and "source prose: records" not in caplog.text


def test_a_source_read_too_often_is_refused_and_its_shards_are_kept(make_config: Callable) -> None:
    config = make_config(tokens=100_000, max_epochs=4.4)
    with pytest.raises(InputError, match=r"max_epochs: found source qa read \d+\.\d\d times; required at most 4.4"):
        prepare.run(config)
    kept = {path: path.stat().st_mtime_ns for path in config.out.with_name("out.partial").glob("*/*.bin")}
    assert len(kept) == 2 and not config.out.exists()
    result = prepare.run(make_config(tokens=10_000, max_epochs=4.4))
    assert all(part["epochs"] <= 4.4 for part in result["sources"]) and sum(part["tokens"] for part in result["sources"]) == 10_000
    assert sorted(kept.values()) == sorted(path.stat().st_mtime_ns for path in config.out.glob("*/*.bin"))
    known = {"path": ("absent",), "available_tokens": 1000}
    with pytest.raises(InputError, match="max_epochs: found source qa read 7.00 times"):
        prepare.run(make_config(qa=known, tokens=10_000, max_epochs=4.4), dry_run=True)


@pytest.mark.parametrize(("content", "skip"), [("", False), ("\n\n", False), ("{}\n", True)])
def test_empty_source_is_refused(make_config: Callable, corpus: Path, content: str, skip: bool) -> None:
    (corpus / "qa.jsonl").write_text(content)
    config = make_config(on_bad_record="skip" if skip else "error")
    with pytest.raises(InputError, match=r"sources.qa.path: found no train document in .*qa.jsonl"):
        prepare.run(config)
    assert not config.out.exists()


def test_held_out_files_are_written_apart(make_config: Callable, corpus: Path) -> None:
    (corpus / "valid.txt").write_text("one\n\ntwo")
    config = make_config(prose={"valid_path": (str(corpus / "valid.txt"),)})
    prepare.run(config)
    assert mixture.read_prepared(config.out).sources[1].valid.num_documents == 2
    (corpus / "valid.txt").write_text("\n")
    with pytest.raises(InputError, match=r"sources.prose.valid_path: found no valid document"):
        prepare.run(make_config(prose={"valid_path": (str(corpus / "valid.txt"),)}, out=config.out.with_name("other")))


def test_import_brings_in_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "tokenizers", "megatron.core", "pyarrow", "datasketch", "matplotlib")
    code = f"import sys, megatron_prism.jobs.prepare; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
