"""The report as a reader's browser and screen reader get it, what it says of several seeds, and what it does with bad and hostile input."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev

import pytest

from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.jobs import report as job
from megatron_prism.report import build, draw, page, read, style
from megatron_prism.report import write as report_write
from megatron_prism.report.document import Column, Document, Measured, Section, Table, flat
from megatron_prism.report.markdown import markdown
from megatron_prism.report.material import Material, Result, Stage
from megatron_prism.report.sections import ancestors, benchmarks, pipeline, retention
from megatron_prism.report.sections.common import Asked
from megatron_prism.report.statistics import over
from megatron_prism.study import claims
from tests.unit.report.study import HOSTILE, task, verdict, write, write_evaluation, write_run, write_study

pytest.importorskip("matplotlib")
ALLOWED = {
    "html",
    "head",
    "meta",
    "title",
    "link",
    "style",
    "body",
    "a",
    "header",
    "h1",
    "h2",
    "p",
    "nav",
    "ol",
    "li",
    "main",
    "section",
    "div",
    "span",
}
ALLOWED |= {
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "wbr",
    "figure",
    "figcaption",
    "details",
    "summary",
    "dl",
    "dt",
    "dd",
    "footer",
    "script",
}
ALLOWED |= {"svg", "g", "path", "defs", "use", "clippath", "rect"}


class Page(HTMLParser):
    """What a page holds: ids, references, tags, and of each table its caption and headers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.tables: list[dict[str, int]] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.handlers += [name for name in values if name.startswith("on")]
        self.labels += values.get("aria-labelledby", "").split()
        for name in ("href", "src", "xlink:href", "action"):
            self.links += [values[name]] if name in values else []
        if tag == "table":
            self.tables.append({"caption": 0, "col": 0, "row": 0, "tr": 0, "unscoped": 0})
        elif self.tables and tag == "caption":
            self.tables[-1]["caption"] += 1
        elif self.tables and tag == "tr":
            self.tables[-1]["tr"] += 1
        elif self.tables and tag == "th":
            self.tables[-1][values.get("scope", "unscoped")] += 1


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("seeds")
    return [write_study(root / f"seed_{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def out(seeds: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one study."""
    folder = tmp_path_factory.mktemp("report") / "one"
    result = job.run(seeds[:1], folder, None, None)
    assert not result["absent"] and not result["damaged"] and len(result["sections"]) == 14
    return folder


def test_a_page_is_accessible_and_loads_nothing(out: Path) -> None:
    text = (out / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(parsed.ids) == len(set(parsed.ids)) and set(parsed.labels) <= set(parsed.ids)
    for table in parsed.tables:
        assert table["caption"] == 1 and table["col"] >= 2 and table["row"] >= table["tr"] - 1 and not table["unscoped"]
    assert {link for link in parsed.links if not link.startswith(("#", "data:text/csv", "data:,"))} == set()
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert {"main", "nav", "header", "footer"} <= set(parsed.tags) and 'lang="en"' in text
    assert not re.search(r"https?://", re.sub(r'href="data:[^"]*"', "", text.replace("https://example.com/x.js", "")))
    assert re.findall(r"\bid=", re.sub(r"<svg.*?</svg>", "", "".join(re.findall(r"<style>.*?</style>", text)), flags=re.DOTALL)) == []


def test_a_hostile_name_is_text_and_nothing_else(out: Path) -> None:
    parsed = Page((out / "report.html").read_text(encoding="utf-8"))
    assert set(parsed.tags) <= ALLOWED and parsed.tags.count("script") == 1 and not parsed.handlers
    assert "alert" in HOSTILE and "&lt;script&gt;alert" in (out / "report.html").read_text(encoding="utf-8")
    lines = (out / "report.md").read_text(encoding="utf-8")
    assert "<script" not in lines and not re.search(r"(?<!\\)\]\(javascript", lines)
    assert all("<script" not in path.read_text(encoding="utf-8") for path in (out / "figures").glob("*.svg"))


def test_a_page_that_trusts_its_texts_would_be_seen() -> None:
    """The negative control: the same parser finds an element and a handler in a page without escaping."""
    parsed = Page(f"<p>{HOSTILE}</p>")
    assert parsed.tags.count("script") == 1 and parsed.handlers == ["onerror"]


def test_the_same_inputs_give_the_same_bytes(seeds: list[Path], out: Path, tmp_path: Path) -> None:
    job.run(seeds[:1], tmp_path / "again", None, None)
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert len(files) > 40 and files == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    assert [name for name in files if (out / name).read_bytes() != (tmp_path / "again" / name).read_bytes()] == []


def test_files_stand_beside_the_page_and_hold_its_numbers(out: Path) -> None:
    rows = list(csv.reader((out / "tables" / "benchmarks.csv").open(encoding="utf-8")))
    assert rows[0][:5] == ["model", "math (%)", "math low", "math high", "math n"] and rows[1][:2] == ["base", "40"] and rows[1][4] == "150"
    assert float(rows[1][3]) - float(rows[1][2]) == pytest.approx(2 * 1.959964 * 2, abs=1e-6)
    text = (out / "report.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?:figures|tables)/[^)]+)\)", text):
        assert (out / path).is_file(), path
    assert {path.stem for path in (out / "figures").glob("*.svg")} == {path.stem for path in (out / "figures").glob("*.png")} != set()


def test_seeds_are_averaged_and_each_ones_claims_stand(seeds: list[Path], tmp_path: Path) -> None:
    materials = read.read(seeds)
    assert [one.name for one in materials] == ["seed_0", "seed_1", "seed_2"]
    job.run(seeds, tmp_path / "three", "Three", None)
    rows = list(csv.DictReader((tmp_path / "three" / "tables" / "benchmarks.csv").open(encoding="utf-8")))
    assert float(rows[0]["math (%)"]) == pytest.approx(42) and rows[0]["math n"] == "3"
    assert float(rows[0]["math high"]) - 42 == pytest.approx(4.303 * 2 / 3**0.5, abs=1e-3)  # Student's t of two degrees, sd 2 points
    claims = list(csv.DictReader((tmp_path / "three" / "tables" / "claims.csv").open(encoding="utf-8")))
    assert [claims[0][name] for name in ("seed_0", "seed_1", "seed_2", "holds in")] == ["holds", "holds", "fails", "2 of 3"]
    assert "0 of 1 claims hold in each" in (tmp_path / "three" / "report.md").read_text(encoding="utf-8")


def test_folders_that_are_nothing_known_are_named_all_at_once(tmp_path: Path) -> None:
    write(tmp_path / "notes" / "a.txt", "x")
    write(tmp_path / "list.json", [1, 2])
    with pytest.raises(InputError) as caught:
        read.read([tmp_path / "notes", tmp_path / "list.json", tmp_path / "absent"])
    assert [problem.where for problem in caught.value.problems] == [str(tmp_path / name) for name in ("notes", "list.json", "absent")]
    assert caught.value.exit_code == 2


def test_what_is_half_written_is_shown_as_such(tmp_path: Path) -> None:
    write_run(tmp_path / "all" / "run", steps=100)
    write(tmp_path / "all" / "begun" / "manifest.json", {"kind": "evaluation", "created": "2", "model": {"sha256": "x"}})
    write(tmp_path / "all" / "broken" / "summary.json", '{"kind": "evaluation", "tas')
    write(tmp_path / "all" / "odd" / "verdict.json", {"kind": "verdict", "rules": 3})
    result = job.run([tmp_path / "all"], tmp_path / "out", None, None)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "20 of 100" in text and "not finished" in text and "broken" in result["damaged"][0]
    assert "not in the form" in result["absent"]["gates"]


def test_an_out_folder_of_anything_else_is_refused_and_an_earlier_report_replaced(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluation", 0.5)
    for place in (tmp_path / "evaluation", tmp_path / "evaluation" / "summary.json"):
        with pytest.raises(InputError, match="--out"):
            job.run([tmp_path / "evaluation"], place, None, None)
    job.run([tmp_path / "evaluation"], tmp_path / "out", "first", None)
    write(tmp_path / "out" / "figures" / "stale.png", "x")
    job.run([tmp_path / "evaluation"], tmp_path / "out", "second", None)
    assert (
        "second" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        and not (tmp_path / "out" / "figures" / "stale.png").exists()
    )
    assert json.loads((tmp_path / "evaluation" / "summary.json").read_text(encoding="utf-8"))["kind"] == "evaluation"


@pytest.mark.parametrize("broken", ["markdown", "page"])
def test_a_report_that_a_full_disk_ends_leaves_the_folder_as_it_was(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_evaluation(tmp_path / "evaluation", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(report_write, broken, full)
        with pytest.raises(EnvironmentFault, match="out: No space left on device"):
            job.run([tmp_path / "evaluation"], tmp_path / "out", None, None)
        assert not list((tmp_path / "out").iterdir())
    job.run([tmp_path / "evaluation"], tmp_path / "out", "first", None)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(report_write, broken, full)
        with pytest.raises(EnvironmentFault):
            job.run([tmp_path / "evaluation"], tmp_path / "out", "second", None)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_numbers_are_shown_with_unit_and_error() -> None:
    column = Column("score", "%", ".1f")
    assert column.title == "score (%)" and column.shown(Measured(48.71, 45.1, 52.33, 150)) == "48.7 [45.1, 52.3]"
    assert column.shown(None) == column.shown(float("nan")) == "\N{EN DASH}" and Column("n").shown(12345) == "12,345"
    table = Table("t", "c", (Column("=a"), column), ((" =1+1", Measured(1.0)), ("b", None)))
    assert flat(table) == [["'=a", "score (%)", "score low", "score high"], ["' =1+1", "1", "", ""], ["b", "", "", ""]]
    assert over([]) is None and over([Measured(1.0, 0.5, 1.5, 9)]) == Measured(1.0, 0.5, 1.5, 9)
    for num in (3, 12, 30):  # as a study's claims say of the same figures
        values = [float(value) for value in range(num)]
        of_seeds, of_study = over([Measured(value) for value in values]), claims._spread(values)["interval_95"]
        assert of_seeds is not None and [of_seeds.low, of_seeds.high] == pytest.approx(of_study, rel=1e-12)


def test_a_table_is_whole_in_markdown_whatever_its_cells_hold() -> None:
    table = Table("t", "c", (Column("a"), Column("b")), (("x | y\n# z", "<b>"), ("*", "`")))
    lines = markdown(Document("T", (), (Section("s", "S", blocks=(table,)),))).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3, 3] and "# z" not in lines
    assert "&lt;b&gt;" in page.page(Document("T", (), (Section("s", "S", blocks=(table,)),)))


def test_labels_at_the_ends_of_lines_do_not_overlap() -> None:
    from matplotlib.figure import Figure as Canvas

    with style.style("test", "a test"):
        canvas = Canvas(figsize=(draw.WIDTH_INCHES, draw.HEIGHT_INCHES), layout="constrained")
        axes = canvas.subplots()
        axes.plot([0, 1], [0, 1])
        draw.label_ends(canvas, axes, [(1.0, 0.99, f"model {number}", "#000000", "o") for number in range(9)])
        canvas.draw_without_rendering()
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 0.5 for low, high in itertools.pairwise(boxes))
        assert all(box.x1 <= canvas.bbox.x1 and box.y0 >= 0 and box.y1 <= canvas.bbox.y1 for box in boxes)


def test_a_change_is_paired_by_question_where_the_questions_are_the_same(tmp_path: Path) -> None:
    scores = {"old": (0.0, 1.0, 0.5, 0.0), "new": (0.5, 1.0, 1.0, 0.5)}
    for name, values in scores.items():
        folder = write_evaluation(tmp_path / name, sum(values) / 4)
        one = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        one["tasks"]["math"]["set"] |= {"sha256": "a", "path": f"runs/{name}/../math.jsonl"}  # two names of one file
        write(folder / "summary.json", one)
        lines = [{"task": "math", "id": str(number), "sample": 0, "score": value} for number, value in enumerate(values)]
        write(folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line in [*lines, {"task": "math", "id": "9", "score": None}]))
    changes = [50.0, 0.0, 50.0, 50.0]
    half = 1.959964 * stdev(changes) / 2
    for name, expected in (
        ("math", half),
        ("retrieval", 1.959964 * 2 * 2**0.5),
    ):  # without results: as independent, errors of 2 points each
        materials = read.read([tmp_path / "old", tmp_path / "new"])
        table = next(
            block for block in benchmarks.section(materials, {}).blocks if isinstance(block, Table) and block.id == "benchmarks_change"
        )
        value = table.rows[0][[column.name for column in table.columns].index(name)]
        assert isinstance(value, Measured) and value.value == pytest.approx(37.5) and value.high is not None
        assert value.high - value.value == pytest.approx(expected)


def test_tasks_by_length_and_what_a_gate_guards_are_retention(tmp_path: Path) -> None:
    for name, score in (("base", 0.9), ("mid", 0.3)):
        years = {f"aime_{year}": task(0.2, f"aime{year}") for year in (24, 25)}  # a published set's number is no length
        tasks = {"find_128": task(0.95), "find_512": task(score), "math_500": task(0.1), "skills": task(0.8), **years}
        write(tmp_path / name / "summary.json", {"kind": "evaluation", "model": {"sha256": name}, "tasks": tasks})
    rule = verdict()["rules"][0] | {"measure": "skills", "least_change": -0.02}
    write(tmp_path / "gate" / "verdict.json", verdict() | {"rules": [rule]})
    blocks = retention.section(read.read([tmp_path / name for name in ("base", "mid", "gate")]), {}).blocks
    tables = {block.id: block for block in blocks if isinstance(block, Table)}
    assert [column.name for column in tables["retention_length"].columns] == [
        "model",
        "find at 128",
        "find at 512",
    ]  # one length is no length
    assert [column.name for column in tables["retention"].columns] == ["model", "skills"]


def test_models_stand_behind_what_they_were_made_from_and_a_copied_merge_is_told_once(tmp_path: Path) -> None:
    models = {"toy": [], "base": [], "mid": ["base"], "other": ["base"], "mid RL": ["mid"], "toy RL": ["toy"], "merge": ["base", "mid"]}
    stages = [_stage(name, "train", after) for name, after in models.items()]
    stages.append(_stage("gate", "evaluate compare", ["mid"], state="no-go"))
    card = {"kind": "merge", "config": {"method": "linear"}, "parents": [{"path": "runs/base", "weight": 1.0}]}
    merges = tuple(
        Result(name, name, card | {"parents": [*card["parents"], *more]})
        for name, more in (("a", []), ("copy", []), ("b", card["parents"]))
    )
    study = Material("s", stages=tuple(stages), merges=merges)
    assert ancestors.in_order([study], [*models]) == ["base", "mid", "mid RL", "merge", "other", "toy", "toy RL"]
    assert ancestors.in_order([Material("results")], ["b", "a"]) == ["b", "a"]
    tables = {block.id: block for block in pipeline.section([study], {}).blocks if isinstance(block, Table)}
    assert [row[0] for row in tables["merges"].rows] == ["a", "b", "b"] and "pipeline_open" not in tables
    another = tuple(
        replace(one, values={**one.values, "run_dir": "t"}) for one in merges
    )  # a seed has merges of its own under the same names
    (table,) = pipeline._merges([study, replace(study, merges=another)])
    assert [row[0] for row in table.rows] == ["a", "b", "b"]
    folders = Material("results", merges=(merges[0], replace(merges[2], name="a")))  # of two folders, which are no seeds
    assert [row[0] for row in pipeline._merges([folders])[0].rows] == ["a", "a (2)", "a (2)"]
    beside = Material("results", merges=(replace(another[0], name="a"),))  # a folder beside a study, which is no seed of it
    assert [row[0] for row in pipeline._merges([study, beside])[0].rows] == ["a", "b", "b", "a (2)"]


def test_a_set_of_other_questions_is_not_paired() -> None:
    """The negative control of pairing: the same ids, another file."""
    one = Asked("math", task(0.5) | {"set": {"sha256": "a"}}, {"1": 0.0, "2": 1.0})
    other = replace(one, of=task(0.5) | {"set": {"sha256": "b"}})
    assert not benchmarks._unpaired(one, one) and benchmarks._unpaired(one, other) == "not the same set"


def test_a_damaged_record_costs_its_own_part_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep, loop, study = tmp_path / "deep.json", tmp_path / "loop", write_study(tmp_path / "study")
    write(deep, "[" * 100_000)
    loop.symlink_to(loop)
    write(tmp_path / "newer" / "study" / "study.json", {"kind": "study", "name": "x", "run_dir": "", "stages": {"a": {}}, "claims": []})
    with pytest.raises(InputError) as caught:
        read.read([loop, tmp_path / "newer", study, tmp_path / "study" / "."])
    assert [problem.where for problem in caught.value.problems] == [str(loop), str(tmp_path / "newer" / "study" / "study.json"), str(study)]
    record = json.loads((study / "study" / "study.json").read_text(encoding="utf-8"))
    record["stages"]["mid"] |= {"model": {"a": 1}, "title": ["x"]}
    write(study / "study" / "study.json", record)
    inside, iterdir = study / "eval_mid", Path.iterdir

    def locked(folder: Path) -> Iterator[Path]:
        if folder == inside:
            raise PermissionError(13, "Permission denied")
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", locked)
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        stream.truncate(read.MAX_JSON_BYTES + 2**20)
    one, others = read.read([study, deep, large])
    assert "Permission denied" in one.told[0] and "RecursionError" in others.told[0] and "large.json has 257 MiB" in others.told[1]
    assert "{&#39;a&#39;: 1}" in page.page(build.build([one], {}, "T"))


def test_an_evaluation_without_a_set_costs_itself_and_other_stages_are_told_of(tmp_path: Path) -> None:
    study, other = write_study(tmp_path / "study"), write_study(tmp_path / "other")
    summary = json.loads((study / "eval_mid" / "summary.json").read_text(encoding="utf-8"))
    summary["tasks"]["math"]["set"] = None
    write(study / "eval_mid" / "summary.json", summary)
    (one,) = read.read([study])
    assert (
        "tasks without a set: math" in one.told[0] and {each.name for each in one.evaluations} and not benchmarks.section([one], {}).absent
    )
    same = build.build(read.read([study, other]), {}, "T").lead
    assert not any("not the same stages" in line for line in same)
    record = json.loads((other / "study" / "study.json").read_text(encoding="utf-8"))
    record["stages"]["more"] = {**record["stages"]["mid"], "output": None}
    write(other / "study" / "study.json", record)
    assert any("not the same stages" in line for line in build.build(read.read([study, other]), {}, "T").lead)


def test_a_chain_of_stages_may_be_long() -> None:
    stages = tuple(_stage(f"s{number}", "train", [f"s{number - 1}"] * (number > 0)) for number in range(2000))
    assert ancestors.of(Material("s", stages=stages), ["s1999", "s0"]) == {"s1999": ["s0"], "s0": []}


def _stage(name: str, job: str, after: Sequence[str], state: str = "done") -> Stage:
    return Stage(name, name, name, job, tuple(after), state, "", 1.0, 1.0, 1, None)
