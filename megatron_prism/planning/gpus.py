"""What NVIDIA's data sheets say of GPUs (SXM): the dense peaks that MFU is a share of, and the GPUs that the planner knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
GpuName = Literal["h100", "h200"]
# TFLOP/s on the tensor cores. An A100 has no FP8
PEAK_TFLOPS = {"bf16": {"H100": 989.0, "H200": 989.0, "A100": 312.0}, "fp8": {"H100": 1979.0, "H200": 1979.0}}

SLOWER = ("PCIe", "NVL")  # an H100 or H200 of this name has a lower peak than the SXM's; an A100-PCIE has the same


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return a device's dense peak in TFLOP/s in fp32, bf16 or fp8, or None where it is not in PEAK_TFLOPS."""
    if any(form in device_name for form in SLOWER):
        return None
    return next((peak for name, peak in PEAK_TFLOPS.get(precision, {}).items() if name in device_name), None)


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be planned for. memory_gib: its capacity as torch reports it, including CUDA's own context.

    An H200 is an H100 with more and faster memory. fp32_tflops: outside the tensor cores.
    """

    name: GpuName
    memory_gib: float
    hbm_bytes_s: float
    fp32_tflops: float = 67.0

    def peak_flops(self, precision: str) -> float:
        """Return the dense peak in fp32, bf16 or fp8, in FLOP/s."""
        return 1e12 * (self.fp32_tflops if precision == "fp32" else PEAK_TFLOPS[precision][self.name.upper()])


H100 = Gpu("h100", memory_gib=79.1, hbm_bytes_s=3.35e12)
H200 = Gpu("h200", memory_gib=139.8, hbm_bytes_s=4.8e12)
GPUS: dict[GpuName, Gpu] = {gpu.name: gpu for gpu in (H100, H200)}


def of_device(device_name: str) -> Gpu:
    """Return the GPU that a CUDA device's name says. A device of another kind is planned as an H100."""
    return next((gpu for gpu in GPUS.values() if gpu.name.upper() in device_name), H100)
