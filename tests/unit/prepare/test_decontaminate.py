from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prism.prepare import decontaminate


def shared_run(texts: list[str], ngram: int, shortest: int, text: str) -> str | None:
    """Find by brute force what Overlap.first finds."""
    runs = set()
    for known in texts:
        words = re.findall(r"\w+", known.lower())
        length = min(len(words), ngram)
        runs |= (
            {tuple(words[start : start + length]) for start in range(len(words) - length + 1)} if len(words) >= max(shortest, 1) else set()
        )
    words = re.findall(r"\w+", text.lower())
    spans = ((start, length) for start in range(len(words)) for length in range(min(ngram, len(words) - start), 0, -1))
    return next((" ".join(words[start : start + length]) for start, length in spans if tuple(words[start : start + length]) in runs), None)


WORDS = st.lists(st.sampled_from(["a", "B", "b", "c", "\u00e9"]), max_size=30).map(" ".join)


@pytest.mark.parametrize("factor", [decontaminate.FACTOR, 0], ids=["hashed", "all hashes collide"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(WORDS, max_size=4), ngram=st.integers(1, 9), shortest=st.integers(0, 9), text=WORDS)
def test_first_is_what_brute_force_finds(
    factor: int, texts: list[str], ngram: int, shortest: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decontaminate, "FACTOR", factor)
    found = decontaminate.overlap(texts, ngram, shortest)
    assert found.first(text) == shared_run(texts, ngram, shortest, text)
    assert pickle.loads(pickle.dumps(found)).first(text) == found.first(text)
    assert (found.num_texts, found.num_too_short) == (len(texts), sum(len(words.split()) < max(shortest, 1) for words in texts))


def test_ngram_and_shortest_to_the_word() -> None:
    words = [f"w{index}" for index in range(20)]
    found = decontaminate.overlap([" ".join(words), "one two three four five six seven eight", "too short by one word it is"], 13, 8)
    assert found.num_too_short == 1
    assert found.first("x " + " ".join(words[7:20]) + " x") == " ".join(words[7:20])
    assert found.first("x " + " ".join(words[7:19]) + " x") is None
    assert found.first("zero one two three four five six seven eight nine") == "one two three four five six seven eight"
    assert found.first("one two three four five six seven nine") is found.first("too short by one word it is") is found.first("") is None
    assert found.first("eight " + " ".join(words[:12]) + " one two three") is None  # a run across two evaluation texts is none


def test_layout_and_case_hide_no_copy() -> None:
    found = decontaminate.overlap(["Let $x = \\frac{3}{4}$ and $y=\\sqrt{2}$.\nFind the value of x + y, in lowest terms."], 8, 8)
    assert found.first("LET x=\\frac {3} {4} AND y = \\sqrt 2; find ...") == "let x frac 3 4 and y sqrt"
    assert found.first("Let x = 3/4 and y = sqrt(2); find ...") is None  # without \frac the run is another one


def test_chinese_questions_are_found() -> None:
    """Without spaces a clause is one word where a run of letters is: no run of 13 then, nor 8 words in all."""
    question = "\u5df2\u77e5\u51fd\u6570\u7684\u5b9a\u4e49\u57df\u4e3a\u5168\u4f53\u5b9e\u6570\uff0c\u6c42\u5b83\u7684\u503c\u3002"
    found = decontaminate.overlap([question, "\u6c42\u5b83\u7684\u503c"], 13, 8)
    assert found.num_too_short == 1
    assert found.first(f"\u9898\u76ee\uff1a{question}\u89e3\uff1a") == " ".join(question[:13])
    assert found.first("\u5df2\u77e5\u51fd\u6570\u7684\u5b9a\u4e49\u57df\u4e3a\u5168\u4f53\u6574\u6570") is None


def test_real_sets_against_each_other(shared_data: Path) -> None:
    def read(name: str, *keys: str) -> list[str]:
        return ["\n".join(json.loads(line)[key] for key in keys) for line in (shared_data / name).read_text("utf-8").splitlines()]

    train, test = (read(f"gsm8k_{side}.jsonl", "question", "answer") for side in ("train", "test"))
    of_test = decontaminate.overlap(test + read("math500.jsonl", "problem"), 13, 8)
    assert of_test.num_texts == 1819 and of_test.num_too_short == 13
    assert all(of_test.first(f"Quoted: {text.upper()} (end)") for text in test)
    shared = {text: run for text in train if (run := of_test.first(text))}
    assert len(shared) == 11 and len(train) == 7473
    everything = [" ".join(re.findall(r"\w+", text.lower())) for text in test + read("math500.jsonl", "problem")]
    assert all(any(run in text for text in everything) for run in shared.values())
    wikitext = (shared_data / "wikitext2_valid.txt").read_text("utf-8")
    assert of_test.first(wikitext) is None
    assert of_test.first(f"{wikitext[:5000]} {test[7]} {wikitext[5000:9000]}") is not None


def test_of_runs_that_begin_at_one_word_the_longest_is_named() -> None:
    of = decontaminate.overlap(["a b c d", "a b c d e f g"], 6, 4)
    assert of.first("x a b c d e f y") == "a b c d e f" and of.first("x a b c d e y") == "a b c d"
