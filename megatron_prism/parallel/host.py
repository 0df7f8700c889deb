"""Run unmodified Megatron-Core on a CPU under gloo. No effect where CUDA is present.

Megatron-Core uses "cuda" in three ways, and each has one replacement on a host without it:
1. functions of `torch.cuda` (streams, events, generators, the current device): host versions, `HOST_FUNCTIONS`.
2. `device="cuda"` literals, `.cuda()`, `pin_memory` and `.type()` names: one TorchFunctionMode, the mechanism of
   `torch.set_default_device`. It costs about 1.4 us per operation.
3. torch.compile as its fuser: the identity while megatron.core is imported (compiling C++ takes minutes, gains nothing here).
A failed collective raises the same type as under NCCL (`_give_gloo_a_type`).
`torch.cuda.is_available()` stays False, so code that asks gets the truth.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import types
import warnings
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode

from megatron_prism.core.errors import BackendMissing, EnvironmentFault
from megatron_prism.parallel import allocator, megatron_versions

CPU = torch.device("cpu")


def has_cuda() -> bool:
    """Say whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def require_named_devices() -> None:
    """Refuse the host as the device where CUDA_VISIBLE_DEVICES names others, as in a Slurm job with GPUs: the run would be slow in silence.

    Raises: EnvironmentFault where torch sees none of them.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if has_cuda() or named.startswith("-") or named in ("", "NoDevFiles"):  # Slurm's older word for none
        return
    build = f"torch {torch.__version__}, " + (f"for CUDA {torch.version.cuda}" if torch.version.cuda else "which is for CPUs alone")
    fix = "look at nvidia-smi, at how the container is started, and at which torch is installed; to run on the CPU: export CUDA_VISIBLE_DEVICES="
    raise EnvironmentFault(f"CUDA_VISIBLE_DEVICES={named} on {os.uname().nodename}, and {build}, sees no CUDA device: {fix}")


def device_index() -> int:
    """Return the index of this rank's device. A task that Slurm shows one device alone (--gpus-per-task=1) has the first, whatever its local rank."""
    return 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Return the device this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CPU


def device_name() -> str:
    """Return the name of the device this rank computes on."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


def peak_memory_bytes() -> int:
    """Return the most memory that this process and its context have held on its CUDA device, 0 on a host."""
    if not has_cuda():
        return 0
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()


def num_alloc_retries() -> int:
    """Return how often torch's allocator found no room on this process's CUDA device, and gave back what it kept to ask again; 0 on a host."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if has_cuda() else 0


def total_memory_bytes() -> int:
    """Return the memory of the device this rank computes on."""
    return torch.cuda.get_device_properties(device()).total_memory if has_cuda() else psutil.virtual_memory().total


