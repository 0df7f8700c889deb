"""Megatron-Core 0.19's dynamic engine against the cached engine, on a host: its own scheduler, pages and model, on a stand-in for flash-attn."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.tiny import random_model
from tests.ranks import Ranks

from . import on_ranks

CORE = importlib.metadata.version("megatron-core")
pytestmark = pytest.mark.skipif(
    CORE.startswith("0.16"), reason=f"megatron-core {CORE}: its dynamic engine ignores windows; 0.19 by tools/setup_mcore019.sh"
)
LOGPROB = 1e-5  # fp32: two orders of the same sums
SEEN = 5 * LOGPROB  # and what a fault moves a log-probability by, at least
# of two samples of each prompt the second need not read the whole pages of four tokens, but for the last two tokens
SHARED = sum((length - 2) // 4 * 4 for length in on_ranks.LENGTHS)
FAMILIES = ("llama", "mistral", "mistral_small", "qwen2")  # llama3's rotary scaling; a window; heads of another size; biases
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
}
SPLITS = [(family, layout) for family in ("llama", "mistral") for layout in LAYOUTS if (family, layout) != ("mistral", "tp2_pp2")]
Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a family's folder with hf/ and ckpt/."""
    from megatron_prism.jobs import convert

    @cache
    def of(family: str) -> Path:
        root = tmp_path_factory.mktemp(family)
        random_model(family).save_pretrained(root / "hf")
        convert.run_import(root / "hf", root / "ckpt", dry_run=False)
        return root

    return of


@pytest.fixture(scope="module")
def compared(run_distributed: Run, checkpoint: Callable[[str], Path]) -> Callable[..., dict[str, Any]]:
    @cache
    def of(family: str, layout: str | None = None) -> dict[str, Any]:
        num_ranks, grid = (1, {}) if layout is None else LAYOUTS[layout]
        parallel = {**grid, "distributed_optimizer": False}
        own = {"ckpt": checkpoint(family) / "ckpt", "is_whole": layout is None}
        return run_distributed(on_ranks.compare, num_ranks, timeout_s=300.0, parallel=parallel, **own)[0]

    return of


CASES = [*on_ranks.SAMPLINGS, "a full context", "as it stands", "pages are scarce", "other weights", "drawn"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_it_draws_the_cached_engines_tokens(compared: Callable[..., dict[str, Any]], family: str, case: str) -> None:
    found = compared(family)[case]
    assert found["same"] and found["ended"] and found["error"] < LOGPROB and found["tokens"] > 14
    endings = {"stop": "stop", "T 0.7 and end tokens": "end_token", "a full context": "max_context", "greedy": "max_tokens"}
    assert endings.get(case, "max_tokens") in found["endings"]


@pytest.mark.parametrize(("family", "layout"), SPLITS)
def test_it_draws_them_on_layouts(compared: Callable[..., dict[str, Any]], family: str, layout: str) -> None:
    found = compared(family, layout)["drawn"]
    assert found["same"] and found["ended"] and found["error"] < LOGPROB


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Return a function that gives a layout's comparison for Nemotron-H, on ranks whose Triton is the interpreter."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("TRITON_INTERPRET", "MAMBA_DETERMINISTIC"):
            patched.setenv(name, "1")
        ranks = Ranks(tmp_path_factory.mktemp("interpreted"))

    @cache
    def of(layout: str) -> dict[str, Any]:
        num_ranks, grid = LAYOUTS.get(layout, (1, {}))
        own = {"ckpt": checkpoint("nemotron_h") / "ckpt", "parallel": {**grid, "distributed_optimizer": False}}
        return ranks.run(on_ranks.interpret, num_ranks, timeout_s=400.0, **own)[0]

    yield of
    ranks.end()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["1", "tp2_sp"])
def test_a_hybrid_draws_them_by_megatrons_own_kernels(interpreted: Callable[[str], dict[str, Any]], layout: str) -> None:
    found = interpreted(layout)
    for case in ("drawn", "other weights"):
        assert found[case]["same"] and found[case]["error"] < LOGPROB and found[case]["tokens"] == 12
    stale = found["a stale exp(A_log)"]
    assert not stale["same"] or stale["error"] > SEEN


