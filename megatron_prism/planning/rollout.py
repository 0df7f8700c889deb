"""Memory and seconds of a rollout: of a step of RL, and of any other sampling. By the formulas of the engines' sources. Nothing was measured.

The embedded engine (generate/) samples on each data-parallel replica, and so does Megatron-Core's (mcore), within the share of the memory that it
is given. vLLM has its own copies of the model, and a share too.

A decode step reads a stage's weights once, and the keys, values and states of its rows. It takes as long as the slowest of these: memory to
read, matrix products, and the host that launches the kernels one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.model import padded_vocab_size
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig, RLConfig, SamplingConfig
from megatron_prism.planning.gpus import GIB, Gpu
from megatron_prism.planning.stage import Stage
from megatron_prism.planning.throughput import ATTENTION, HBM, MATMUL

SHARE = 0.25  # of its room that a prompt or a response fills in the mean: an assumption
# of the host for the kernels of a residual block and of a token's choice, launched one by one: counted by reading the engine, not measured
LAUNCH_S = {"*": 185e-6, "M": 220e-6, "-": 80e-6}
CHOICE_S = 1.2e-3
ALL_REDUCE_S = 15e-6  # of a small all-reduce within a node, one a block under tensor parallelism: an assumption
CHOICE_BYTES = 24  # a row and vocabulary entry while a token is chosen: bf16 logits, fp32 copies and weights
PREFILL_TOKENS = 2048  # of a forward pass over prompts: the default of cached and mcore
PAGE_TOKENS = 256  # of mcore's cache


@dataclass(frozen=True)
class Load:
    """What a gang samples in one call: sampling.num_samples responses of each of num_prompts prompts. max_context: the tokens of a prompt and its response."""

    gang: GangConfig
    sampling: SamplingConfig
    num_prompts: int
    max_context: int

    @property
    def tp(self) -> int:
        """The tensor parallel size of the gang, or of vLLM's copy."""
        return self.gang.parallel.tp


def of_step(config: RLConfig) -> Load:
    """Return what a step of RL samples."""
    return Load(config, config.rollout, config.rollout.num_prompts, config.batch.seq_length + 1)


@dataclass(frozen=True)
class Lengths:
    """The mean tokens of a prompt and of a response that a plan assumes, and the most that the config allows."""

    prompt: float
    response: float
    max_prompt: int
    max_response: int


def lengths(load: Load, response_tokens: float | None = None) -> Lengths:
    """Return the assumed lengths: a quarter of what is allowed, or the mean of a response that is given."""
    most = load.sampling.max_tokens
    room = load.max_context - most
    response = min(most * SHARE if response_tokens is None else response_tokens, most)
    return Lengths(prompt=room * SHARE, response=response, max_prompt=room, max_response=most)