def install() -> None:
    """Make `import megatron.core` and everything it calls work on this machine. A second call does nothing.

    Raises: EnvironmentFault where megatron.core was already imported on a machine without CUDA.
    """
    if has_cuda() or getattr(torch.cuda, "_prism_host", False):
        return
    if "megatron.core" in sys.modules:
        raise EnvironmentFault("megatron.core was imported before megatron_prism.parallel.host.install() on a machine without CUDA")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    allocator.keep_freed_memory()
    _replace_cuda_functions()
    _HostAsCuda().__enter__()  # type: ignore[no-untyped-call]  # for the main thread, until the process ends
    _stay_host_in_backward()
    _give_gloo_a_type()
    with _compile_is_identity(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")  # expected; `prism doctor` reports it
        import megatron.core
        import megatron.core.optimizer  # noqa: F401
    _refuse_triton_kernels()
    _quiet_megatron()
    megatron_versions.write_results_in_memory()
    torch.cuda._prism_host = True  # type: ignore[attr-defined]


class _HostAsCuda(TorchFunctionMode):
    """Redirects every request for a CUDA device to the host."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # the optimizers dispatch on 'torch.cuda.FloatTensor'
        if "device" in kwargs:
            kwargs["device"] = _on_host(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to:
            args = tuple(_on_host(arg) if isinstance(arg, (str, torch.device)) else arg for arg in args)
        return func(*args, **kwargs)


def without_stand_in() -> contextlib.AbstractContextManager[Any]:
    """Disable the mode, and its cost, within a block in which every tensor is created on device()."""
    return contextlib.nullcontext() if has_cuda() else torch._C.DisableTorchFunction()


def _stay_host_in_backward() -> None:
    """Keep the mode active in the backward pass. torch disables it inside torch.autograd.backward, where recompute runs forward again."""
    run_engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_on_host(*args: Any, **kwargs: Any) -> Any:
        with _HostAsCuda():
            return run_engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_on_host  # type: ignore[attr-defined]


def _give_gloo_a_type() -> None:
    """Raise NCCL's error type when a gloo collective fails because a rank is gone. gloo's own error is a plain RuntimeError."""
    work = torch.distributed.Work
    wait = work.wait

    def typed_wait(*args: Any, **kwargs: Any) -> Any:
        try:
            return wait(*args, **kwargs)
        except torch.distributed.DistError:
            raise
        except RuntimeError as error:
            raise torch.distributed.DistBackendError(str(error)) from error

    work.wait = typed_wait  # type: ignore[method-assign]


def _on_host(where: Any) -> Any:
    named = where.type if isinstance(where, torch.device) else where
    return CPU if isinstance(named, str) and named.startswith("cuda") else where


class _HostStream:
    """Replaces a CUDA stream, event or device guard: the host always runs in order."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _HostStream:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def record_event(self, *args: Any) -> _HostStream:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait = record = synchronize = wait_stream = wait_event = _nothing


class _HostGenerators:
    """torch.cuda.default_generators: every index is the host's generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _returns(value: Any = None) -> Any:
    return lambda *args, **kwargs: value  # a new function each time: torch._dynamo requires a distinct object for each name


def _replace_cuda_functions() -> None:
    stream = _HostStream()
    host: dict[str, Any] = {
        "current_device": _returns(CPU),
        "device_count": _returns(1),
        "set_device": _returns(),
        "synchronize": _returns(),
        "empty_cache": _returns(),
        "_lazy_init": _returns(),
        "_lazy_call": lambda function, **kwargs: function(),
        "Stream": _HostStream,
        "Event": _HostStream,
        "ExternalStream": _HostStream,
        "device": _HostStream,
        "stream": lambda stream=None: contextlib.nullcontext(),
        "current_stream": _returns(stream),
        "default_stream": _returns(stream),
        # torch.manual_seed itself calls manual_seed_all: seeding the host there would recurse
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": _returns(),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": _HostGenerators(),
        "memory_stats": _returns({}),
        "memory_allocated": _returns(0),
        "max_memory_allocated": _returns(0),
        "memory_reserved": _returns(0),
        "max_memory_reserved": _returns(0),
        "reset_peak_memory_stats": _returns(),
        "is_current_stream_capturing": _returns(False),
    }
    for name, value in host.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, host[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _returns())


@contextlib.contextmanager
def _compile_is_identity() -> Any:
    """Let Megatron-Core bind the identity as its fuser, then restore torch.compile."""
    compiled = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda function: function)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiled


def _refuse_triton_kernels() -> None:
    """Let Megatron's Mamba mixer be imported without triton (1 GB). 0.16 imports three triton kernels of dynamic inference for it."""
    if importlib.util.find_spec("triton") is not None:
        return
    name = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"
    module = types.ModuleType(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise BackendMissing("triton", "Megatron-Core's dynamic inference of Mamba layers", "pip install triton")

    for kernel in ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge"):
        setattr(module, kernel, refuse)
    sys.modules[name] = module


def _quiet_megatron() -> None:
    """Silence what is expected on a host: warnings of missing GPU packages, and the guard against drawing from the host's generator,
    which here is the 'CUDA' one."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core\.|torch\.distributed\.")
    guard = logging.getLogger("megatron.core.tensor_parallel.random")
    guard.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
