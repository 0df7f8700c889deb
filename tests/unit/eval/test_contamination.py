from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prism.core.errors import InputError
from megatron_prism.eval import benchmarks, contamination
from megatron_prism.eval.benchmarks import Against
from megatron_prism.eval.contamination import Hit, Scanned, Search, Tally
from megatron_prism.prepare import decontaminate, words
from megatron_prism.prepare.texts import Place


def write(path: Path, records: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def other_latex(text: str) -> str:
    """Return a problem as another set writes it: \\( x \\) for $x$, \\dfrac, without \\left and \\right, other spacing and case."""
    for old, new in (("\\frac", "\\dfrac"), ("\\left", ""), ("\\right", ""), (" ", "  "), ("\\cdot", "\\times")):
        text = text.replace(old, new)
    pieces = text.split("$")
    return "".join(piece + (("\\( ", " \\)")[index % 2] if index < len(pieces) - 1 else "") for index, piece in enumerate(pieces)).upper()


def runs(of_text: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(of_text[start : start + length]) for start in range(len(of_text) - length + 1)]


def test_thirteen_rows_in_other_latex(shared_data: Path, tmp_path: Path) -> None:
    """A set from which MATH-500 and AIME were taken out by plain words still holds them where it writes `$x$` as `\\( x \\)`."""
    problems = [json.loads(line)["problem"] for name in ("math500", "aime24") for line in (shared_data / f"{name}.jsonl").open("rb")]
    plain_words = {problem: runs(problem.lower().split(), 13) for problem in problems}
    long = [problem for problem in problems if len(words.without_latex(problem)) >= 13]
    # rows of a set that was decontaminated by 13 plain words in a row
    rows = [row for row in long if plain_words[row] and not set(plain_words[row]) & set(runs(other_latex(row).lower().split(), 13))][:13]
    assert len(rows) == 13
    sets = tuple(Against(name, str(shared_data / f"{name}.jsonl")) for name in ("math500", "aime24"))
    index = contamination.index(Search(sets))
    for row in rows:
        hits = [hit for hit in contamination.find(f"Problem: {other_latex(row)} Answer: 5", index) if index.texts[hit.text].text == row]
        assert [hit.containment for hit in hits] == [1.0]
        assert words.without_latex(hits[0].span) == words.without_latex(row)
    plain = decontaminate.overlap(rows, 13, 8)  # prepare's rule sees through $ and case, and not through \\dfrac
    assert plain.first(other_latex(rows[0])) is not None and any(plain.first(other_latex(row)) is None for row in rows)
    assert not list(contamination.find((shared_data / "wikitext2_valid.txt").read_text("utf-8")[:200_000], index))


WORDS = st.lists(st.sampled_from(["a", "B", "b", "c", "\\frac", "1"]), max_size=30).map(" ".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(questions=st.lists(WORDS.filter(str.strip), min_size=1, max_size=4), ngram=st.integers(2, 6), document=WORDS)
def test_containment_is_what_counting_finds(questions: list[str], ngram: int, document: str, tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [{"problem": question} for question in questions])
    contamination.index.cache_clear()  # the file of one name is written again
    index = contamination.index(Search((Against("set", str(path)),), ngram, 2))
    of_document = words.without_latex(document)
    expected = {}
    for number, question in enumerate(questions):
        of_question = words.without_latex(question)
        if len(of_question) >= 2:
            length = min(ngram, len(of_question))
            held = [run in set(runs(of_document, length)) for run in runs(of_question, length)]
            if any(held):
                expected[number] = sum(held) / len(held)
    assert {hit.text: hit.containment for hit in contamination.find(document, index)} == expected
    for hit in contamination.find(document, index):
        assert words.normal(document)[hit.begin :].startswith(hit.span)


def test_the_longest_piece_joins_what_overlaps_or_touches() -> None:
    assert contamination._longest([(0, 5), (5, 9), (20, 28)]) == (0, 9)
    assert contamination._longest([(0, 10), (2, 5), (4, 7), (12, 21)]) == (0, 10)


def test_a_table_counts_questions_and_documents_once(tmp_path: Path) -> None:
    """One document holds parts of two questions, and a later one the whole of one. Of four questions one is too short to be looked for, one is not held."""
    path = write(tmp_path / "set.jsonl", [{"problem": "a b c d"}, {"problem": "e f g"}, {"problem": "h i"}, {"problem": "j k l"}])
    contamination.index.cache_clear()
    search = Search((Against("set", str(path)),), ngram=4, shortest=3)
    of_sets, places = contamination.index(search), [Place(f"f:{line}", str(line)) for line in (1, 2)]
    hits = ((places[0], (Hit(0, 0.75, "a", 0), Hit(1, 0.5, "e", 9))), (places[1], (Hit(0, 1.0, "b", 0),)))
    for num_examples, kept in ((0, 1), (1, 1), (2, 2)):
        tally = Tally()
        tally.add(Scanned("s", 2, 9, hits), of_sets, num_examples)
        assert [len(tally.examples[0]), tally.examples[0][0][1].containment] == [kept, 1.0], "the most contained first"
        (row,) = contamination.table({"s": tally}, of_sets)
        assert row | {"source": "s", "benchmark": "set", "side": "question"} == row
        assert (row["num_hit"], row["num_whole"], row["num_searched"], row["num_documents_hit"]) == (2, 1, 3, 2)
        assert (row["containment"], row["max_containment"]) == (0.5, 1.0), "of all questions that are looked for"
    (described,) = contamination.describe(of_sets, search)
    assert (described["num_texts"], described["num_too_short"], described["num_as_a_whole"], described["num_ngrams"]) == (4, 1, 2, 3)


def test_sets_in_their_published_forms(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "Add"}, {"role": "user", "content": "one"}]
    jsonl = write(
        tmp_path / "a.jsonl", [{"id": "q7", "question": "Why?", "answer": 4}, {"problem": " ", "prompt": turns, "solution": "so"}]
    )
    pq.write_table(pa.table({"Question": ["Which?"], "Correct Answer": ["this"], "other": [[1]]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text('Record ID,Question,Correct Answer\nrec1,"Is\nit?",yes\n')
    sets = {"a": jsonl, "b": tmp_path / "*.parquet", "c": tmp_path / "c.csv"}
    read = benchmarks.read(tuple(Against(name, str(path)) for name, path in sets.items()))
    assert [(text.benchmark, text.question, text.side, text.text) for text in read] == [
        ("a", "q7", "question", "Why?"),
        ("a", "q7", "answer", "4"),
        ("a", "2", "question", "Add\none"),
        ("a", "2", "answer", "so"),
        ("b", "1", "question", "Which?"),
        ("b", "1", "answer", "this"),
        ("c", "rec1", "question", "Is\nit?"),
        ("c", "rec1", "answer", "yes"),
    ]


def test_what_cannot_be_read_is_refused_by_place(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = write(tmp_path / "bad.jsonl", [{"problem": "fine"}, {"text": "no question"}, {"problem": ""}])
    with bad.open("a") as stream:
        stream.write("{broken\n")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "empty.jsonl").write_text("")
    refused: dict[str, Callable[[], object]] = {
        f"{bad}:2": lambda: benchmarks.read((Against("set", str(bad)),)),
        f"{bad}:4": lambda: benchmarks.read((Against("set", str(bad)),)),
        "b.parquet": lambda: benchmarks.read((Against("set", str(tmp_path / "b.parquet")),)),
        "cut.parquet": lambda: benchmarks.read((Against("set", str(tmp_path / "cut.parquet")),)),
        "no file at": lambda: benchmarks.read((Against("set", str(tmp_path / "none.jsonl")),)),
        "no question": lambda: benchmarks.read((Against("set", str(tmp_path / "empty.jsonl")),)),
    }
    for words_of_it, read in refused.items():
        with pytest.raises(InputError) as error:
            read()
        assert words_of_it in str(error.value)
    assert len(benchmarks.read((Against("set", str(tmp_path / "b.parquet")),), ("text",))) == 1
