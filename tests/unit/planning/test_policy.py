"""An RL step's memory and time, held against the engine's own cache and against closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import ModelConfig, ParallelConfig, RLConfig
from megatron_prism.core.config.rl import MCoreConfig, PackedBatchConfig, RolloutConfig, VLLMConfig
from megatron_prism.planning import policy, rollout
from megatron_prism.planning.gpus import H100
from megatron_prism.planning.stage import Stage

LLAMA_STAGE = Stage("*-" * 32, True, True, 8_030_000_000, 8_030_000_000, 6_979_000_000, 6_979_000_000, 0)
HYBRID_STAGE = Stage("M-M-M-M*-" * 4, True, True, 8_100_000_000, 8_100_000_000, 7_000_000_000, 7_000_000_000, 0)


def config_of(num_rows: int = 64, seq_length: int = 16_384, **changes: Any) -> RLConfig:
    sizes: dict[str, Any] = {
        "rollout": RolloutConfig(max_tokens=seq_length - 2048, num_rows=num_rows),
        "batch": PackedBatchConfig(seq_length=seq_length),
    }
    return RLConfig(run_dir=Path("r"), steps=10, prompts=Path("p"), **{**sizes, **changes})


@pytest.mark.parametrize("tp", [1, 4])
def test_the_cache_is_that_of_the_engine(llama_8b: ModelConfig, nemotron_h_8b: ModelConfig, tp: int) -> None:
    """The same blocks as generate/ builds, on tensors without storage, hold as many bytes a row."""
    import torch

    from megatron_prism.generate.blocks import Attention, Mamba

    config = config_of(parallel=ParallelConfig(tp=tp, sequence_parallel=tp > 1))
    load, none = rollout.of_step(config), torch.empty(0, device="meta")
    heads = {"norm_D": none, "bias": None, "out_DY": none, "scale": 1.0, "qkv": torch.empty(0, dtype=torch.bfloat16, device="meta")}
    attention = Attention(num_groups=llama_8b.num_query_groups // tp, head_dim=llama_8b.kv_channels, **heads)
    tokens = load.max_context
    assert bytes_of(attention, tokens) == pytest.approx(rollout._token_bytes(replace(LLAMA_STAGE, letters="*"), llama_8b, load) * tokens)

    mamba = nemotron_h_8b.mamba
    assert mamba is not None
    num_heads, groups = mamba.num_heads // tp, mamba.num_groups // tp
    channels = num_heads * mamba.head_dim + 2 * groups * mamba.state_dim
    mixer = Mamba(
        norm_D=none,
        in_proj=torch.empty(0, dtype=torch.bfloat16, device="meta"),
        conv_CW=torch.empty(channels, mamba.conv_kernel, device="meta"),
        conv_bias_C=none,
        A_H=torch.empty(num_heads, device="meta"),
        D_H=none,
        dt_bias_H=none,
        gate_norm_Y=none,
        out_DY=none,
        num_groups=groups,
        head_dim=mamba.head_dim,
        state_dim=mamba.state_dim,
        chunk_size=mamba.chunk_size,
        kernels=None,
    )
    assert bytes_of(mixer, tokens) == rollout._state_bytes(replace(HYBRID_STAGE, letters="M"), nemotron_h_8b, load)


def bytes_of(block: Any, size_K: int) -> int:
    sizes = [(state.shape, state.dtype.itemsize) for state in block.states(size_K)]
    total = 0
    for shape, itemsize in sizes:
        count = itemsize
        for size in shape:
            count *= size
        total += count
    return total


def test_training_and_rollout_share_their_memory(llama_8b: ModelConfig) -> None:
    few, many = (policy.predict_rl([LLAMA_STAGE], llama_8b, config_of(num_rows), 1).memories[0] for num_rows in (1, 512))
    assert few.activations == many.activations > few.cache and many.cache > many.activations
    fixed = few.weights + few.gradients + few.optimizer + few.reference
    assert few.total == pytest.approx(fixed + few.allowance + few.activations)
    assert many.total == pytest.approx(fixed + many.allowance + many.cache)
    assert few.reference == 2.0 * LLAMA_STAGE.parameters
    without = config_of(1, algorithm=replace(config_of().algorithm, kl_beta=0.0))
    assert policy.predict_rl([LLAMA_STAGE], llama_8b, without, 1).memories[0].reference == 0.0


def test_a_decode_step_reads_the_weights_and_the_rows(llama_8b: ModelConfig) -> None:
    """One row at a time of full responses: every step reads the weights, and keys and values up to half of the longest."""
    config, slow = config_of(1), replace(H100, hbm_bytes_s=H100.hbm_bytes_s / 4)  # its kernels take longer than their launches
    full = rollout.Lengths(2049, 14_336, 2049, 14_336)
    read = 2 * (LLAMA_STAGE.matrices + 4096 * 128_256) + 2 * 32 * 2 * 8 * 128 * (2049 + 14_336 / 2)
    expected = 1024 * 14_336 * (read / (0.75 * slow.hbm_bytes_s) + rollout.CHOICE_S)
    prefill = 64 * 2049 * 2 * LLAMA_STAGE.matrices / (0.6 * 989e12)
    assert rollout.seconds([LLAMA_STAGE], llama_8b, rollout.of_step(config), 1, full, slow) == pytest.approx(expected + prefill)
    assert (
        rollout.seconds([LLAMA_STAGE], llama_8b, rollout.of_step(config_of(64)), 1, full, slow) < expected / 8
    )  # the weights are read once for all rows


def test_a_long_prompts_reading_is_mostly_causal_attention(llama_8b: ModelConfig) -> None:
    load, tokens = rollout.of_step(config_of(1)), 131_072
    matrices = 2 * tokens * LLAMA_STAGE.matrices / (0.6 * 989e12)
    attention = 32 * 2 * tokens**2 * 4096 / (0.6 * 989e12)  # of each layer, half of the scores and of their products with the values
    assert rollout._read_s(LLAMA_STAGE, llama_8b, load, tokens, H100) == pytest.approx(matrices + attention)
    assert attention > matrices


def test_small_stages_wait_for_the_host(nemotron_h_8b: ModelConfig) -> None:
    config = config_of(16)
    tiny = replace(HYBRID_STAGE, matrices=1, parameters=1, is_last=False)
    full = rollout.Lengths(0, 14_336, 2049, 14_336)
    seconds = rollout.seconds([tiny], replace(nemotron_h_8b, num_query_groups=1, kv_channels=1), rollout.of_step(config), 64, full, H100)
    launched = sum(rollout.LAUNCH_S[letter] for letter in tiny.letters) + rollout.CHOICE_S
    assert seconds == pytest.approx(14_336 * launched, rel=0.01)


def test_longer_responses_take_longer_and_fill_more_rows(llama_8b: ModelConfig) -> None:
    config = config_of()
    short, long = (policy.predict_rl([LLAMA_STAGE], llama_8b, config, 8, response_tokens=tokens) for tokens in (1000, 8000))
    assert short.time.rollout_s < long.time.rollout_s < long.longest.rollout_s
    assert short.time.training_s < long.time.training_s < long.longest.training_s
    assert short.longest == long.longest and short.memories == long.memories  # the room is for full responses, whatever is assumed
    rows = [policy.as_training(config, 8, rollout.lengths(rollout.of_step(config), tokens)).batch.global_size for tokens in (1000, 14_336)]
    assert rows[0] == 104 and rows[1] == 984  # 1,024 x (512 + mean) tokens in rows of 16,384 that are filled to 95%, on 8 ranks
    assert rollout.lengths(rollout.of_step(config), 1e9).response == 14_336


def test_reference_and_trainer_take_a_forward_pass_each(llama_8b: ModelConfig) -> None:
    both = policy.predict_rl([LLAMA_STAGE], llama_8b, config_of(), 8).time
    alone = config_of(algorithm=replace(config_of().algorithm, kl_beta=0.0))
    assert policy.predict_rl([LLAMA_STAGE], llama_8b, alone, 8).time.log_probs_s == pytest.approx(both.log_probs_s / 2)


def test_vllm_takes_its_share_and_has_copies_of_its_own_layout(llama_8b: ModelConfig) -> None:
    """A training layout of TP 2 x PP 2 on 8 GPUs; vLLM's copies on two GPUs each."""
    half = replace(LLAMA_STAGE, letters="*-" * 16, parameters=2_007_500_000, matrices=1_744_750_000)
    stages = [replace(half, is_last=False), replace(half, is_first=False)]
    grid = {"parallel": ParallelConfig(tp=2, pp=2, sequence_parallel=True)}
    rows = RolloutConfig(engine="vllm", vllm=VLLMConfig(tensor_parallel=2, memory_share=0.5), max_tokens=14_336, num_rows=256)
    config = config_of(rollout=rows, **grid)
    found = policy.predict_rl(stages, llama_8b, config, 8)
    assert [memory.cache for memory in found.memories] == [0.5 * H100.memory_gib * 2**30] * 2
    copy, own = rollout._copy(stages, rollout.of_step(config))
    assert copy.letters == LLAMA_STAGE.letters and (own.gang.parallel.tp, own.gang.parallel.pp) == (2, 1)
    assert copy.parameters == pytest.approx(LLAMA_STAGE.parameters / 2, rel=1e-3)
    small = policy.predict_rl(
        stages, llama_8b, config_of(rollout=replace(rows, vllm=VLLMConfig(tensor_parallel=1, memory_share=0.01)), **grid), 8
    )
    assert small.memories[0].cache > 2 * LLAMA_STAGE.parameters  # its weights, all of them on a GPU, need more than the share
    fewer = replace(rows, vllm=VLLMConfig(memory_share=0.15))  # in copies of the training TP, 2
    assert policy.predict_rl(stages, llama_8b, config_of(rollout=fewer, **grid), 8).time.rollout_s > 1.5 * found.time.rollout_s
    cached = config_of(rollout=replace(rows, engine="cached"), **grid)
    assert policy.predict_rl(stages, llama_8b, cached, 8).time.rollout_s > found.time.rollout_s


