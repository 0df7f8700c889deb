"""The whole scan: a mixture read back from its tokens, a prompt set, and files; planted questions are found where they are, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_prism.cli.entry import app
from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.data import prompts as prompt_set
from megatron_prism.data.prompts import Prompt
from megatron_prism.jobs import contaminate, prepare
from megatron_prism.prepare import texts

NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
QUESTION = "If $\\frac{a}{b}$ is " + " or ".join(NUMBERS[:12]) + ", find $a + b$."
SHORT, TOO_SHORT = "find the sum of the nine smallest odd primes", "find $x$"


def filler(number: int) -> str:
    return " ".join(NUMBERS[(number * step) % 13] for step in range(1, 30)) + f" {number}"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    records = [
        {"id": "q0", "problem": QUESTION, "solution": "zebra stripes are black and white " * 4},
        {"problem": SHORT, "answer": "100"},
        {"problem": TOO_SHORT},
    ]
    (folder / "algebra.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "clean.jsonl").write_text(json.dumps({"question": "zebra " * 20}) + "\n")
    return folder


@pytest.fixture(scope="module")
def against(sets: Path) -> list[str]:
    return [f"algebra={sets / 'algebra.jsonl'}", f"clean={sets / 'clean.jsonl'}"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with dirty.jsonl, which holds the question at line 41 in other LaTeX and half of it at 61, and clean.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    other = QUESTION.replace("$\\frac{a}{b}$", "\\(\\dfrac a b\\)").upper()
    texts = [filler(number) for number in range(100)]
    texts[40], texts[60] = f"{filler(1)} {other} {filler(2)}", " ".join(QUESTION.split()[:18])
    texts[80] = f"first {SHORT} then"
    (folder / "dirty.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "clean.jsonl").write_text("".join(json.dumps({"text": filler(number)}) + "\n" for number in range(200, 260)))
    return folder


def rows(result: dict[str, Any]) -> dict[tuple[str, str, str], tuple[int, int, int, int]]:
    return {
        (row["source"], row["benchmark"], row["side"]): (row["num_hit"], row["num_whole"], row["num_searched"], row["num_documents_hit"])
        for row in result["table"]
    }


EXPECTED = {
    ("dirty", "algebra", "question"): (2, 2, 2, 3),
    ("dirty", "algebra", "answer"): (0, 0, 1, 0),
    ("dirty", "clean", "question"): (0, 0, 1, 0),
    ("clean", "algebra", "question"): (0, 0, 2, 0),
    ("clean", "algebra", "answer"): (0, 0, 1, 0),
    ("clean", "clean", "question"): (0, 0, 1, 0),
}


def test_files(files: Path, against: list[str], tmp_path: Path) -> None:
    named = [f"{name}={files / name}.jsonl" for name in ("dirty", "clean")]
    result = contaminate.run(named, against, num_workers=2, out=tmp_path / "out")
    assert rows(result) == EXPECTED
    assert result["against"][0] | {"num_ngrams": 0} == {
        "benchmark": "algebra",
        "side": "question",
        "num_texts": 3,
        "num_too_short": 1,
        "num_as_a_whole": 1,
        "num_ngrams": 0,
    }
    lines = [json.loads(line) for line in (tmp_path / "out" / contaminate.EXAMPLES).read_text().splitlines()]
    assert [(line["place"].rpartition(":")[2], line["question"], line["containment"] == 1) for line in lines] == [
        ("41", "q0", True),
        ("61", "q0", False),
        ("81", "2", True),
    ]
    assert lines[0]["span"].startswith("IF \\(\\DFRAC A B\\) IS ONE") and lines[0]["begin"] == len(filler(1)) + 1
    assert lines[2]["span"] == SHORT and lines[0]["num_documents"] == 2
    summary = json.loads((tmp_path / "out" / contaminate.SUMMARY).read_text())
    assert summary["kind"] == "contamination" and summary["table"] == result["table"] and len(summary["inputs"]) == 4
    assert contaminate.run(named, against, num_workers=1)["table"] == result["table"]  # whatever the number of processes
    with pytest.raises(InputError, match="--out"):
        contaminate.run(named, against, num_workers=1, out=tmp_path / "out")


@pytest.fixture(scope="module")
def prepared(files: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    sources = tuple(SourceConfig(name=name, path=(str(files / f"{name}.jsonl"),), weight=50) for name in ("dirty", "clean"))
    prepare.run(PrepareConfig(out=out, tokenizer=tiny_tokenizer, sources=sources, num_workers=1))
    return out


def test_a_prepared_mixture(prepared: Path, against: list[str], tmp_path: Path) -> None:
    result = contaminate.run([str(prepared)], against, num_workers=1, out=tmp_path / "out")
    assert rows(result) == EXPECTED
    first = json.loads((tmp_path / "out" / contaminate.EXAMPLES).read_text().splitlines()[0])
    assert first["document"] == "40" and first["place"] == f"{prepared}/dirty/00000.train: document 40"
    two = contaminate.run([str(prepared), f"again={prepared}"], against, num_workers=1)
    assert [source["source"] for source in two["sources"]] == ["data/dirty", "data/clean", "again/dirty", "again/clean"]


def test_a_mixture_without_its_tokenizer(prepared: Path, against: list[str], tiny_tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text((tiny_tokenizer / "tokenizer.json").read_text().replace("</s>", "</t>"))
    with pytest.raises(InputError, match="another tokenizer"):
        contaminate.run([str(prepared)], against, num_workers=1, tokenizer=other)
    with pytest.raises(InputError, match="no file"):
        contaminate.run([str(prepared)], against, num_workers=1, tokenizer=tmp_path / "none")


def test_a_prompt_set(against: list[str], tmp_path: Path) -> None:
    turns = ({"role": "user", "content": QUESTION},)
    prompts = [
        Prompt(id="p0", domain="math", kind="math", prompt=filler(3), gold="1"),
        Prompt(id="p1", domain="science", kind="math", prompt=turns, gold="1"),
    ]
    text = "".join(map(prompt_set.to_line, prompts))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / prompt_set.FILE).write_text(text)
    manifest = {"kind": "prompts", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "set" / prompt_set.MANIFEST).write_text(json.dumps(manifest))
    result = contaminate.run([str(tmp_path / "set")], against, num_workers=1, out=tmp_path / "out")
    assert rows(result)["science", "algebra", "question"] == (1, 1, 2, 1) and rows(result)["math", "algebra", "question"] == (0, 0, 2, 0)
    assert json.loads((tmp_path / "out" / contaminate.EXAMPLES).read_text())["document"] == "p1"


def test_all_that_is_wrong_is_said_before_the_scan(files: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"problem": "a"}\n{"no": 1}\n')
    monkeypatch.setattr(contaminate, "_scan", lambda *_: pytest.fail("the scan began"))
    with pytest.raises(InputError) as error:
        contaminate.run([str(files / "none.jsonl"), str(tmp_path)], [f"bad={bad}"], shortest=20, num_workers=1)
    said = str(error.value)
    assert all(words in said for words in (f"{bad}:2", "none.jsonl", "--shortest", str(tmp_path)))
    with pytest.raises(InputError, match="--out: found .*bad.jsonl"):
        contaminate.run([str(files / "clean.jsonl")], [f"bad={sets / 'clean.jsonl'}"], num_workers=1, out=bad)
    with pytest.raises(EnvironmentFault, match="bad.jsonl"):
        contaminate.run([str(files / "clean.jsonl")], [f"bad={sets / 'clean.jsonl'}"], num_workers=1, out=bad / "out")
    with pytest.raises(InputError, match="--text: found '{question'; required at least one {field}"):
        contaminate.run([str(files / "clean.jsonl")], [f"bad={sets / 'clean.jsonl'}"], text="{question", num_workers=1)
    for against, words in (([], "--against"), ([str(bad)], "NAME=FILE"), ([f"a={bad}", f"a={bad}"], "twice")):
        with pytest.raises(InputError, match=words):
            contaminate.run([str(files / "clean.jsonl")], against, num_workers=1)


def test_a_home_folder_behind_a_name(files: Path, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(files))
    monkeypatch.setenv("SETS", str(sets))
    assert (
        rows(contaminate.run(["dirty=~/dirty.jsonl"], ["algebra=$SETS/algebra.jsonl"], num_workers=1))["dirty", "algebra", "question"][0]
        == 2
    )
    with pytest.raises(InputError, match="NOWHERE"):
        contaminate.run(["a=$NOWHERE/a.jsonl"], ["algebra=$SETS/algebra.jsonl"], num_workers=1)


def test_a_text_file_holds_a_question_that_has_blank_lines(sets: Path, against: list[str], tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text(f"{filler(1)}\n\n" + QUESTION.replace(" or ", " or\n\n") + f"\n\n{filler(2)}")
    result = contaminate.run([str(tmp_path / "some.txt")], against, num_workers=1)
    assert result["sources"][0]["num_documents"] == 1 and rows(result)["some.txt", "algebra", "question"] == (1, 1, 2, 1)


def test_records_without_a_text_are_counted(against: list[str], tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"text": "a b c"}\n{"other": 1}\n')
    assert contaminate.run([str(tmp_path / "some.jsonl")], against, num_workers=1)["sources"][0]["num_bad_records"] == 1
    with pytest.raises(InputError, match="--text"):
        contaminate.run([str(tmp_path / "some.jsonl")], against, num_workers=1, text="{body}")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(InputError) as error:
        contaminate.run([str(tmp_path / "none.jsonl")], against, num_workers=1)
    assert str(error.value).endswith("0 records that are not read; required at least one")


def test_a_record_that_is_too_long_is_named_with_the_bound(
    against: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(texts, "MAX_RECORD_BYTES", 100)
    (tmp_path / "some.jsonl").write_text(json.dumps({"text": "a " * 100}) + '\n{"text": "a b c"}\n')
    with caplog.at_level("WARNING", "prism"):
        contaminate.run([str(tmp_path / "some.jsonl")], against, num_workers=1)
    assert "some.jsonl:1: found a record of 213 bytes; required at most 100" in caplog.text


def test_the_command(files: Path, against: list[str], tmp_path: Path) -> None:
    command = ["contaminate", str(files / "dirty.jsonl"), *(word for one in against for word in ("--against", one)), "--num-workers", "1"]
    shown = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "c.json")], catch_exceptions=False)
    assert shown.exit_code == 0 and json.loads((tmp_path / "c.json").read_text())["table"][0]["num_hit"] == 2
    table = [line.split() for line in shown.stdout.splitlines()]
    assert ["dirty.jsonl", "algebra", "question", "2", "2", "2", "3", "100.00%", "100%"] in table
    assert CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False).exit_code == 0
