"""What the ranks of tests/dynamic do: Megatron-Core's dynamic engine beside the cached engine, on the same model and the same arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig
from megatron_prism.core.errors import PrismError
from megatron_prism.generate import dynamic, mcore
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Rollout, Sampling, seed_of
from megatron_prism.generate.mcore import MCore
from megatron_prism.models import build
from megatron_prism.parallel.groups import Groups, gather
from megatron_prism.rl import gate
from megatron_prism.rl.batches import Shape

from . import standin

CONTEXT = 128
LENGTHS = (75, 36, 23, 2, 18, 5, 33)  # shorter and longer than a window (16), more prompts than rows
SMALL = {"num_rows": 3, "prefill_tokens": 24, "page_tokens": 4}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "T 1": {"temperature": 1.0},
    "T 0.7 and end tokens": {"temperature": 0.7, "end_ids": tuple(range(0, 300, 13))},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k and top_p": {"temperature": 1.0, "top_k": 20, "top_p": 0.8},
}
CONTROLS = ("a stale page", "a position one off", "another row's number")


@dataclasses.dataclass(frozen=True)
class EveryFifth:
    """Ends a rollout after a token that five divides, as a stop text would."""

    def __call__(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] % 5 == 0


SAMPLINGS["stop"] = {"temperature": 1.0, "stop": EveryFifth()}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def model_of(ckpt: Path, groups: Groups, **gang: Any) -> tuple[list[Any], ModelConfig]:
    from megatron_prism.checkpoint import folder, sharded

    torch.set_num_threads(1)
    parallel = ParallelConfig(tp=groups.tp, pp=groups.pp, sequence_parallel=groups.tp > 1, distributed_optimizer=False)
    model = folder.read(ckpt).model
    chunks = build.build(model, groups, GangConfig(parallel=parallel, precision="fp32", seed=0, **gang))
    sharded.load_weights(ckpt, chunks)
    return chunks, model


def generated(
    engine: Any, num_samples: int = 2, max_tokens: int = 16, texts: list[list[int]] | None = None, **sampling: Any
) -> list[Rollout]:
    texts = prompts() if texts is None else texts
    seeds = [seed_of(1, prompt) for prompt in range(len(texts))]
    made = engine.generate(texts, num_samples, Sampling(max_tokens=max_tokens, **sampling), seeds)
    assert all(others == made for others in gather(made)), "not the same rollouts on every rank"
    return made


def beside(chunks: list[Any], model: ModelConfig, groups: Groups, limits: dict[str, Any], **sampling: Any) -> dict[str, Any]:
    """Return how the two engines' rollouts compare."""
    context = sampling.pop("context", CONTEXT)
    ours = generated(Cached(chunks, model, groups, max_context=context), **sampling)
    theirs = generated(MCore(chunks, model, groups, context, **{"cache_bytes": 10**8, **limits}), **sampling)
    return {
        "same": [one.token_ids for one in ours] == [one.token_ids for one in theirs],
        "ended": [one.ended for one in ours] == [one.ended for one in theirs],
        "endings": sorted({one.ended for one in theirs}),
        "error": max(abs(a - b) for one, two in zip(ours, theirs, strict=True) for a, b in zip(one.logprobs, two.logprobs, strict=False)),
        "tokens": sum(len(one.token_ids) for one in theirs),
    }


def compare(groups: Groups, ckpt: str, is_whole: bool) -> dict[str, Any]:
    """Return the comparison of each case: all of them, or on a layout the two that matter there."""
    chunks, model = model_of(Path(ckpt), groups)
    with standin.installed():
        layout = {"drawn": beside(chunks, model, groups, SMALL, temperature=0.8, end_ids=(7, 11, 90, 200))}
        if not is_whole:
            return layout
        with shared() as num_shared:
            found = {name: beside(chunks, model, groups, SMALL, **sampling) for name, sampling in SAMPLINGS.items()}
        found["shared"] = num_shared
        found["a full context"] = beside(chunks, model, groups, SMALL, temperature=1.0, max_tokens=60, context=90)
        found["as it stands"] = beside(chunks, model, groups, {}, temperature=1.0)
        page = dynamic.Sizes.of(model, groups, 4, SMALL["page_tokens"]).page_bytes
        with evictions() as evicted:
            scarce = {**SMALL, "num_rows": 6, "cache_bytes": page * 31}
            found["pages are scarce"] = beside(chunks, model, groups, scarce, temperature=1.0, max_tokens=40)
        found["evicted"] = len(evicted)
        with changed(chunks[0]):
            found["other weights"] = beside(chunks, model, groups, SMALL, temperature=1.0)
            moved = generated(MCore(chunks, model, groups, CONTEXT, 10**8, **SMALL), temperature=1.0)
        found["other weights, other tokens"] = moved != generated(MCore(chunks, model, groups, CONTEXT, 10**8, **SMALL), temperature=1.0)
        for control in CONTROLS:
            with fault(control):
                found[control] = beside(chunks, model, groups, SMALL, temperature=1.0)
        return {**found, **layout}