@pytest.mark.parametrize("family", FAMILIES)
def test_scarce_pages_shared_ones_and_other_weights_were_met(compared: Callable[..., dict[str, Any]], family: str) -> None:
    found = compared(family)
    assert all(0 < num_tokens <= SHARED for num_tokens in found["shared"])
    assert found["evicted"] > 0 and found["other weights, other tokens"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("control", on_ranks.CONTROLS)
def test_a_fault_is_seen(compared: Callable[..., dict[str, Any]], family: str, control: str) -> None:
    found = compared(family)[control]
    assert not found["same"] or found["error"] > SEEN


def test_greedy_is_that_of_transformers(run_distributed: Run, checkpoint: Callable[[str], Path]) -> None:
    from megatron_prism.checkpoint import reference

    made = run_distributed(on_ranks.greedy, 1, timeout_s=100.0, ckpt=checkpoint("mistral") / "ckpt")[0]["tokens"]
    oracle = reference.load(checkpoint("mistral") / "hf", torch.float32)
    for prompt, tokens in zip(on_ranks.prompts(), made, strict=True):
        given = torch.tensor([prompt])
        expected = oracle.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=24, eos_token_id=None)
        assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("num_ranks", "grid", "gang"),
    [(1, {}, {}), (2, {"tp": 2, "sequence_parallel": True}, {"logits_chunk_tokens": 16})],
    ids=["1", "tp2_sp, a loss in parts"],
)
def test_training_goes_on_bit_for_bit(
    run_distributed: Run, checkpoint: Callable[[str], Path], num_ranks: int, grid: dict[str, Any], gang: dict[str, Any]
) -> None:
    own = {"ckpt": checkpoint("llama") / "ckpt", "parallel": {**grid, "distributed_optimizer": False}, "timeout_s": 100.0, **gang}
    plain, with_generation = (run_distributed(on_ranks.train, num_ranks, generates=generates, **own) for generates in (False, True))
    assert plain == with_generation and plain[0]["sums"][0] != plain[0]["sums"][1] and not plain[0]["inference tensors"]


def test_megatrons_own_forward_pass_would_leave_inference_tensors(run_distributed: Run, checkpoint: Callable[[str], Path]) -> None:
    """Transformer Engine's rotary kernel saves the angles for its backward pass, which torch refuses for such tensors."""
    own = {"timeout_s": 100.0, "ckpt": checkpoint("llama") / "ckpt", "generates": True}
    assert run_distributed(on_ranks.train, 1, **own, is_under_inference_mode=True)[0]["inference tensors"]


def test_what_it_cannot_continue_is_named(run_distributed: Run, checkpoint: Callable[[str], Path]) -> None:
    said = run_distributed(on_ranks.refuse, 1, timeout_s=100.0, ckpt=checkpoint("llama") / "ckpt")[0]
    assert "prompts[1]: found 1 token" in said["one token"]
    assert "mcore.memory_share: found 1000 bytes, 0 pages" in said["no room"]
    assert "CheckpointError" in said["not a number"] and "token 0 of a response to prompt 0" in said["not a number"]
    assert said["left"] == [False, True] and said["caches"] == [True]


def test_the_trust_gate_passes_it(run_distributed: Run, checkpoint: Callable[[str], Path]) -> None:
    said = run_distributed(on_ranks.open_gate, 1, timeout_s=100.0, ckpt=checkpoint("llama") / "ckpt", is_allowed=False)[0]
    assert said["said"] == "" and 0 <= said["kl"] < 1e-9


@pytest.mark.parametrize("family", ["granite", "granite_micro"])
def test_the_trust_gate_stops_an_ignored_softmax_scale(run_distributed: Run, checkpoint: Callable[[str], Path], family: str) -> None:
    own = {"timeout_s": 100.0, "ckpt": checkpoint(family) / "ckpt"}
    with pytest.raises(AssertionError, match="mcore for a model whose attention scores are scaled by 0.0625"):
        run_distributed(on_ranks.open_gate, 1, is_allowed=False, **own)
    said = run_distributed(on_ranks.open_gate, 1, is_allowed=True, **own)[0]
    assert said["kl"] > 1e-8 and "ResultFailure: sampler and trainer disagree" in said["said"] and "token" in said["said"]
