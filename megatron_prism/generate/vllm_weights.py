"""vLLM's side of a hand-over: a backend of its weight transfer API whose trainer is the same process.

vLLM's own backends move weights between processes, by NCCL or CUDA IPC. Under the external launcher trainer and worker are one process, so
this one takes the tensors as they come, on hosts and GPUs alike. What vLLM then holds is summed anew from its own parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prism.core.patch import replaced
from megatron_prism.families.rules import Shape
from megatron_prism.generate.handover import sum_of

BACKEND = "prism"
OTHER_NAMES = {"backbone.": "model.", "embeddings.weight": "embed_tokens.weight", "A_log": "A"}  # vLLM's, where they are not Hugging Face's
Parts = dict[str, list[tuple[str, Shape]]]


@dataclass
class InitInfo:
    """Nothing: there is no other process to meet."""


@dataclass
class UpdateInfo:
    """A hand-over. weights: (Hugging Face name, tensor). shapes: of all of them. handed and held: the sums of both sides, filled in here."""

    weights: Iterator[tuple[str, Tensor]]
    shapes: Mapping[str, Shape]
    handed: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)


def config() -> Any:
    """Return the setting that makes vLLM's workers use this backend."""
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    with suppress(ValueError):  # it is registered already
        WeightTransferEngineFactory.register_engine(BACKEND, type("SameProcess", (SameProcess, WeightTransferEngine), {}))
    return WeightTransferConfig(backend=BACKEND)


class SameProcess:
    """Loads tensors of this process into vLLM's model by vLLM's own rules, and sums what the model holds afterwards.

    config() joins it with vLLM's WeightTransferEngine, which gives model, model_config and update_weights.
    """

    model: Any
    model_config: Any
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Prepare vLLM's model to be loaded again, layer by layer. Linear weights are summed before vLLM repacks them for its kernels."""
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._info: UpdateInfo | None = None
        self._parts: Parts = {}
        self._sums: dict[str, tuple[int, bool]] = {}
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._hooks = ExitStack()
        pack = UnquantizedLinearMethod.process_weights_after_loading

        def summed_then_packed(method: Any, layer: Any) -> None:
            for name, parameter in layer.named_parameters(recurse=False):
                self._sum(f"{self._names.get(id(layer))}.{name}", parameter)
            pack(method, layer)

        self._hooks.enter_context(replaced(UnquantizedLinearMethod, "process_weights_after_loading", summed_then_packed))
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load the tensors."""
        self._info, self._parts = update_info, parts(update_info.shapes, getattr(self.model, "packed_modules_mapping", {}))
        try:
            self.model.load_weights(self._summed(update_info))
        except BaseException:
            self._hooks.close()
            raise

    def _summed(self, info: UpdateInfo) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in info.weights:
            info.handed[name] = sum_of(as_held(name, tensor, self.model_config.dtype))
            yield name, tensor

    def finish_weight_update(self) -> None:
        """Let vLLM finish its layers, and sum what they hold. Every rank of vLLM's tensor-parallel group takes part."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._hooks:
            finalize_layerwise_reload(self.model, self.model_config)
            repack_heads(self.model)
        for name, parameter in self.model.named_parameters():
            if name in self._parts and not {part for part, _ in self._parts[name]} & {*self._sums}:
                self._sum(name, parameter)
        info = self._info
        assert info is not None
        names = [name for name in info.shapes if name in self._sums]
        split = torch.tensor([0 if self._sums[name][1] else self._sums[name][0] for name in names], dtype=torch.int64)
        if (group := _tensor_parallel()).world_size > 1:
            dist.all_reduce(split, group=group.cpu_group)
        for name, total in zip(names, split.tolist(), strict=True):
            info.held[name] = self._sums[name][0] if self._sums[name][1] else total

    def _sum(self, held_as: str, parameter: Tensor) -> None:
        """Put the sum of each Hugging Face tensor that a parameter holds, or holds a shard of, beside whether it is whole on each rank."""
        own = self._parts.get(held_as)
        if own is None or not parameter.numel():  # a weight that vLLM has repacked is left empty
            return
        size = _tensor_parallel().world_size
        is_whole = size > 1 and parameter.numel() == sum(torch.Size(shape).numel() for _, shape in own)
        if len(own) == 1:
            name, shape = own[0]
            rows = parameter[: shape[0]] if size == 1 else parameter  # a vocabulary's padding is 0
            self._sums[name] = (sum_of(rows), is_whole)
            return
        rows_of = [shape[0] if is_whole else shape[0] // size for _, shape in own]
        for (name, _), rows in zip(own, parameter.split(rows_of), strict=True):
            self._sums[name] = (sum_of(rows), is_whole)

    def shutdown(self) -> None:
        """Do nothing."""


@contextmanager
def shared_memory(number: int) -> Iterator[None]:
    """Within the block vLLM's ranks on a host meet in shared memory under a name of this gang alone, which is gone at its end.

    vLLM 0.32 has one name for all gangs of a machine under its external launcher, and leaves it: a second gang fails (errno 17).
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    prefix = f"prism{number}-"

    def named(communicator: Any) -> str:
        return f"{prefix}{communicator.unique_name.replace(':', '')}-{'-'.join(map(str, communicator.ranks))}"

    with replaced(_CPUSHMDistributed, "make_group_name", staticmethod(named)):
        yield
    dist.barrier()
    for path in Path("/dev/shm").glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def _tensor_parallel() -> Any:
    from vllm.distributed import get_tp_group

    return get_tp_group()


def repack_heads(model: Any) -> None:
    """Let a tied head pack the embedding's new weights for its kernel.

    vLLM 0.32 packs it on a host when it first loads, and a layer by layer reload passes it by, since no tensor comes under its name: tokens
    would be drawn by the old head (reload/__init__.py, limitation 2).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def parts(shapes: Mapping[str, Shape], packed: Mapping[str, list[str]]) -> Parts:
    """Return by vLLM's parameter the Hugging Face tensors that it holds, from top to bottom."""
    places = {f".{part}.": (f".{whole}.", number) for whole, of in packed.items() if len(of) > 1 for number, part in enumerate(of)}
    ordered: dict[str, dict[int, tuple[str, Shape]]] = {}
    for name, shape in shapes.items():
        held_as = name
        for theirs, own in OTHER_NAMES.items():
            held_as = held_as.replace(theirs, own)
        part = next((part for part in places if part in held_as), None)
        whole, number = places[part] if part else ("", 0)
        ordered.setdefault(held_as.replace(part, whole) if part else held_as, {})[number] = (name, shape)
    return {held_as: [of[number] for number in sorted(of)] for held_as, of in ordered.items()}


def as_held(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a Hugging Face tensor as vLLM holds it: in its precision, and A in place of its logarithm, in fp32."""
    return -torch.exp(tensor.float()) if name.endswith("A_log") else tensor.to(dtype)
