"""What forward-only refuses before a model is asked. What it returns: tests/distributed/test_objectives.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prism.models import forward


def test_microbatches_of_several_shapes_are_refused_also_where_padding_makes_them_alike() -> None:
    batches = [{"tokens": torch.zeros(1, length, dtype=torch.long)} for length in (7, 8)]
    groups: Any = SimpleNamespace(tp=8, cp=1)
    with pytest.raises(ValueError, match=r"one shape are needed, found \[\(1, 7\), \(1, 8\)\]"):
        forward.log_probs([], batches, groups)


def test_the_logits_of_a_text_are_not_given_in_parts() -> None:
    groups: Any = SimpleNamespace(cp=2)
    with pytest.raises(ValueError, match="context parallelism 2"):
        forward.logits([], [1, 2, 3], groups)
