"""Megatron-Core's MambaMixer on this device: with mamba_ssm's CUDA kernels, or on a host with models/ssd.py.

The device decides, not mcore's HAVE_MAMBA_SSM: a mamba_ssm built without CUDA half imports, sets that flag, and fails in its first
forward pass. Only names within mcore's own module are set; no module pretends to be mamba_ssm.
"""

from __future__ import annotations

import types
from typing import Any

from megatron_prism.core.errors import BackendMissing
from megatron_prism.models import ssd
from megatron_prism.parallel import groups, host


def mixer_module() -> Any:
    """Return megatron.core.ssm.mamba_mixer, ready for this device.

    Raises: BackendMissing on a CUDA device without mamba_ssm.
    """
    from megatron.core.ssm import mamba_mixer

    if host.has_cuda():
        if not mamba_mixer.HAVE_MAMBA_SSM:
            raise BackendMissing("mamba-ssm", "Mamba layers on a GPU", "pip install mamba-ssm causal-conv1d beside this CUDA and torch")
        return mamba_mixer
    if getattr(mamba_mixer, "ExtendedRMSNorm", None) is not _ShardedNorm:
        for name in (
            "causal_conv1d_fn",
            "causal_conv1d_update",
            "selective_state_update",
            "mamba_chunk_scan_combined",
            "mamba_split_conv1d_scan_combined",
        ):
            setattr(mamba_mixer, name, getattr(ssd, name))
        mamba_mixer.ExtendedRMSNorm, mamba_mixer.HAVE_MAMBA_SSM = _ShardedNorm, True
        mamba_mixer._check_mamba_sequence_packing_support = lambda **kwargs: (True, None)  # it checks the packages' versions
    return mamba_mixer


def kernels() -> Any:
    """Return the four kernels of a mixer that caches its states: mamba_ssm's and causal_conv1d's, or on a host models/ssd.py's.

    Raises: BackendMissing on a CUDA device without these packages.
    """
    if not host.has_cuda():
        return ssd
    try:
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        raise BackendMissing(
            "mamba-ssm or causal-conv1d", "generation with Mamba layers on a GPU", "pip install mamba-ssm causal-conv1d"
        ) from error
    functions = (causal_conv1d_fn, causal_conv1d_update, selective_state_update, mamba_chunk_scan_combined)
    return types.SimpleNamespace(**{function.__name__: function for function in functions})


class _ShardedNorm(ssd.GatedRMSNorm):
    """The gated norm as MambaMixer stores it: its channels are split over tensor parallelism (mamba_mixer.ExtendedRMSNorm)."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> Any:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=groups.tensor_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