def interpret(groups: Groups, ckpt: str) -> dict[str, Any]:
    """Return the comparison for a hybrid: rows that come and go, then the same under other weights, and with states that are not kept apart.

    Triton's interpreter is slow: three short prompts.
    """
    from megatron.core.ssm.mamba_mixer import MambaMixer

    chunks, model = model_of(Path(ckpt), groups)
    texts = [text[:length] for text, length in zip(prompts(), (40, 9, 3), strict=False)]
    drawn = {"temperature": 1.0, "max_tokens": 4, "num_samples": 1, "texts": texts}
    limits = {**SMALL, "num_rows": 2}
    with standin.installed(), standin.mixers_installed():
        found = {"drawn": beside(chunks, model, groups, limits, **drawn)}
        with changed(chunks[0]):
            found["other weights"] = beside(chunks, model, groups, limits, **drawn)
            with mock.patch.object(MambaMixer, "train", torch.nn.Module.train):  # which marks exp(A_log) as stale
                generated(MCore(chunks, model, groups, CONTEXT, 10**8, **limits), **drawn)
        with mock.patch.object(MambaMixer, "train", torch.nn.Module.train):
            found["a stale exp(A_log)"] = beside(chunks, model, groups, limits, **drawn)
    return found


@contextlib.contextmanager
def evictions() -> Iterator[list[int]]:
    """Collect the requests whose keys Megatron-Core drops for want of pages."""
    from megatron.core.inference.contexts import DynamicInferenceContext

    evict, seen = DynamicInferenceContext.evict_overflow_paused_requests, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        dropped = evict(*args, **kwargs)
        seen.extend([] if dropped is None else dropped.tolist())
        return dropped

    with mock.patch.object(DynamicInferenceContext, "evict_overflow_paused_requests", watched):
        yield seen


@contextlib.contextmanager
def shared() -> Iterator[list[int]]:
    """Collect each call's prompt tokens that were not read again, because another sample's pages hold them."""
    seen, lend = [], dynamic._engine

    @contextlib.contextmanager
    def watched(*args: Any) -> Iterator[Any]:
        with lend(*args) as engine:
            yield engine
            seen.append(engine._prefill_tokens_skipped)

    with mock.patch.object(dynamic, "_engine", watched):
        yield seen


