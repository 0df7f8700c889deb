from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prism.prepare import words


@pytest.mark.parametrize(
    "text",
    [
        "Let $x = \\dfrac{3}{4}$ and $y=\\sqrt{2}$.",
        "let \\( x=\\frac 3 4 \\) and\n\\[ y = \\sqrt2 \\]",
        "LET x = 3/4 AND y = 2",
        "Let \\begin{align*} x &= \\tfrac34 \\end{align*} and $$ y = \\left\\lfloor 2 \\right\\rfloor $$",
        "Let $x = \\\\frac{3}{4}$ and $y=2$",  # as JSON within a text escapes it
        "\uff2cet x = \u2073\u2044\u2084 and y = \u00b2".replace("\u2073", "\u00b3"),  # full-width L, superscripts, fraction slash
    ],
)
def test_ways_to_write_one_sentence(text: str) -> None:
    expected = ["let", "x", "3", "4", "and", "y", "2"]
    assert [word for word in words.without_latex(text.replace("tfrac34", "tfrac 3 4")) if word] == expected


def test_letters_and_digits_are_words_apart() -> None:
    assert words.without_latex("2x_1 = a2b, Stra\u00dfe 10,000 \u03c0") == ["2", "x", "1", "a", "2", "b", "strasse", "10", "000", "\u03c0"]
    assert words.plain("2x_1 = a2b \\frac") == ["2x_1", "a2b", "frac"]  # prepare's own rule


def test_chinese_and_japanese_have_a_word_a_character() -> None:
    """Without spaces a whole clause would be one word, and a question too short to be looked for."""
    assert words.without_latex("\u6c42 $\\frac{1}{2}$ \u7684\u503c\uff0cx\u4e3a\uff13\u3002") == [*"\u6c4212\u7684\u503cx\u4e3a3"]
    assert words.without_latex("\u30ea\u30f3\u30b4\u30925\u500b\u30fbABC") == [*"\u30ea\u30f3\u30b4\u30925\u500b", "abc"]
    for rule in (words.plain, words.without_latex):
        assert rule("\u6c42x\u4e3a3\uff0c\u30ea\u30f3\u30b4\u30925\u500b\u3002ABC") == [
            *"\u6c42x\u4e3a3\u30ea\u30f3\u30b4\u30925\u500b",
            "abc",
        ]
        assert rule("\uc0ac\uacfc\ub294 \uc138 \uac1c") == ["\uc0ac\uacfc\ub294", "\uc138", "\uac1c"]  # Korean has spaces
    assert words.plain("\uff98\uff9d\uff7a\uff9e") == [*"\uff98\uff9d\uff7a\uff9e"]  # half-width


@settings(deadline=None)
@given(st.text(alphabet="aB1_ \\{.\u00df\u0130\u00b2\u0301\u0431\u05d0\u0939\u0e01\uac00", max_size=40) | st.text(max_size=40))
def test_plain_words_of_other_writing_are_runs(text: str) -> None:
    if not re.search(f"[{words.UNSPACED}]", text):
        assert words.plain(text) == re.findall(r"\w+", text.lower())


PIECES = st.lists(st.sampled_from(["\\Begin{ab}", "\\end {c1}", "\\\\frac", "x1", "\u0130", " ", "\\BEGIN"])).map("".join)


@settings(deadline=None)
@given(PIECES | st.text(alphabet="aB1\u00e9\u00df\u2460\ufb01 \\{}$_\n\u0130\u6c42\u30ea\u30fb", max_size=40) | st.text(max_size=40))
def test_spans_are_those_of_the_words(text: str) -> None:
    normal = words.normal(text)
    assert [normal[begin:end].casefold() for begin, end in words.spans(text)] == words.without_latex(text)


def test_no_text_is_slow() -> None:
    """A megabyte of what a pattern could try again from every place."""
    for text in ("\\" * 1_000_000, "\\begin{" * 150_000, "\\begin" + " " * 1_000_000, "\\begin{" + "a" * 1_000_000, "\u00e9" * 500_000):
        begin = time.process_time()
        words.without_latex(text)
        assert time.process_time() - begin < 2