def test_mcore_takes_its_share_or_what_its_rows_need(llama_8b: ModelConfig, nemotron_h_8b: ModelConfig) -> None:
    def load_of(memory_share: float, num_rows: int = 64) -> rollout.Load:
        engine = RolloutConfig(engine="mcore", mcore=MCoreConfig(memory_share=memory_share), max_tokens=14_336, num_rows=num_rows)
        return rollout.of_step(config_of(rollout=engine))

    def held(memory_share: float, num_rows: int = 64) -> float:
        return rollout.memory_bytes([LLAMA_STAGE], 0, llama_8b, load_of(memory_share, num_rows), 8, H100)

    token, gpu = 131_072, H100.memory_gib * 2**30
    working = 2 * (4 * 14_336 + 2 * 4096)  # of a token of the widest pass
    assert held(0.25) == pytest.approx(0.25 * gpu + working * (16_385 + 64))  # a dropped response is read again, with its prompt
    assert held(0.25, 4) == pytest.approx(token * (4 * 65 + 1) * 256 + working * (2049 + 4))
    assert held(0.25, 4) < held(0.25) < held(0.5)

    def seconds(load: rollout.Load, stage: Stage = LLAMA_STAGE, model: ModelConfig = llama_8b) -> float:
        return rollout.seconds([stage], model, load, 8, rollout.lengths(load), H100)

    cached = replace(load_of(0.5), sampling=replace(load_of(0.5).sampling, engine="cached"))
    assert seconds(load_of(0.5)) == pytest.approx(seconds(cached)) and seconds(load_of(0.05)) > 1.5 * seconds(cached)
    hybrid = [seconds(load, HYBRID_STAGE, nemotron_h_8b) for load in (load_of(0.5), cached)]
    assert hybrid[0] > hybrid[1]  # it reads a prompt for each of its samples
