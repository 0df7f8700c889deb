from __future__ import annotations

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
    assert words.plain("2x_1 = a2b \\frac") == ["2x_1", "a2b", "frac"]  # prepare's own rule, as it always was


def test_chinese_and_japanese_have_a_word_a_character() -> None:
    """Without spaces a whole clause would be one word, and a question too short to be looked for."""
    assert words.without_latex("\u6c42 $\\frac{1}{2}$ \u7684\u503c\uff0cx\u4e3a\uff13\u3002") == [*"\u6c4212\u7684\u503cx\u4e3a3"]
    assert words.without_latex("\u30ea\u30f3\u30b4\u30925\u500b\u30fbABC") == [*"\u30ea\u30f3\u30b4\u30925\u500b", "abc"]
    assert words.without_latex("\uc0ac\uacfc\ub294 \uc138 \uac1c") == ["\uc0ac\uacfc\ub294", "\uc138", "\uac1c"]  # Korean has spaces


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
