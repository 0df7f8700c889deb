"""Stop texts end a rollout where its text holds one, however its tokens cut it."""

from __future__ import annotations

from pathlib import Path

from megatron_prism.data import tokenizer
from megatron_prism.generate.engine import Sampling
from megatron_prism.generate.lane import Draft
from megatron_prism.generate.stop import StopTexts


def test_a_rollout_ends_with_the_token_that_completes_a_stop_text(tiny_tokenizer: Path) -> None:
    spec = tokenizer.load(tiny_tokenizer)
    sampling = Sampling(max_tokens=500, stop=StopTexts(("product 6;", "\n\n"), spec))
    text = "The sum of 2 and 3 is 5, their product 6; return 2 + 3\n"
    ids = tokenizer.encode_text(text, spec)
    draft, rollout = Draft(0, 0, 0, 1, 500, 0), None
    for token in ids:
        rollout = draft.extend(token, 0.0, sampling)
        if rollout is not None:
            break
    assert rollout is not None and rollout.ended == "stop"
    said, before = (tokenizer.decode(ids[: len(rollout.token_ids) - short], spec) for short in (0, 1))
    assert "product 6;" in said and "product 6;" not in before


def test_a_long_rollout_is_searched_at_its_end_alone(tiny_tokenizer: Path) -> None:
    """What stands far before the end was looked at when it was the end; special tokens have no text."""
    spec = tokenizer.load(tiny_tokenizer)
    stop, filler = StopTexts(("END",), spec), tokenizer.encode_text("sum " * 200, spec)
    assert not stop(filler) and stop([*filler, *tokenizer.encode_text("the END", spec)])
    assert not stop([*tokenizer.encode_text("E", spec), *filler, *tokenizer.encode_text("ND", spec)])
    assert not StopTexts(("</s>",), spec)([*filler, spec.eos_id or 0])
