"""Requests as rows of texts, and rounds of rows."""

from __future__ import annotations

import itertools

from megatron_prism.eval.retention.serve import rounds, rows_of


def test_texts_that_differ_in_the_last_token_share_a_row() -> None:
    """The choices of one token, and a continuation that begins elsewhere in the same text."""
    pairs = [((1, 2, 3), (7,)), ((1, 2, 3), (8,)), ((1, 2), (3, 9)), ((1, 2, 3), (7, 7))]
    rows = rows_of(pairs, 10)
    assert [(row.tokens, [number for number, _ in row.pairs]) for row in rows] == [((1, 2, 3, 7), [3]), ((1, 2, 3), [0, 1, 2])]
    assert list(rows[1].asked) == [(2, 7), (2, 8), (1, 3), (2, 9)]


def test_a_long_context_is_cut_on_its_left() -> None:
    """The last token is only predicted: a context of 4 holds 5 tokens of a request."""
    rows = rows_of([((1, 2, 3, 4), (5,)), ((0, 1, 2, 3, 4), (6,))], 4)
    assert [row.tokens for row in rows] == [(1, 2, 3, 4)]


def test_rounds_hold_every_row_once_within_the_budget() -> None:
    rows = rows_of([(tuple(range(length)), (1,)) for length in range(1, 40)], 100)
    for budget, num_microbatches in itertools.product((1, 50, 1000), (1, 3)):
        parts = list(rounds(rows, budget, num_microbatches))
        assert [row for part in parts for row in part] == rows
        assert all(len(part) * len(part[0].tokens) <= max(budget, len(part[0].tokens)) * num_microbatches for part in parts)
