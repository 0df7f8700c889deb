"""The peaks that MFU is a share of, and what another GPU changes in a plan."""

from __future__ import annotations

import pytest

from megatron_prism.planning.gpus import H100, H200, of_device, peak_tflops


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA H100", "fp32", None),
        ("NVIDIA H100 PCIe", "bf16", None),  # 756: another clock than the SXM's, of the same name
        ("NVIDIA H100 NVL", "fp8", None),
        ("NVIDIA H200 NVL", "bf16", None),
        ("NVIDIA A100-PCIE-80GB", "bf16", 312.0),
        ("cpu", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
    ],
)
def test_peak_is_known_or_none(name: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak


@pytest.mark.parametrize(("device", "gpu"), [("NVIDIA H100 80GB HBM3", H100), ("NVIDIA H200", H200), ("NVIDIA A100-SXM4-80GB", H100)])
def test_a_device_is_planned_as_what_it_is(device: str, gpu: object) -> None:
    assert of_device(device) is gpu
