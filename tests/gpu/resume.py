"""Runs with every setting, each resumed from its middle in a new process, bit for bit: python -m tests.gpu.resume FIXTURES WORK.

The second half's losses and gradient norms, and every tensor of the last checkpoint, the optimizer's too, must be the unbroken run's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import folder, torch_dist
from megatron_prism.parallel import host
from tests.distributed.worker import start_from
from tests.gpu import options, runs
from tests.gpu.fixtures import HYBRID
from tests.gpu.options import Options
from tests.gpu.report import check

MIDDLE = 6  # the step after which the second run goes on
Setting = tuple[str, dict[str, Any], str]  # (family, keys of the config, what a CPU does with it)
ON_CPU, DEVICE, SLOW = "tiny", "device", "cpu"  # runs under --tiny; needs a device; could run on a CPU, and --tiny leaves it out
SETTINGS: dict[str, Setting] = {
    "dense fp32": ("llama", {"precision": "fp32"}, SLOW),
    "dense bf16": ("llama", {}, ON_CPU),
    "hybrid fp32": (HYBRID, {"precision": "fp32"}, SLOW),
    "hybrid bf16": (HYBRID, {}, SLOW),
    "dense FP8 tensorwise": ("llama", {"fp8": {}}, DEVICE),
    "dense FP8 delayed": ("llama", {"fp8": {"recipe": "delayed"}}, DEVICE),
    "dense FP8 blockwise": ("llama", {"fp8": {"recipe": "blockwise"}}, DEVICE),
    "dense FP8 tensorwise, ends in bf16": (
        "llama",
        {"fp8": {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}},
        DEVICE,
    ),
    "hybrid FP8 tensorwise": (HYBRID, {"fp8": {}}, DEVICE),
    "hybrid FP8 delayed": (HYBRID, {"fp8": {"recipe": "delayed"}}, DEVICE),
    "dense, document mask": ("llama", {"data": {"document_mask": True}}, SLOW),
    "hybrid, document mask": (HYBRID, {"data": {"document_mask": True}}, ON_CPU),
    "window": ("mistral", {}, SLOW),
    "optimizer half offloaded": ("llama", {"offload": {"optimizer_fraction": 0.5}}, DEVICE),
    "activations offloaded": ("llama", {"offload": {"activation_layers": 2}}, DEVICE),
    "full recompute": ("llama", {"recompute": {"granularity": "full"}}, SLOW),
    "mlp recompute, hybrid": (HYBRID, {"recompute": {"granularity": "selective", "modules": ["mlp"]}}, SLOW),
    "overlapped reduce and gather": ("llama", {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}, SLOW),
    "logits in chunks": ("llama", {"logits_chunk_tokens": 96}, SLOW),
    "fused loss and gradient accumulation": (
        "llama",
        {"fusion": {"cross_entropy": "te", "gradient_accumulation": True}, "parallel": {"grad_reduce": "bf16"}},
        DEVICE,
    ),
    "CUDA graphs": ("llama", {"cuda_graphs": True}, DEVICE),
    "CUDA graphs, hybrid FP8 tensorwise": (HYBRID, {"cuda_graphs": True, "fp8": {}}, DEVICE),
    "moments in bf16": ("llama", {"optimizer": {"moments": "bf16"}}, DEVICE),
    "moments in bf16, FP8 tensorwise": (
        "llama",
        {"optimizer": {"moments": "bf16"}, "fp8": {}},
        DEVICE,
    ),  # Megatron-Core holds the main weights
    "moments in bf16, hybrid FP8 delayed": (HYBRID, {"optimizer": {"moments": "bf16"}, "fp8": {"recipe": "delayed"}}, DEVICE),
    "attention alone trained": ("llama", {"trainable": ["*self_attention*"]}, SLOW),
}
# name: (a setting, another, the least and the most that a loss of theirs differs). bf16 beside fp32 differs by 0.040 on a CPU
PAIRS = {
    "full recompute changes no bit": ("dense bf16", "full recompute", 0.0, 0.0),
    "offloaded activations change no bit": ("dense bf16", "activations offloaded", 0.0, 0.0),
    "overlap changes no bit": ("dense bf16", "overlapped reduce and gather", 0.0, 0.0),
    "bf16 is near fp32": ("dense fp32", "dense bf16", 1e-6, 0.1),
    "bf16 is near fp32, hybrid": ("hybrid fp32", "hybrid bf16", 1e-6, 0.1),
    "FP8 is near bf16": ("dense bf16", "dense FP8 tensorwise", 1e-6, 0.3),
    "FP8 is near bf16, hybrid": ("hybrid bf16", "hybrid FP8 tensorwise", 1e-6, 0.3),
    "CUDA graphs are near none": ("dense bf16", "CUDA graphs", 0.0, 0.1),
    "moments in bf16 are near fp32's": ("dense bf16", "moments in bf16", 1e-6, 0.1),
    "a document mask trains something else": ("dense bf16", "dense, document mask", 1e-3, 1.0),
}


def main(given: Options) -> None:
    """Train all settings, some at a time, then compare those that belong together."""
    names = [name for name, (_, _, where) in SETTINGS.items() if where == ON_CPU or (not given.tiny and (where == SLOW or host.has_cuda()))]
    runs.at_once(given, split, names)
    for name, (one, other, least, most) in PAIRS.items():
        if one in names and other in names:
            with check("resume", name) as result:
                difference = runs.largest_difference(*(runs.losses(path_of(given, each)) for each in (one, other)))
                result.figures, result.ok = {"largest_difference": difference, "least": least, "most": most}, least <= difference <= most


def path_of(given: Options, name: str) -> Path:
    """Return the folder of a setting's unbroken run."""
    return given.work / name.replace(", ", "_").replace(" ", "_")


