from __future__ import annotations

import math
import random
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prism.core.errors import CheckpointError
from megatron_prism.eval import held_out


def test_equal_sequences_have_the_standard_error_of_their_means() -> None:
    means = [2.0, 2.5, 3.5, 2.25]
    found = held_out.of_sequences([(32 * mean, 32) for mean in means])
    assert found.loss == statistics.fmean(means) and (found.num_tokens, found.num_sequences) == (128, 4)
    assert found.standard_error == pytest.approx(statistics.stdev(means) / 2)


def test_sequences_count_by_their_tokens_and_masked_ones_not_at_all() -> None:
    found = held_out.of_sequences([(10.0, 5), (90.0, 30), (0.0, 0)])
    assert found == held_out.of_sequences([(10.0, 5), (90.0, 30)])
    assert found.loss == 100 / 35 and found.num_sequences == 2
    one, none = held_out.of_sequences([(10.0, 5)]), held_out.of_sequences([])
    assert one.standard_error is None and math.isnan(none.loss) and none.num_tokens == 0


def test_the_error_is_the_spread_of_repeated_draws() -> None:
    """Tokens of a sequence share their sequence's level: an error that took them as independent would be several times too small."""
    draw = random.Random(3)

    def sample() -> held_out.Loss:
        sums = []
        for _ in range(40):
            count, level = draw.randint(10, 60), draw.gauss(2.0, 0.5)
            sums.append((sum(draw.gauss(level, 0.2) for _ in range(count)), count))
        return held_out.of_sequences(sums)

    drawn = [sample() for _ in range(300)]
    spread = statistics.stdev(one.loss for one in drawn)
    said = statistics.fmean(one.standard_error or 0.0 for one in drawn)
    assert said == pytest.approx(spread, rel=0.1)
    naive = 0.54 / math.sqrt(40 * 35)
    assert naive < spread / 3


@pytest.mark.parametrize(("nll", "is_refused"), [(math.nan, True), (math.inf, True), (12.5, False)])
def test_a_loss_that_is_not_finite_ends_the_evaluation_on_every_rank(nll: float, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out.loader, "held_out", lambda *_: {"math": [], "empty": []})
    monkeypatch.setattr(held_out.loader, "valid_batches", lambda sequences, *_: sequences)
    of_sources = iter([{0: (nll, 5)}, {}])
    monkeypatch.setattr(held_out, "_by_sequence", lambda *_: next(of_sources))
    groups: Any = SimpleNamespace(dp_rank=0, dp=1)

    def losses() -> dict[str, held_out.Loss]:
        return held_out.losses([], None, groups, num_sequences=1, seq_length=5, seed=1)  # type: ignore[arg-type]

    if is_refused:
        with pytest.raises(CheckpointError, match=r"held-out tokens of math: found logits that are NaN or inf") as raised:
            losses()
        assert raised.value.is_agreed
    else:
        found = losses()
        assert found["math"].loss == 2.5 and math.isnan(found["empty"].loss)