@contextlib.contextmanager
def changed(chunk: Any) -> Iterator[None]:
    """Within the block every weight is another one, as after a training step."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        kept = [parameter.clone() for parameter in chunk.parameters()]
        for parameter in chunk.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        yield
        for parameter, value in zip(chunk.parameters(), kept, strict=True):
            parameter.copy_(value)


@contextlib.contextmanager
def fault(name: str) -> Iterator[None]:
    """Build a known fault into the engine: the comparison must see it."""
    from megatron.core.inference.contexts import DynamicInferenceContext as Context

    append, turn, choose = Context.append_key_value_cache, Context.apply_rotary_emb_query, dynamic.Choices.choose

    def stale(self: Any, layer_number: int, key: Any, value: Any) -> None:
        is_stale = self.is_decode_only() and layer_number == 2
        append(self, layer_number, key, torch.zeros_like(value) if is_stale else value)

    def one_off(self: Any, query: Any, angles: Any, *others: Any, **named: Any) -> Any:
        return turn(self, query, angles.roll(-1, 0) if self.is_decode_only() else angles, *others, **named)

    def swapped(self: Any, logits_RV: Any, requests: Sequence[int]) -> Any:
        return choose(self, logits_RV.flip(0), requests)

    faults: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "a stale page": (Context, "append_key_value_cache", stale),
        "a position one off": (Context, "apply_rotary_emb_query", one_off),
        "another row's number": (dynamic.Choices, "choose", swapped),
    }
    with mock.patch.object(*faults[name]):
        yield


def train(groups: Groups, ckpt: str, generates: bool, is_under_inference_mode: bool = False, **gang: Any) -> dict[str, Any]:
    """Take two training steps, before each a generation or not; return what they leave behind.

    The sequence is as long as the engine's context, so training looks up the rotary angles that the engine computed.
    """
    chunks, model = model_of(Path(ckpt), groups, **gang)
    chunk, module = chunks[0], build.unwrap(chunks[0])
    if groups.is_last_stage:
        module.decoder.layers[-1].eval()  # a mode of its own, which must come back
    modes, layer = [part.training for part in module.modules()], vars(module).get("output_layer")
    optimizer, sums = torch.optim.SGD(chunk.parameters(), lr=0.1), []
    tokens_BS = (torch.arange(2 * CONTEXT) * 7 % 290).view(2, CONTEXT)
    forward_class = megatrons_own if is_under_inference_mode else dynamic._forward_class
    for _ in range(2):
        if generates:
            before = torch.get_rng_state()
            with standin.installed(), mock.patch.object(dynamic, "_forward_class", forward_class):
                generated(MCore(chunks, model, groups, CONTEXT, 10**8, **SMALL), temperature=1.0)
            assert torch.equal(before, torch.get_rng_state())
        optimizer.zero_grad()
        loss_BS = chunk(tokens_BS, torch.arange(CONTEXT).expand(2, -1), None, labels=tokens_BS.roll(-1, 1))
        loss_BS.mean().backward()
        optimizer.step()
        sums.append(sum(float(parameter.double().sum()) for parameter in chunk.parameters()))
    assert modes == [part.training for part in module.modules()] and layer is vars(module).get("output_layer")
    assert all(parameter.requires_grad for parameter in chunk.parameters())
    kept = module.rotary_pos_emb(CONTEXT, packed_seq=False, cp_group=None)
    return {"sums": sums, "inference tensors": kept.is_inference()}


def megatrons_own() -> Any:
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

    return GPTInferenceWrapper


def refuse(groups: Groups, ckpt: str) -> dict[str, Any]:
    """Return what is said of arguments and weights that the engine cannot continue, and what is left of a call, also of one that failed."""
    from megatron.core.inference.contexts import DynamicInferenceContext as Context
    from megatron.core.inference.utils import InferenceMode

    chunks, model = model_of(Path(ckpt), groups)
    said: dict[str, Any] = {}
    allocate, caches = Context._allocate_memory_buffer, []

    def watched(self: Any) -> None:
        allocate(self)
        caches.append(weakref.ref(self.memory_buffer))

    def tried(name: str, engine: MCore, texts: list[list[int]]) -> None:
        try:
            engine.generate(texts, 1, Sampling(max_tokens=4), [0] * len(texts))
        except PrismError as error:
            said[name] = f"{type(error).__name__}: {error}"

    with standin.installed():
        engine = MCore(chunks, model, groups, CONTEXT, 10**8)
        tried("one token", engine, [[5, 6], [5]])
        tried("no room", dataclasses.replace(engine, cache_bytes=1000), [[5, 6]])
        kept = chunks[0].decoder.final_layernorm.weight.clone()
        with torch.no_grad():
            chunks[0].decoder.final_layernorm.weight.fill_(float("nan"))
        tried("not a number", engine, [[5, 6]])
        with torch.no_grad():
            chunks[0].decoder.final_layernorm.weight.copy_(kept)
        gc.disable()
        with mock.patch.object(Context, "_allocate_memory_buffer", watched):
            generated(engine)
    said["caches"] = [cache() is None for cache in caches]
    said["left"] = [InferenceMode.is_active(), all(part.training for part in chunks[0].modules())]
    return said


def open_gate(groups: Groups, ckpt: str, is_allowed: bool) -> dict[str, Any]:
    """Return what the trust gate measures and says of the engine, with its refusals, or without them."""
    chunks, model = model_of(Path(ckpt), groups)
    allowed = mock.patch.object(mcore, "unsupported", lambda *args: []) if is_allowed else contextlib.nullcontext()
    with standin.installed(), allowed:
        engine = MCore(chunks, model, groups, CONTEXT, 10**8, **SMALL)
        texts, shape = prompts()[1:5], Shape(seq_length=CONTEXT, micro_size=1)
        trust = gate.at_start(engine, chunks, texts, Sampling(max_tokens=20, temperature=1.0), shape, groups)
    try:
        gate.require(trust, gate.BOUNDS["fp32"])
    except PrismError as error:
        return {"kl": trust.kl, "said": f"{type(error).__name__}: {error}"}
    return {"kl": trust.kl, "said": ""}


def greedy(groups: Groups, ckpt: str) -> dict[str, Any]:
    """Return the greedy continuations, for transformers to be held against."""
    chunks, model = model_of(Path(ckpt), groups)
    with standin.installed():
        made = generated(MCore(chunks, model, groups, CONTEXT, 10**8, **SMALL), num_samples=1, max_tokens=24)
    return {"tokens": [list(one.token_ids) for one in made]}
