"""Memory at logged steps: the fullest rank's, and a warning where an allocator ran out of it."""

from __future__ import annotations

import logging
import types

import pytest

from megatron_prism.train import memory


def test_a_device_that_ran_out_of_memory_is_told_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    retries = iter([3, 3, 5, 5])  # 3: of loading
    host = types.SimpleNamespace(has_cuda=lambda: True, peak_memory_bytes=lambda: 2**31, num_alloc_retries=lambda: next(retries))
    monkeypatch.setattr(memory, "host", host)
    monkeypatch.setattr(memory, "groups", types.SimpleNamespace(agree=list))
    monkeypatch.setattr(memory.torch.distributed, "get_rank", lambda: 0)
    of_run = memory.Memory()
    assert of_run.metrics(1) == {"memory_gib": 2.0} and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert of_run.metrics(2) == {"memory_gib": 2.0, "alloc_retries": 2.0}
    assert "step 2: a device ran out of memory 2 times" in caplog.text
    caplog.clear()
    assert of_run.metrics(3) == {"memory_gib": 2.0} and not caplog.records


def test_a_host_has_no_such_metrics() -> None:
    assert memory.Memory().metrics(1) == {}
