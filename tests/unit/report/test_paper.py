"""Every number of configs/studies/paper stands in shared/PAPER.md in its place, and every number of those passages in a file.

A table's numbers are compared in reading order, so one that is changed, added, left out or moved is seen; each is changed in turn to show it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_prism.core.errors import InputError
from megatron_prism.report import paper
from megatron_prism.report.paper import PaperTable

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "studies" / "paper"
TABLES = paper.read(FOLDER)
# a number of its own: not within a name (GSM8K, Granite-3.3, 8B), and with its sign left out; or a dash in its place
NUMBER = re.compile(r"(?<![\w.\-])(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?(?!\w|\.\d)|(?<=[|/ ])\u2013(?=[ |/])")
Numbers = list[float | None]


@dataclass(frozen=True)
class Prose:
    """A passage, from one text to another, without what `drop` matches. omit: rows whose number the passage gives with another row's.

    with_keys: a row's keys are numbers of the passage too. by_column: the passage lists a column after the other.
    """

    start: str
    end: str
    drop: str = ""
    omit: tuple[tuple[str, ...], ...] = ()
    with_keys: bool = False
    by_column: bool = False
    page: str = "PAPER.md"


@dataclass(frozen=True)
class Pipes:
    """A table of pipes under a text; first: the column that the numbers begin in, last: the one they end before. labels: the rows' names there."""

    start: str
    first: int
    last: int | None = None


@dataclass(frozen=True)
class Settings:
    """A passage in which each row's number is what its pattern captures. rest: the numbers of the passage that no row takes."""

    start: str
    end: str
    patterns: dict[str, str]
    rest: tuple[float, ...] = ()


T16 = {
    "steps": r"\| steps \| ([\d,]+)",
    "micro_batch": r"\"effective batch size\" \| (\d+) / 1 / 1",
    "gradient_accumulation": r"\"effective batch size\" \| 1 / (\d+) / 1",
    "batch_per_rank": r"\"effective batch size\" \| 1 / 1 / (\d+)",
    "fsdp_algorithm": r"algorithm (\d)",
    "dp_sharding": r"DP sharding (\d+)",
    "dp_replication": r"DP replication (\d+)",
    "seq_length": r"sequence length \| ([\d,]+)",
    "beta1": r"betas \(([\d.]+)",
    "beta2": r"betas \([\d.]+, ([\d.]+)",
    "eps": r"eps ([\de-]+)",
    "weight_decay": r"weight decay ([\d.]+)",
    "lr": r"\| LR \| ([\de-]+)",
    "warmup_steps": r"(\d+) warm-up",
    "decay_steps": r"([\d,]+) decay steps",
    "final_factor": r"final factor ([\d.]+)",
}
T17 = {
    "steps": r"\| steps \| ([\d,]+)",
    "micro_batch": r"micro batch (\d+)",
    "gradient_accumulation": r"grad-accum (\d+)",
    "cp": r"CP (\d+),",
    "dp_sharding": r"DP sharding (\d+)",
    "dp_replication": r"DP replication (\d+)",
    "lr": r"AdamW ([\de-]+)",
    "beta1": r"betas \(([\d.]+)",
    "beta2": r"betas \([\d.]+,([\d.]+)",
    "eps": r"eps ([\de-]+)",
    "weight_decay": r"wd ([\d.]+)",
    "warmup_steps": r"(\d+) warm-up",
    "constant_steps": r"(\d+) constant",
    "final_factor": r"final LR factor (\d+)",
    "eval_interval": r"interval ([\de]+)",
}
T10 = {
    "responses_per_prompt": r"per prompt \(G\) \| (\d+)",
    "temperature": r"temperature ([\d.]+)",
    "top_p": r"top-p ([\d.]+)",
    "batch": r"\| batch \| ([\d,]+)",
    "prompts": r"= (\d+) prompts",
    "steps": r"\| steps \| ([\d,]+)",
    "save_interval": r"saved each (\d+)",
    "context": r"packing \| ([\d,]+) /",
    "packing": r"packing \| [\d,]+ / ([\d,]+)",
    "lr": r"\| LR \| ([\de-]+)",
    "kl_beta": r"KL beta \| ([\d.]+)",
    "tis_cap": r"C = ([\d.]+)",
}
RL_DATA = {
    "math offered": r"data: math (\d+)K",
    "math unbalanced": r"1/16 correct \S+ (\d+)k",
    "math balanced": r"all domains (\d+)k",
    "science offered": r"science (\d+)K",
    "science unbalanced": r"science >=1 \S+ (\d+)k",
    "science balanced": r"all domains (\d+)k",
    "code offered": r"code (\d+)K",
    "code unbalanced": r"code >=1 \S+ (\d+)k",
    "code balanced": r"all domains (\d+)k",
}
WHERE: dict[str, Prose | Pipes | Settings] = {
    "t01_data": Pipes("### 1.2 Data", 2, 6),
    "t03_when_to_midtrain": Prose("**T3 when", "(After-LC", drop=r"Phase \d"),
    "t04_leaderboards": Pipes("**T4 leaderboards", 1),
    "t05_domains": Prose("**T5/T19", " Page AVG", drop=r"\(T19 prints.*?typo\)"),
    "page_avg": Prose(" Page AVG (Overall):", "\n"),
    "t06_base_vs_prism": Pipes("**T6 Base vs PRISM", 2),
    "t07_long_context": Pipes("**T7 long-context", 1),
    "t08_context_length": Prose("**T8 context", "\n"),
    "t09_token_budget": Prose("**T9/T20", "\n"),
    "t11_pipeline": Pipes("**T11 pipeline", 3),
    "page_rl": Prose('Page "+PRISM+RL"', " (order"),
    "rl_gains": Prose("RL gains quoted", "\n"),
    "rl_peaks": Prose("peaks PRISM", "; Base"),
    "rl_peaks_base": Prose("; Base\u2192RL LCB", ". **All 12"),
    "fig17_rl_training": Prose("Fig 17 (G4", ". AIME26", drop="Fig 17"),
    "aime26": Prose("AIME26:", "\n"),
    "t12_weight_change": Prose("* T12 (", "\n"),
    "t15_correctness": Prose("(Pass, median length", "(Text elsewhere"),
    "t22_thresholds": Prose("* T22 thresholds", "\n", with_keys=True),
    "t23_changed_by_group": Prose("* T23 %", " Groups to", drop=">1%"),
    "update_cosine": Prose("* Update direction cosine", "(W picture)", drop="Eq 2"),
    "cka_minimum": Prose("MT vs RL min:", ", std"),
    "cka_base_mid": Prose("Base vs MT: G33 final", "\n", drop="fig 27|3\u20134|@[0-9]+", omit=(("granite-3.3-8b", "final", "c4"),)),
    "landscape_1d": Prose("1D values read by eye:", ". **Not", by_column=True),
    "t16_midtraining": Settings("| steps | 25,000", "| precision", T16, rest=(128, 6, 7, 5e-6)),
    "t17_long_context": Settings("| steps | 1,000; micro", "LE exponential", T17),
    "t18_long_context_data": Prose("LC data (B tokens)", "(code QA"),
    "t10_rl": Settings("| responses per prompt", "| reward", T10, rest=(16, 1.0, 20, 17)),
    "rl_data": Settings("RL data: math", "code and science topped", RL_DATA),
    "icml_poster": Prose("(code +6", "; four models", page="ANALYSIS.md"),
}