def split(given: Options, name: str) -> None:
    """Train a setting, go on from its middle, compare. The control goes on with other microbatches: the same sums in another order."""
    family, keys, _ = SETTINGS[name]
    whole = path_of(given, name)
    with check("resume", name) as result:
        ended = runs.must(runs.prism("train", runs.config(given, whole, family, **keys)))
        result.figures = {"start_to_end_s": ended.seconds, "attention": runs.attention(whole)} | go_on(given, name, "again", keys)
        first = runs.losses(whole)
        result.ok = result.figures["bit_equal"] and first[max(first)][0] < first[1][0]
    if name == "dense bf16":
        with check("resume", "control: another micro_size from the middle on") as result:
            result.figures = go_on(given, name, "control", {"batch": {"micro_size": 2}})
            result.ok = not result.figures["bit_equal"] and result.figures["largest_difference"] < 1e-2


def go_on(given: Options, name: str, end: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Train the second half of a setting's run again, in a copy of its folder, and compare."""
    whole = path_of(given, name)
    again = whole.with_name(f"{whole.name}_{end}")
    start_from(again, {"run_dir": whole, "step": MIDDLE})
    (again / "metrics.jsonl").unlink()
    runs.must(runs.prism("train", runs.config(given, again, SETTINGS[name][0], **keys)))
    first, second = ({step: values for step, values in runs.losses(path).items() if step > MIDDLE} for path in (whole, again))
    tensors = other_tensors(whole, again)
    return {
        "bit_equal": len(first) == MIDDLE and first == second and tensors == 0,
        "largest_difference": runs.largest_difference(first, second),
        "other_tensors": tensors,
    }


def other_tensors(one: Path, other: Path) -> int:
    """Return how many tensors of two runs' last checkpoints differ in a bit, or are in one alone."""
    readers = [torch_dist.TensorReader(folder.read(path).state) for path in (one, other)]
    shapes = [reader.shapes() for reader in readers]
    both = shapes[0].keys() & shapes[1].keys()
    unequal = [key for key in both if not torch.equal(*(reader.read(key, shapes[0][key]) for reader in readers))]
    return len(unequal) + len(shapes[0].keys() ^ shapes[1].keys())


if __name__ == "__main__":
    main(options.read())