def num_responses(load: Load, dp: int) -> int:
    """Return the responses of the data-parallel replica that has most."""
    return -(-load.num_prompts // dp) * load.sampling.num_samples


def memory_bytes(stages: Sequence[Stage], index: int, model: ModelConfig, load: Load, dp: int, gpu: Gpu) -> float:
    """Return the bytes that a rank of pipeline stage `index` holds for a rollout, beside what training holds always.

    vLLM's is the share that it is given, or where that is too small its weights and one full row.
    """
    if load.sampling.engine == "vllm":
        copy, own = _copy(stages, load)
        row = _token_bytes(copy, model, own) * load.max_context + _state_bytes(copy, model, own)
        return max(load.sampling.vllm.memory_share * gpu.memory_gib * GIB, _element(own) * copy.parameters + row)
    if load.sampling.engine == "mcore":
        return mcore_bytes(stages[index], model, load, dp, gpu)
    stage = stages[index]
    return cache_bytes(stage, model, load, dp) + working_bytes(stage, model, load) + mask_bytes(stage, load)


def mcore_bytes(stage: Stage, model: ModelConfig, load: Load, dp: int, gpu: Gpu) -> float:
    """Return the bytes of Megatron-Core's pages and states, at most its share, and of its widest pass.

    Where the share is less than all rows need, a response may be read again, with its prompt and in one pass.
    """
    rows, share = min(load.sampling.num_rows, num_responses(load, dp)), load.sampling.mcore.memory_share * gpu.memory_gib * GIB
    pages = rows * -(-load.max_context // PAGE_TOKENS) + 1
    wanted = _token_bytes(stage, model, load) * pages * PAGE_TOKENS + _state_bytes(stage, model, load) * rows
    at_once = load.max_context if wanted > share else load.max_context - load.sampling.max_tokens
    return min(wanted, share) + working_bytes(stage, model, load, max(PREFILL_TOKENS, at_once) + rows)


def _copy(stages: Sequence[Stage], load: Load) -> tuple[Stage, Load]:
    """Return a rank's share of one of vLLM's copies of the model as a stage, and the load with vLLM's layout."""
    tp = load.sampling.vllm.tensor_parallel or load.tp
    share = load.tp / tp
    letters = "".join(stage.letters for stage in stages)
    parameters, matrices = (round(share * sum(getattr(stage, name) for stage in stages)) for name in ("parameters", "matrices"))
    copy = replace(stages[0], letters=letters, is_last=True, parameters=parameters, matrices=matrices)
    return copy, replace(load, gang=replace(load.gang, parallel=ParallelConfig(tp=tp, sequence_parallel=tp > 1)))


def cache_bytes(stage: Stage, model: ModelConfig, load: Load, dp: int) -> float:
    """Return the bytes of a stage's cache: of all rows, each as long as the longest prompt and response, and of the prompts just read.

    Prompts are read PREFILL_TOKENS at a time, a longer one alone; each has states of its own.
    """
    rows, room = min(load.sampling.num_rows, num_responses(load, dp)), load.max_context
    prompts = -(-rows // load.sampling.num_samples)
    longest = room - load.sampling.max_tokens
    tokens = rows * room + max(longest, min(prompts * longest, PREFILL_TOKENS))
    return _token_bytes(stage, model, load) * tokens + _state_bytes(stage, model, load) * (rows + prompts)


def working_bytes(stage: Stage, model: ModelConfig, load: Load, pass_tokens: int = PREFILL_TOKENS) -> float:
    """Return the temporary bytes beside the cache: a prefill's widest block, or the last stage's choice of tokens."""
    widest = 4 * max(model.ffn_hidden_size, model.hidden_size) / load.tp + 2 * model.hidden_size
    choice = CHOICE_BYTES * padded_vocab_size(model.vocab_size, load.tp) * load.sampling.num_rows
    return max(_element(load) * widest * pass_tokens, choice if stage.is_last else 0.0)


def mask_bytes(stage: Stage, load: Load) -> float:
    """Return the bytes of the embedded engine's mask while it reads the longest prompt: as booleans, as numbers, and these copied to an aligned width."""
    longest = load.max_context - load.sampling.max_tokens
    return (2 * _element(load) + 1) * PREFILL_TOKENS * longest if "*" in stage.letters else 0.0


def seconds(stages: Sequence[Stage], model: ModelConfig, load: Load, world_size: int, assumed: Lengths, gpu: Gpu) -> float:
    """Return the seconds of a step's rollouts. A pipeline stage works on one lane of rows after another, the slowest sets the pace.
    Megatron-Core has one lane, whose stages wait for each other, and reads a hybrid's prompt for each of its samples.

    Steps of a lane: (responses - rows) x mean / rows with every row busy, then those of the longest response, as the other rows end.
    """
    if load.sampling.engine == "vllm":
        copy, load = _copy(stages, load)
        room = load.sampling.vllm.memory_share * gpu.memory_gib * GIB - _element(load) * copy.parameters
        stages, load = [copy], _within(copy, model, load, assumed, room)
    is_mcore = load.sampling.engine == "mcore"
    if is_mcore:
        fullest = max(stages, key=lambda stage: _token_bytes(stage, model, load))
        load = _within(fullest, model, load, assumed, load.sampling.mcore.memory_share * gpu.memory_gib * GIB)
    dp, pp = data_parallel_size(load.gang, world_size), load.gang.parallel.pp
    lanes = 1 if is_mcore else min(pp, -(-load.num_prompts // dp))
    responses = num_responses(load, dp) / lanes
    rows = max(1.0, min(load.sampling.num_rows / lanes, responses))
    busy = rows * assumed.response / assumed.max_response  # in the mean, once no response is left to start
    full, last = (max(_step_s(stage, model, load, count, assumed, gpu) for stage in stages) for count in (rows, busy))
    decode = (responses - rows) * assumed.response / rows * full + assumed.max_response * last
    prompts = -(-load.num_prompts // dp)
    if is_mcore:
        prompts *= pp * (1 if model.mamba is None else load.sampling.num_samples)
    return pp * decode + prompts * max(_read_s(stage, model, load, assumed.prompt, gpu) for stage in stages)


def _within(stage: Stage, model: ModelConfig, load: Load, assumed: Lengths, room: float) -> Load:
    """Return the load with at most as many rows as a paged cache of `room` bytes holds of mean length."""
    row = _token_bytes(stage, model, load) * (assumed.prompt + assumed.response) + _state_bytes(stage, model, load)
    return replace(load, sampling=replace(load.sampling, num_rows=max(1, min(load.sampling.num_rows, int(room / row)))))


def _read_s(stage: Stage, model: ModelConfig, load: Load, tokens: float, gpu: Gpu) -> float:
    """Return the seconds in which a stage reads one prompt: its matrix products, and causal attention, which a long prompt's time is mostly."""
    peak = gpu.peak_flops(load.gang.precision)
    attention = stage.letters.count("*") * 2 * tokens**2 * model.num_attention_heads * model.kv_channels / load.tp
    return 2 * tokens * stage.matrices / (peak * MATMUL[load.gang.precision]) + attention / (peak * ATTENTION)


def _step_s(stage: Stage, model: ModelConfig, load: Load, rows: float, assumed: Lengths, gpu: Gpu) -> float:
    """Return the seconds of one decode step of a lane on a stage. Keys and values are read up to the longest row, half full in the mean."""
    tp = load.tp
    output = model.hidden_size * padded_vocab_size(model.vocab_size, tp) / tp if stage.is_last else 0.0
    context = assumed.max_prompt + assumed.max_response / 2
    read = _element(load) * (stage.matrices + output)
    read += rows * (_token_bytes(stage, model, load) * context + 2 * _state_bytes(stage, model, load))
    product = 2 * rows * (stage.matrices + output) / (gpu.peak_flops(load.gang.precision) * MATMUL[load.gang.precision])
    exchanged = len(stage.letters) * ALL_REDUCE_S if tp > 1 else 0.0
    device = max(read / (gpu.hbm_bytes_s * HBM), product) + exchanged
    if load.sampling.engine == "vllm":  # it launches a CUDA graph
        return device
    return max(device, sum(LAUNCH_S[letter] for letter in stage.letters)) + CHOICE_S


def _token_bytes(stage: Stage, model: ModelConfig, load: Load) -> float:
    """Return the bytes of one token's keys and values on a rank."""
    return stage.letters.count("*") * 2 * model.num_query_groups * model.kv_channels / load.tp * _element(load)


def _state_bytes(stage: Stage, model: ModelConfig, load: Load) -> float:
    """Return the bytes of one row's Mamba states on a rank: the convolution's last inputs, and the state in fp32."""
    if model.mamba is None:
        return 0.0
    mamba = model.mamba
    inner, tp = mamba.num_heads * mamba.head_dim, load.tp
    inputs = mamba.conv_kernel * (inner + 2 * mamba.num_groups * mamba.state_dim) * _element(load)
    return stage.letters.count("M") * (inputs + 4.0 * inner * mamba.state_dim) / tp


def _element(load: Load) -> float:
    return 4.0 if load.gang.precision == "fp32" else 2.0