@pytest.fixture(scope="module")
def pages(shared_data: Path) -> dict[str, str]:
    return {name: (shared_data.parent / name).read_text("utf-8") for name in ("PAPER.md", "ANALYSIS.md")}


def number(text: str) -> float | None:
    return None if text == "\u2013" else float(text.replace(",", ""))


def passage(where: Prose | Settings, page: str) -> str:
    start = page.index(where.start)
    return page[start : page.index(where.end, start + 1)]


def said(name: str, pages: dict[str, str]) -> Numbers:
    """Return the numbers of a table's passage, in reading order."""
    where = WHERE[name]
    if isinstance(where, Settings):
        text = passage(where, pages["PAPER.md"])
        return [number(re.search(pattern, text)[1]) for pattern in where.patterns.values()]  # type: ignore[index]
    if isinstance(where, Prose):
        text = passage(where, pages[where.page])
        return [number(part) for part in NUMBER.findall(re.sub(where.drop, "", text) if where.drop else text)]
    return [number(NUMBER.search(f"| {cell} |")[0]) for row in rows(where, pages["PAPER.md"]) for cell in row[where.first : where.last]]  # type: ignore[index]


def rows(where: Pipes, page: str) -> Iterator[list[str]]:
    lines = page[page.index(where.start) :].splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("|"))
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]


def ours(table: PaperTable) -> Numbers:
    """Return a table's numbers in the order of its passage."""
    where = WHERE[table.name]
    cells = {key: row for key, row in table.cells.items() if not (isinstance(where, Prose) and key in where.omit)}
    if isinstance(where, Prose) and where.by_column:
        return [row[column] for column in table.columns for row in cells.values()]
    if table.name == "t12_weight_change":  # T13 gives no sparsity
        *most, last = [[row[column] for column in table.columns] for row in cells.values()]
        assert last.pop() is None
        return [value for row in (*most, last) for value in row]
    is_keyed = isinstance(where, Prose) and where.with_keys
    return [value for key, row in cells.items() for value in (*(map(float, key) if is_keyed else ()), *row.values())]


def test_each_table_has_its_passage() -> None:
    assert WHERE.keys() | {"t01_epochs"} == TABLES.keys()
    assert sum(value is not None for table in TABLES.values() for row in table.cells.values() for value in row.values()) > 1000


