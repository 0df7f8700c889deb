"""The gate: what counts as `<think> ... </think> answer`, and each way to spoof it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prism.grade.format import answer_of
from megatron_prism.grade.outcome import Graded, Item


def gate(response: str, think: str = "required", is_truncated: bool = False) -> str:
    """Return the answer after `=`, or the outcome."""
    answer = answer_of(Item(id="1", kind="math", gold="42", response=response, is_truncated=is_truncated), think)  # type: ignore[arg-type]
    return answer.outcome if isinstance(answer, Graded) else f"={answer}"


@pytest.mark.parametrize(
    ("response", "required", "opened", "free"),
    [
        ("<think>a</think> 42", "=42", "no_format", "=42"),
        (" \n<think></think>\n42\n", "=42", "no_format", "=42"),
        ("a</think> 42", "no_format", "=42", "=42"),
        ("42", "no_format", "no_format", "=42"),
        ("<think>42", "no_format", "no_format", "no_format"),
        ("<think>a</think> \n", "no_format", "no_format", "no_format"),
        ("Sure. <think>a</think> 42", "no_format", "no_format", "=42"),
        ("<think>a</think> 41 </think> 42", "no_format", "no_format", "=42"),
        ("a</think> 41 </think> 42", "no_format", "no_format", "=42"),
        ("<think><think>a</think> 42", "no_format", "no_format", "=42"),
        ("<think>a</think> 41 <think>b</think> 42", "no_format", "no_format", "=42"),
        ("<think>a</think> 42 <think>", "no_format", "no_format", "no_format"),
        ("<THINK>a</THINK> 42", "no_format", "no_format", "=<THINK>a</THINK> 42"),
        ("< think>a</ think> 42", "no_format", "no_format", "=< think>a</ think> 42"),
        ("</think> 42 <think>", "no_format", "no_format", "no_format"),
        ("", "no_format", "no_format", "no_format"),
    ],
)
def test_what_passes_the_gate(response: str, required: str, opened: str, free: str) -> None:
    assert (gate(response), gate(response, "opened"), gate(response, "free")) == (required, opened, free)


def test_a_cut_response_is_truncated_whatever_it_holds() -> None:
    assert gate("<think>a</think> \\boxed{42}", is_truncated=True) == "truncated"
    assert gate("<think>a", is_truncated=True) == "truncated"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "42", " ", "\\boxed{", "}"]), max_size=8))
def test_only_one_shape_passes(parts: list[str]) -> None:
    text = "".join(parts)
    begins, _, rest = text.strip().partition("<think>")
    inside, close, answer = rest.partition("</think>")
    is_right_shape = not begins and close and answer.strip() and "think>" not in inside + answer
    assert gate(text) == (f"={answer.strip()}" if is_right_shape else "no_format")
