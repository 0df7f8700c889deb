"""The task that RL is shown on: no training text has a held-out problem, and a solution is spelled as the grader reads it."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from megatron_prism.data import tokenizer

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "quickstart_rl_corpus.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    runpy.run_path(str(SCRIPT))["make"](out)
    return out


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_training_text_has_a_problem_of_another_split(corpus: Path) -> None:
    trained, valid, held_out = (
        {problem["question"] for problem in read(corpus / f"{name}.jsonl")} for name in ("problems", "problems_valid", "problems_heldout")
    )
    assert len(trained | valid | held_out) == len(trained) + len(valid) + len(held_out) == 10**2 + 10**3
    assert 190 <= len(held_out) <= 250 and 90 <= len(valid) <= 130
    for name in ("solutions", "answers"):
        asked = {record["text"].partition("<think>")[0] for record in read(corpus / f"{name}.jsonl")}
        assert asked <= trained and len(asked) > 0.9 * len(trained)


def test_as_many_solutions_are_wrong_as_the_task_says(corpus: Path) -> None:
    answers = {problem["question"]: problem["answer"] for problem in read(corpus / "problems.jsonl")}
    assert all(int(answer) == sum(map(int, question[1:-1].split("+"))) % 5 for question, answer in answers.items())
    spelled = [re.fullmatch(r"(Q.*=)<think>([0-4,]+)</think>([0-4])", record["text"]) for record in read(corpus / "solutions.jsonl")]
    assert all(match and match[2].endswith(match[3]) for match in spelled)
    share = sum(answers[match[1]] == match[3] for match in spelled if match) / len(spelled)
    assert 0.53 < share < 0.57


def test_a_token_is_a_character_or_a_tag(corpus: Path) -> None:
    spec = tokenizer.load(corpus / "tokenizer", need_eos=True)
    text = "Q3+1+4=<think>3,4,3</think>3"
    tokens, _ = tokenizer.encode_documents([text], spec, append_eos=True)
    assert tokenizer.decode(tokens, spec, skip_special=True) == text and len(tokens) == 16 and spec.vocab_size <= 32
    assert tokenizer.encode_prompt("Q3+1+4=", spec) == [spec.eos_id, *tokens[:7]]
