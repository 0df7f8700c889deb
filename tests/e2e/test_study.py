"""The tiny study before it runs: its graph, its claims, and its corpus, of which no training text has a held-out problem."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism.core.config import StudyConfig
from megatron_prism.core.load import load
from megatron_prism.data import tokenizer

ROOT = Path(__file__).resolve().parents[2]
STUDY, SCRIPT = ROOT / "configs" / "studies" / "tiny.yaml", ROOT / "examples" / "study_corpus.py"
TRAINED = ("weak", "web_math", "web_code", "web_science", "traces_math", "traces_code", "traces_science", "skills", "short", "long")
DOMAINS = ("math", "code", "science")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    runpy.run_path(str(SCRIPT))["make"](out)
    return out


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(texts: list[dict[str, str]]) -> set[str]:
    return {record["text"].partition("=")[0] for record in texts}


def test_no_training_text_has_a_held_out_problem(corpus: Path) -> None:
    held_out = {question["id"] for name in (*DOMAINS, "skills") for question in read(corpus / f"heldout_{name}.jsonl")}
    assert 500 < len(held_out) <= 4 * 150
    trained = {problem for name in TRAINED for problem in asked(read(corpus / f"{name}.jsonl"))}
    rewarded = {record["question"].rstrip("=") for name in DOMAINS for record in read(corpus / f"problems_{name}.jsonl")}
    assert not held_out & (trained | rewarded)
    assert rewarded <= trained  # the control: problems are spelled alike in all files


def test_answers_are_right_and_as_many_texts_are_wrong_as_the_study_says(corpus: Path) -> None:
    problems = {record["question"]: record["answer"] for name in DOMAINS for record in read(corpus / f"problems_{name}.jsonl")}
    sums = {problem: answer for problem, answer in problems.items() if problem[0] == "Q"}
    assert all(int(answer) == sum(map(int, problem[1:-1].split("+"))) % 5 for problem, answer in sums.items())
    assert problems["X134:st="] == "341"
    for name, least, most in (("traces_math", 0.78, 0.82), ("traces_code", 0.78, 0.86), ("web_math", 0.57, 0.63), ("web_code", 0.48, 0.53)):
        spelled = [re.fullmatch(r"(.*=)<think>.*</think>(.*)", record["text"]) for record in read(corpus / f"{name}.jsonl")]
        known = [match for match in spelled if match and match[1] in problems]
        assert least < sum(problems[match[1]] == match[2] for match in known) / len(known) < most, name


def test_a_token_is_a_character_or_a_tag(corpus: Path) -> None:
    spec = tokenizer.load(corpus / "tokenizer", need_eos=True)
    texts = [record["text"] for name in TRAINED for record in read(corpus / f"{name}.jsonl")[:50]]
    for text in texts:
        tokens, _ = tokenizer.encode_documents([text], spec, append_eos=True)
        assert tokenizer.decode(tokens, spec, skip_special=True) == text and len(tokens) == len(re.sub("</?think>", "t", text)) + 1
    assert spec.vocab_size <= 64 and tokenizer.encode_prompt("Q3+1+4=", spec)[0] == spec.eos_id


def test_every_stage_is_named_by_what_needs_it() -> None:
    study = load(STUDY, StudyConfig, [])
    stages = {stage.name: stage for stage in study.stages}
    figures = {
        str(figure)
        for claim in study.claims
        for check in (*claim.requires, *claim.shows, *claim.null)
        for figure in (check.value, check.above, check.below, check.near)
        if isinstance(figure, str)
    }
    assert {figure.partition(":")[0] for figure in figures} <= set(stages)
    assert {before for stage in study.stages for before in stage.after} <= set(stages)
    unread = set(stages) - {before for stage in study.stages for before in stage.after} - {figure.partition(":")[0] for figure in figures}
    assert unread == {"report"}


def test_the_dry_run_knows_every_stage(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "megatron_prism.cli", "study", "configs/studies/tiny.yaml", f"run_dir={tmp_path}", "--dry-run"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(stage.name in done.stdout for stage in load(STUDY, StudyConfig, []).stages)
    assert list(tmp_path.iterdir()) == []
