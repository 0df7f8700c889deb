"""What differs between Megatron-Core's lines: each difference answered for both, whichever is installed here."""

from __future__ import annotations

import importlib.metadata
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from megatron_prism.core.config import GangConfig, ParallelConfig
from megatron_prism.core.errors import EnvironmentFault, Stopped
from megatron_prism.models import build
from megatron_prism.parallel import groups, host, megatron_versions


def test_the_context_parallel_group_is_always_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 0.19 a missing group means WORLD, and is_hybrid_cp is required."""
    import megatron.core.utils

    seen: list[dict[str, Any]] = []

    def line_016(batch: Any, cp_group: Any = None) -> Any:
        seen.append({"cp_group": cp_group})
        return batch

    def line_019(batch: Any, is_hybrid_cp: bool, cp_group: Any = None) -> Any:
        seen.append({"cp_group": cp_group, "is_hybrid_cp": is_hybrid_cp})
        return batch

    for function in (line_016, line_019):
        monkeypatch.setattr(megatron.core.utils, "get_batch_on_this_cp_rank", function)
        megatron_versions.batch_of_context_rank({"tokens": torch.zeros(1, 4)}, "the group")  # type: ignore[arg-type]
    assert seen == [{"cp_group": "the group"}, {"cp_group": "the group", "is_hybrid_cp": False}]


def test_a_rows_tokens_are_named_where_a_mamba_mixer_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.19 numbers the documents for it when it is given total_tokens, and only then; 0.16 knows no such field."""
    from dataclasses import dataclass

    import megatron.core.packed_seq_params as lines

    @dataclass
    class Line016:
        qkv_format: str
        cu_seqlens_q: Any
        cu_seqlens_kv: Any
        max_seqlen_q: int
        max_seqlen_kv: int

    @dataclass
    class Line019(Line016):
        total_tokens: int | None = None

    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    for line, more in ((Line016, {}), (Line019, {"total_tokens": 8})):
        monkeypatch.setattr(lines, "PackedSeqParams", line)
        assert vars(megatron_versions.packed_sequences(starts, 6, 8)) == {
            "qkv_format": "thd",
            "cu_seqlens_q": starts,
            "cu_seqlens_kv": starts,
            "max_seqlen_q": 6,
            "max_seqlen_kv": 6,
            **more,
        }


def test_megatrons_own_writer_is_asked_for_where_there_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import dist_checkpointing

    monkeypatch.setattr(dist_checkpointing, "save", lambda state, path, async_strategy="nvrx": None)
    assert megatron_versions.save_arguments() == {"async_strategy": "mcore"}
    monkeypatch.setattr(dist_checkpointing, "save", lambda state, path: None)
    assert megatron_versions.save_arguments() == {}


@pytest.mark.parametrize(
    ("version", "supported"), [("0.15.3", False), ("0.16.1", True), ("0.19.2", True), ("0.20.0", False), ("1.0.0", False)]
)
def test_a_megatron_core_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", version)
    if supported:
        megatron_versions.check_supported()
        return
    with pytest.raises(EnvironmentFault, match=r"required >=0\.16\.1,<0\.20"):
        megatron_versions.check_supported()


def test_psutil_is_a_requirement() -> None:
    """Without it Megatron-Core's forked checkpoint writer dies and the save hangs; it does not declare it."""
    assert any(line.startswith("psutil") for line in importlib.metadata.requires("megatron_prism") or [])


@pytest.mark.parametrize(
    ("version", "grid", "frees"),
    [((0, 16), {"pp": 2, "vpp": 2}, False), ((0, 19), {"pp": 2, "vpp": 2}, True), ((0, 16), {"pp": 2}, True), ((0, 19), {}, False)],
)
def test_a_stages_output_is_not_freed_while_it_may_be_sent(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], grid: dict[str, int], frees: bool
) -> None:
    monkeypatch.setattr(megatron_versions, "core_version", lambda: version)
    monkeypatch.setattr(host, "has_cuda", lambda: True)
    assert build._parallel_settings(ParallelConfig(**grid))["deallocate_pipeline_outputs"] is frees


@pytest.mark.parametrize(
    ("has_cuda", "error", "leaves"),
    [
        (True, ValueError("of this rank alone"), False),
        (True, EnvironmentFault("of this rank alone"), False),
        (True, Stopped("of all ranks"), True),
        (True, None, True),
        (False, ValueError("of this rank alone"), True),
    ],
)
def test_on_gpus_a_ranks_own_error_does_not_wait_for_its_peers(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, error: Exception | None, leaves: bool
) -> None:
    """NCCL's end of a process group waits for peers, which may be in a collective: it is left to the end of the process."""
    left: list[None] = []
    monkeypatch.setattr(groups, "join", lambda timeout_s: None)
    monkeypatch.setattr(groups, "grid", lambda *args: nullcontext())
    monkeypatch.setattr(groups.host, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.dist, "destroy_process_group", lambda: left.append(None))
    with nullcontext() if error is None else pytest.raises(type(error)), groups.gang(GangConfig()):
        if error is not None:
            raise error
    assert bool(left) is leaves
