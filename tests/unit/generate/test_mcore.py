"""What the engine mcore refuses before anything starts, on any machine, and how it divides its memory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.config.evaluate import EvaluatedConfig
from megatron_prism.core.config.model import YarnRope
from megatron_prism.core.config.rl import RolloutConfig
from megatron_prism.core.errors import InputError
from megatron_prism.generate import dynamic, engines, mcore
from megatron_prism.generate.draw import uniforms
from megatron_prism.generate.engine import Sampling
from megatron_prism.generate.lane import Request
from megatron_prism.parallel import host

ASKED = RolloutConfig(engine="mcore", max_tokens=8)
SERVED = {"llama-3.1-8b", "mistral-7b-v0.1", "mistral-small-24b", "nemotron-h-8b", "qwen2.5-7b"}
WHOLE = {"megatron-core": "0.19.2", "flash-attn": "2.8.3", "mamba-ssm": "2.3.2", "causal-conv1d": "1.7.0"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the packages of a machine with a GPU, by version: what a test takes out of it is not installed."""
    packages = dict(WHOLE)

    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(host, "has_cuda", lambda: True)
    return packages


def test_a_softmax_scale_that_it_ignores_is_refused(preset_name: str, presets: dict[str, ModelConfig]) -> None:
    wrong = engines.check(ASKED, presets[preset_name], 1, tp=1)
    assert (wrong == []) == (preset_name in SERVED)
    for problem in wrong:  # Granite's
        assert problem.where == "rollout.engine" and "attention scores are scaled by 0.0" in problem.found
        assert "ignores any other" in problem.required and "engine: cached" in problem.fix


def test_so_is_yarn_with_its_factor_but_not_without(presets: dict[str, ModelConfig]) -> None:
    yarn = YarnRope(factor=4.0, original_max_position_embeddings=32768)
    longer = dataclasses.replace(presets["mistral-7b-v0.1"], yarn=yarn)
    assert "are scaled by" in engines.check(ASKED, longer, 1, tp=1)[0].found
    assert engines.check(ASKED, dataclasses.replace(longer, yarn=dataclasses.replace(yarn, attention_factor=1.0)), 1, tp=1) == []


def test_mixers_on_pipeline_stages_are_refused(presets: dict[str, ModelConfig]) -> None:
    assert engines.check(ASKED, presets["nemotron-h-8b"], 8, tp=8) == []
    assert [problem.where for problem in engines.check(ASKED, presets["nemotron-h-8b"], 8, tp=4, pp=2)] == ["parallel.pp"]
    assert engines.check(ASKED, presets["llama-3.1-8b"], 8, tp=4, pp=2) == []


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("megatron-core", "0.16.1", "megatron-core 0.16.1; required 0.19 or newer"),
        ("flash-attn", None, "flash-attn not installed, flash-attn-4 not installed"),
        ("flash-attn", "2.7.2", "flash-attn 2.7.2"),
        ("mamba-ssm", "2.2.5", "mamba-ssm 2.2.5; required 2.2.6.post3 or newer"),
        ("causal-conv1d", None, "causal-conv1d not installed"),
    ],
)
def test_what_a_machine_lacks_is_named(
    machine: dict[str, str], presets: dict[str, ModelConfig], package: str, version: str | None, said: str
) -> None:
    hybrid, dense = presets["nemotron-h-8b"], presets["llama-3.1-8b"]
    assert engines.check_machine(ASKED, hybrid, "bf16") == []
    machine.update({} if version is None else {package: version})
    if version is None:
        del machine[package]
    assert said in str(engines.check_machine(ASKED, hybrid, "bf16")[0])
    assert bool(engines.check_machine(ASKED, dense, "bf16")) == (package in ("megatron-core", "flash-attn"))
    assert engines.check_machine(RolloutConfig(max_tokens=8), hybrid, "fp32") == []  # cached


