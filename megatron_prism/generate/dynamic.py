"""Megatron-Core 0.19's dynamic inference engine for one call of generate(): its cache, its forward pass, and the choice of tokens in our hands.

Megatron-Core schedules, pages the keys and values, and computes the logits. Each token is chosen by draw.py from those logits, at the number
of its own rollout, and a rollout ends as our protocol says. So a token depends neither on the batch nor on Megatron-Core's generator, and what
its own sampling lacks (several end tokens, conditions on tokens, top_p beside top_k) is not needed.

Shape legend: R active requests, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import ResultFailure
from megatron_prism.generate.draw import choose, uniforms
from megatron_prism.generate.engine import Rollout, Sampling, not_finite
from megatron_prism.generate.lane import Draft
from megatron_prism.parallel.groups import Groups

GIB = 1024**3


@dataclass(frozen=True)
class Sizes:
    """The bytes on a rank of one page of keys and values, and of one row's Mamba states, the state itself in fp32 as in the cached engine."""

    page_bytes: int
    row_bytes: int

    @classmethod
    def of(cls, model: ModelConfig, groups: Groups, element_bytes: int, page_tokens: int) -> Sizes:
        """Return those of the pipeline stage with most layers: Megatron-Core gives every stage the pages of the one that has fewest."""
        layers = -(-model.num_layers // groups.pp) if model.layer_pattern is None else model.layer_pattern.count("*")
        page = 2 * layers * page_tokens * model.num_query_groups // groups.tp * model.kv_channels * element_bytes
        if model.mamba is None or model.layer_pattern is None:
            return cls(page, 0)
        mamba = model.mamba
        inner = mamba.num_heads * mamba.head_dim
        inputs = mamba.conv_kernel * (inner + 2 * mamba.num_groups * mamba.state_dim) * element_bytes
        return cls(page, model.layer_pattern.count("M") * (inputs + 4 * inner * mamba.state_dim) // groups.tp)


@dataclass(frozen=True)
class Room:
    """What the engine may hold: rows, tokens of a forward pass, tokens of a context, and pages of so many tokens each."""

    rows: int
    pass_tokens: int
    max_context: int
    num_pages: int
    page_tokens: int
    sizes: Sizes

    @property
    def buffer_bytes(self) -> int:
        """The cache's bytes, as Megatron-Core divides them again: with one page for padding, and half a page for its rounding."""
        return (self.num_pages + 1) * self.sizes.page_bytes + self.sizes.page_bytes // 2 + self.rows * self.sizes.row_bytes


@dataclass(frozen=True)
class Choices:
    """The drafts by request number, and the rollouts that have ended. Megatron-Core asks it for each step's tokens."""

    drafts: dict[int, Draft]
    sampling: Sampling
    vocab_size: int
    groups: Groups
    rollouts: dict[int, Rollout] = field(default_factory=dict)

    def choose(self, logits_RV: Tensor, requests: Sequence[int]) -> Tensor:
        """Append each active request's next token to its draft, and return the tokens (R). They are the same on all ranks of the model."""
        drafts = [self.drafts[request] for request in requests]
        choice_2R = torch.zeros(2, len(drafts), dtype=torch.float64)
        if self.groups.tp_rank == 0 and self.groups.is_last_stage:  # a sum on a GPU may differ from rank to rank
            uniform_R = torch.from_numpy(uniforms([draft.stream for draft in drafts], [len(draft.token_ids) for draft in drafts]))
            real_RV = logits_RV[: len(drafts), : self.vocab_size].float()
            token_R1, logprob_R1 = choose(real_RV, uniform_R[:, None].to(real_RV.device), self.sampling)
            choice_2R.copy_(torch.stack([token_R1[:, 0].double(), logprob_R1[:, 0].double()]))
        if self.groups.pp > 1 and self.groups.tp_rank == 0:
            dist.broadcast(choice_2R, self.groups.last_stage_rank, group=self.groups.pp_group)
        if self.groups.tp > 1:
            dist.broadcast(choice_2R, group_src=0, group=self.groups.tp_group)
        for request, draft, token, logprob in zip(requests, drafts, *choice_2R.tolist(), strict=True):
            if math.isnan(logprob):
                raise not_finite(f"token {len(draft.token_ids)} of a response to prompt {draft.prompt}")
            if (rollout := draft.extend(int(token), logprob, self.sampling)) is not None:
                self.rollouts[request] = rollout
        return choice_2R[0].long()

    def ended(self, requests: Sequence[int]) -> set[int]:
        """Return the active requests whose last token has just been chosen."""
        return self.rollouts.keys() & set(requests)


def run(module: Any, room: Room, prompts: Sequence[Sequence[int]], choices: Choices) -> list[Rollout]:
    """Continue every draft on a bare model chunk, and return the rollouts. All ranks of the model call this with the same drafts.

    Raises: ResultFailure where Megatron-Core drops a request, or says that it went on with another token than the chosen one.
    """
    from megatron.core.inference.sampling_params import SamplingParams

    with lent(module), _engine(module, room, choices) as engine:
        for request, draft in choices.drafts.items():
            limits = SamplingParams(num_tokens_to_generate=draft.max_tokens, termination_id=-1)  # -1: none but ours
            engine.add_request(request, list(prompts[draft.prompt]), limits)
        while engine.has_unfinished_requests():
            for record in engine.step_modern()["finished_request_records"]:
                _check(record.merge(), choices)
        engine._loop.run_until_complete(asyncio.sleep(0))  # its last notices to nobody
    if len(choices.rollouts) != len(choices.drafts):
        raise ResultFailure(f"Megatron-Core's engine ended {len(choices.rollouts)} of {len(choices.drafts)} rollouts")
    return list(choices.rollouts.values())


def _check(request: Any, choices: Choices) -> None:
    rollout, draft = choices.rollouts.get(request.request_id), choices.drafts[request.request_id]
    if rollout is None or [*request.generated_tokens] != [*rollout.token_ids]:
        held = f"{len(request.generated_tokens)} tokens, status {request.status.name}; chosen were {len(draft.token_ids)}"
        raise ResultFailure(f"Megatron-Core's engine ended sample {draft.sample} of prompt {draft.prompt} with other tokens: {held}")


@contextmanager
def lent(module: Any) -> Iterator[None]:
    """Lend a training model to the engine, and put back what this changes on it, whatever happens.

    Its mixers keep exp(A_log) from one evaluation to the next, until train() is called (mamba_mixer.py, train): so it is, first.
    An output layer that defers its work (models/chunked_loss.py) stands aside: Megatron-Core switches sequence parallelism on the layer.
    """
    from megatron.core.inference.utils import InferenceMode

    modes = [(part, part.training) for part in module.modules()]
    deferring = vars(module).pop("output_layer", None)
    module.train().eval()
    try:
        yield
    finally:
        InferenceMode.unset_active()  # a process's own flag, which an engine sets when it is made
        for part, is_training in modes:
            part.training = is_training
        if deferring is not None:
            vars(module)["output_layer"] = deferring


@contextmanager
def _engine(module: Any, room: Room, choices: Choices) -> Iterator[Any]:
    """Lend a DynamicInferenceEngine over a model chunk, and free its cache at the end.

    A call makes its own rather than resumes one: an engine that gives its memory back makes every tensor anew as well (dynamic_context.py,
    reinitialize_inference_state_buffers), and one that is gone holds no keys of other weights.
    """
    from megatron.core.inference.config import InferenceConfig, KVCacheManagementMode, MambaInferenceStateConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.engines import DynamicInferenceEngine
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    tp, is_hybrid = choices.groups.tp, room.sizes.row_bytes > 0
    config = InferenceConfig(
        block_size_tokens=room.page_tokens,
        buffer_size_gb=room.buffer_bytes / GIB,
        mamba_inference_state_config=MambaInferenceStateConfig.from_model(module, ssm_states_dtype=torch.float32) if is_hybrid else None,
        max_requests=room.rows,
        max_tokens=DynamicInferenceContext.round_up_tokens(room.pass_tokens, tp),  # it pads a pass to so many
        max_sequence_length=room.max_context,
        use_flashinfer_fused_rope=False,
        kv_cache_management_mode=KVCacheManagementMode.RECOMPUTE,
        enable_prefix_caching=not is_hybrid,  # a prompt's samples share its whole pages, and it is read once; not a mixer's states
    )
    context = DynamicInferenceContext(module.config, config)
    assert context.kv_block_allocator.total_count == room.num_pages + 1, "Sizes are not Megatron-Core's"
    controller = TextGenerationController(_forward_class()(module, context), SimpleNamespace(detokenize=lambda tokens: ""))
    controller._sampling = _sampling_class()(choices)
    engine = DynamicInferenceEngine(controller, context)
    controller.set_stop_word_finished_ids_callback(choices.ended)  # in place of the engine's own, which ends a request one token later
    try:
        yield engine
    finally:
        context.deallocate_inference_state_buffers()  # it is in a reference cycle, and training may have switched the collector off


def _forward_class() -> Any:
    """Return Megatron-Core's wrapper of a model whose forward pass leaves no inference tensors.

    Megatron-Core runs it under inference_mode. What a module keeps of that pass, such as the rotary angles, could not take part in training.
    """
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

    class Forward(GPTInferenceWrapper):  # type: ignore[misc]  # Megatron-Core is untyped here
        def _forward(self, inference_input: Any) -> Any:
            with torch.inference_mode(False), torch.no_grad():
                return super()._forward(inference_input)

    return Forward


def _sampling_class() -> Any:
    """Return a sampling backend of Megatron-Core that asks Choices."""
    from megatron.core.inference.sampling.base import Sampling as Backend

    class Chosen(Backend):  # type: ignore[misc]
        def __init__(self, choices: Choices):
            self._choices = choices

        def sample_kernel(self, logits: Tensor, n: int, context: Any, *, output: Tensor, **options: Any) -> Tensor:
            assert options.get("gather_indices") is None and options.get("token_to_request_index") is None
            active = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
            assert len(active) == n
            return output.copy_(self._choices.choose(logits, active))

        def log_probs_kernel(self, *args: Any, **options: Any) -> Tensor:
            raise AssertionError("no request asks Megatron-Core for log-probabilities")

    return Chosen