@pytest.mark.parametrize("name", WHERE)
def test_a_table_is_the_papers(name: str, pages: dict[str, str]) -> None:
    table, of_paper = TABLES[name], said(name, pages)
    assert ours(table) == of_paper
    omit = getattr(WHERE[name], "omit", ())
    for key, row in table.cells.items():  # the control: each cell, changed in turn
        for column, value in row.items():
            other = 1.25 if value is None else value + 0.01
            changed = replace(table, cells={**table.cells, key: {**row, column: other}})
            is_absent = name == "t12_weight_change" and value is None and column == "sparsity"
            assert key in omit or is_absent or ours(changed) != of_paper
        fewer = replace(table, cells={other: cells for other, cells in table.cells.items() if other != key})
        assert key in omit or name == "t12_weight_change" or ours(fewer) != of_paper


@pytest.mark.parametrize("name", ["t16_midtraining", "t17_long_context", "t10_rl"])
def test_no_setting_is_left_out(name: str, pages: dict[str, str]) -> None:
    where = WHERE[name]
    assert isinstance(where, Settings)
    text = "\n".join(line for line in passage(where, pages["PAPER.md"]).splitlines() if "derived" not in line)
    for begin, end in sorted({re.search(pattern, text).span(1) for pattern in where.patterns.values()}, reverse=True):  # type: ignore[union-attr]
        text = text[:begin] + "x" * (end - begin) + text[end:]
    assert (
        tuple(float(part.replace(",", "")) for part in re.findall(r"(?<![\w.\-,])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)", text)) == where.rest
    )


@pytest.mark.parametrize("name", ["t16_midtraining", "t17_long_context", "t10_rl", "rl_data"])
def test_settings_are_named_as_they_are_read(name: str) -> None:
    where = WHERE[name]
    assert isinstance(where, Settings)
    named = [" ".join((*key, column)) if name == "rl_data" else key[0] for key, row in TABLES[name].cells.items() for column in row]
    assert named == list(where.patterns)


LABELS: dict[str, Callable[[list[str]], str]] = {
    "t06_base_vs_prism": lambda row: row[1].lower().replace("prism", "mcs"),
    "t11_pipeline": lambda row: "/".join("none" if cell == "\u2013" else cell.lower() for cell in row[1:3]),
    "t04_leaderboards": lambda row: {"Base": "base", "Math": "m", "M+C": "mc", "MCS": "mcs"}[row[0]],
}
MODELS = {
    "Granite-3.3": "granite-3.3-8b",
    "Granite-4 ": "granite-4.0-micro",
    "Granite-4-H": "granite-4.0-h-micro",
    "Nemotron-H": "nemotron-h-8b",
    "Mistral-7B": "mistral-7b-v0.1",
    "LLaMA-3.1": "llama-3.1-8b",
    "Mistral-Small": "mistral-small-24b",
}


@pytest.mark.parametrize("name", LABELS)
def test_rows_are_named_as_the_papers(name: str, pages: dict[str, str]) -> None:
    where, model, expected = WHERE[name], "", []
    assert isinstance(where, Pipes)
    for row in rows(where, pages["PAPER.md"]):
        if name != "t04_leaderboards":
            model = next((ours for theirs, ours in MODELS.items() if row[0].startswith(theirs)), model)
        expected.append("/".join(filter(None, [model, LABELS[name](row)])))
    assert ["/".join(key) for key in TABLES[name].cells] == expected


def test_epochs_follow_from_the_weights(pages: dict[str, str]) -> None:
    data, epochs = TABLES["t01_data"].cells, TABLES["t01_epochs"].cells
    for key, row in epochs.items():
        for mix, value in row.items():
            weight = data[key][mix]
            assert (value is None) == (weight is None)
            if weight is not None:
                assert value == pytest.approx(weight / 100 * 26.2144 / data[key]["tokens"], abs=0.0051)  # type: ignore[operator]
    said = [[number(part) for part in NUMBER.findall(row[6])] for row in rows(Pipes("### 1.2 Data", 6), pages["PAPER.md"])]
    for row, of_paper in zip(epochs.values(), said, strict=True):
        values = [value for value in row.values() if value is not None]
        assert values == of_paper or set(values) == set(of_paper)  # a number that stands for several mixtures


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    good = (FOLDER / "t22_thresholds.yaml").read_text()
    faults = {
        "a.yaml": good.replace("82.3", "many"),
        "b.yaml": good.replace("  - [0.5,", "  - [0.1,"),
        "c.yaml": good.replace("unit:", "units_of:"),
        "d.yaml": good.replace("quality: stated", "quality: guessed"),
        "e.yaml": "[",
        "f.yaml": "3",
    }
    for name, text in faults.items():
        assert text != good
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        paper.read(tmp_path)
    assert len(error.value.problems) == len(faults)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no .yaml"):
        paper.read(tmp_path / "none")