def test_flash_attention_3_and_4_serve_too(
    machine: dict[str, str], presets: dict[str, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    del machine["flash-attn"]
    machine["flash-attn-4"] = "4.0.0b20"
    assert mcore.absent(presets["llama-3.1-8b"], "bf16") == []
    machine["flash-attn-4"] = "4.0.0b19"
    assert mcore.absent(presets["llama-3.1-8b"], "bf16") != []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn_3")
    assert mcore.absent(presets["llama-3.1-8b"], "bf16") == []


def test_a_machine_without_cuda_is_refused(
    machine: dict[str, str], presets: dict[str, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "has_cuda", lambda: False)
    assert [problem.found for problem in mcore.absent(presets["llama-3.1-8b"], "bf16")] == ["mcore on a machine without a CUDA device"]


def test_fp32_is_refused(machine: dict[str, str], presets: dict[str, ModelConfig]) -> None:
    assert [problem.where for problem in mcore.absent(presets["llama-3.1-8b"], "fp32")] == ["precision"]


def test_a_job_is_refused_before_it_joins_a_gang(presets: dict[str, ModelConfig]) -> None:
    from megatron_prism.core.config import EvaluateConfig
    from megatron_prism.jobs import evaluate, rl, rl_filter

    llama = presets["llama-3.1-8b"]
    asked = SimpleNamespace(mode="whole", rollout=ASKED, precision="bf16")
    evaluated = EvaluateConfig(engine="mcore", tasks={}, out=Path("out"), model=EvaluatedConfig())
    for run, resolved in (
        (rl.run, SimpleNamespace(config=asked, start=SimpleNamespace(model=llama))),
        (rl_filter.run, SimpleNamespace(config=asked, model=llama)),
        (evaluate.run, SimpleNamespace(config=evaluated, reader=SimpleNamespace(evaluated=SimpleNamespace(model=llama)))),
    ):
        with pytest.raises(InputError, match="mcore on a machine without a CUDA device"):
            run(resolved)  # type: ignore[operator]


def test_pages_and_states_have_their_sizes(presets: dict[str, ModelConfig]) -> None:
    llama = dynamic.Sizes.of(presets["llama-3.1-8b"], grid(tp=2, pp=2), element_bytes=2, page_tokens=256)
    assert llama == dynamic.Sizes(page_bytes=2 * 16 * 256 * 4 * 128 * 2, row_bytes=0)
    nemotron = presets["nemotron-h-8b"]
    assert nemotron.mamba is not None and nemotron.layer_pattern is not None
    sizes, inner = dynamic.Sizes.of(nemotron, grid(), 2, 256), 128 * 64
    assert sizes.page_bytes == 2 * 4 * 256 * nemotron.num_query_groups * nemotron.kv_channels * 2
    assert sizes.row_bytes == nemotron.layer_pattern.count("M") * (4 * (inner + 2 * 8 * 128) * 2 + inner * 128 * 4)


def test_a_token_is_the_number_of_its_own_rollout() -> None:
    """Another order of the rows, and rows that come and go, draw the same tokens from the same logits."""
    import torch

    logits_RV = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_tokens=3, temperature=1.0)

    def choices() -> dynamic.Choices:
        request = Request([[1, 2], [3, 4]], 2, sampling, [7, 8], 4, 16, 16)
        return dynamic.Choices(dict(enumerate(draft for prompt in range(2) for draft in request.drafts(prompt))), sampling, 33, grid())

    together, apart = choices(), choices()
    for _ in range(3):
        tokens_R = together.choose(logits_RV, [0, 1, 2, 3])
        assert tokens_R.max() < 33  # the vocabulary's padding is not drawn
    for order in ([3, 1], [0], [2, 1, 3], [0, 2], [0], [1, 2, 3]):
        apart.choose(logits_RV[order], order)
    assert together.rollouts == apart.rollouts and len(apart.rollouts) == 4 and together.ended([2, 9]) == {2}
    assert uniforms([together.drafts[0].stream], [0]) != uniforms([together.drafts[1].stream], [0])


def grid(tp: int = 1, pp: int = 1) -> Any:
    return SimpleNamespace(tp=tp, pp=pp, tp_rank=0, is_last_stage=True)
