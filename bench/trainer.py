"""What our training step costs over a bare Megatron-Core loop of the same model: CPU-seconds a step, in one process.

Run: python bench/trainer.py [--size tiny|default] [--rounds N] [--control] [--profile]
Ours is train.loop.fit, called for one block of steps after another: loader, learning rate, step, metrics.jsonl, TensorBoard, log line.
Bare is the loop of Megatron-LM's minimal example over batches collated beforehand: it loads, logs and checks nothing.
Blocks alternate, their order changes every round; both start from the same weights, read the same batches, and must find the same losses.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # read by torch at import: one thread, on the host

import numpy as np
import torch

from megatron_prism.core import log
from megatron_prism.core import config as conf
from megatron_prism.data import loader, mixture
from megatron_prism.jobs import prepare
from megatron_prism.models import build
from megatron_prism.parallel import groups, host
from megatron_prism.planning.flops import flops_per_token
from megatron_prism.train import loop, metrics, optim

BLOCK_STEPS, SEED, VOCAB_SIZE = 10, 1234, 384
PACKAGE = "megatron_prism"


@dataclass(frozen=True)
class Size:
    """A model, and a step of num_microbatches times micro_size sequences."""

    hidden_size: int
    num_layers: int
    seq_length: int
    micro_size: int
    num_microbatches: int


SIZES = {"tiny": Size(64, 2, 64, 2, 2), "default": Size(256, 4, 128, 2, 2)}
Block = Callable[[int, int], None]  # (steps done, steps to do)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Write a byte-level BPE of VOCAB_SIZE tokens as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))


def prepare_mixture(folder: Path) -> Path:
    """Return a mixture of two sources, 70 and 30 percent, prepared from text made here."""
    texts = {
        "math": [f"The sum of {a} and {b} is {a + b}, their product {a * b}." for a in range(80) for b in range(60)],
        "code": [f"def f{a}(x):\n    return x * {a} + {b}\n" for a in range(80) for b in range(40)],
    }
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    write_tokenizer(folder / "tokenizer", texts["math"][::7] + texts["code"][::7])
    weights = {"math": 70.0, "code": 30.0}
    sources = tuple(conf.SourceConfig(name=name, path=(str(folder / f"{name}.jsonl"),), weight=weights[name]) for name in texts)
    prepare.run(conf.PrepareConfig(out=folder / "data", tokenizer=folder / "tokenizer", sources=sources, num_workers=1))
    return folder / "data"


def configure(folder: Path, size: Size, steps: int) -> conf.TrainConfig:
    """Return the run of both loops: one rank, fp32, a constant learning rate, every step logged."""
    head = 32
    model = conf.ModelConfig(
        family="llama", num_layers=size.num_layers, hidden_size=size.hidden_size, ffn_hidden_size=size.hidden_size * 8 // 3 // 32 * 32,
        num_attention_heads=size.hidden_size // head, num_query_groups=size.hidden_size // head // 2, kv_channels=head,
        vocab_size=VOCAB_SIZE, max_position_embeddings=size.seq_length,
    )  # fmt: skip
    return conf.TrainConfig(
        run_dir=folder / "run", steps=steps, seed=SEED, model=model, precision="fp32",
        data=conf.DataConfig(prepared=prepare_mixture(folder), seq_length=size.seq_length),
        batch=conf.BatchConfig(global_size=size.micro_size * size.num_microbatches, micro_size=size.micro_size),
        optimizer=conf.OptimizerConfig(lr=1e-3), schedule=conf.ScheduleConfig(kind="constant"),
    )  # fmt: skip


class Bare:
    """The same model trained straight from Megatron-Core's interface; no line of train/ or data/ runs in it."""

    def __init__(self, model: torch.nn.Module, config: conf.TrainConfig, dataset: Any):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from torch.utils.data import DataLoader

        wanted, self.size = config.optimizer, config.batch
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.seq_length = config.data.seq_length
        self.model = DistributedDataParallel(model.config, settings, model)
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=wanted.lr, weight_decay=wanted.weight_decay, adam_beta1=wanted.beta1, adam_beta2=wanted.beta2,
                adam_eps=wanted.eps, clip_grad=wanted.clip_grad, params_dtype=torch.float32, use_distributed_optimizer=True,
            ),
            [self.model],
        )  # fmt: skip
        self.batches = list(DataLoader(dataset, batch_size=self.size.micro_size, drop_last=True))
        self.losses: list[Any] = []  # of each step, what the schedule returned

    def __call__(self, first: int, steps: int) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        forward_backward = get_forward_backward_func()
        num_microbatches = self.size.global_size // self.size.micro_size
        batches = iter(self.batches[first * num_microbatches : (first + steps) * num_microbatches])
        for _ in range(steps):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = forward_backward(
                forward_step_func=self.forward_step,
                data_iterator=batches,
                model=self.model,
                num_microbatches=num_microbatches,
                seq_length=self.seq_length,
                micro_batch_size=self.size.micro_size,
                forward_only=False,
            )
            self.optimizer.step()
            self.losses.append(found)

    @staticmethod
    def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        loss_mask = batch["loss_mask"]

        def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss = (output.float() * loss_mask).sum()
            return loss, loss_mask.sum().int(), {"loss": loss.detach(), "tokens": loss_mask.sum()}

        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), loss_of

    def mean_losses(self) -> list[float]:
        return [sum(float(part["loss"]) for part in step) / sum(float(part["tokens"]) for part in step) for step in self.losses]


@contextmanager
def ours(model: torch.nn.Module, config: conf.TrainConfig, dataset: Any, grid: groups.Groups) -> Iterator[Block]:
    """Yield a function that trains one block with loop.fit; between blocks only the validation and the saving are left out."""
    chunks = optim.wrap([model], config.parallel)
    assert config.model is not None
    with metrics.Recorder(config.run_dir, 0, config.steps, enabled=True) as recorder:
        run = loop.Run(
            config=config,
            groups=grid,
            chunks=chunks,
            optimizer=optim.build(chunks, config.optimizer, config.parallel, config.precision),
            train_batches=loader.batches(dataset, 0, config.steps, config.batch, loader.Position(0, 1), 0, pin_memory=False),
            valid_batches={},
            flops=flops_per_token(config.model, config.data.seq_length),
            peak_tflops=1.0,  # so that the MFU is recorded too
            recorder=recorder,
            save=lambda step: None,
        )

        def block(first: int, steps: int) -> None:
            loop.fit(replace(run, config=replace(config, steps=first + steps)), first)

        yield block


def cpu_seconds_a_step(block: Block, first: int) -> float:
    """Return the CPU-seconds of a step over one block, all threads of the process counted."""
    gc.collect()  # each block pays for its own garbage only
    started = time.process_time()
    block(first, BLOCK_STEPS)
    return (time.process_time() - started) / BLOCK_STEPS


def alternate(sides: dict[str, Block], rounds: int) -> dict[str, list[float]]:
    """Return each side's CPU-seconds a step by round, after one block of warm-up; the order changes every round."""
    for block in sides.values():
        cpu_seconds_a_step(block, 0)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            found[name].append(cpu_seconds_a_step(sides[name], number * BLOCK_STEPS))
    return found


def overhead_percent(found: dict[str, list[float]]) -> tuple[float, float, float]:
    """Return the median over rounds of ours/bare - 1 in percent, and its bootstrap 95% interval."""
    ratios = np.array(found["ours"]) / np.array(found["bare"])
    resampled = np.random.default_rng(0).choice(ratios, (10_000, ratios.size))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return tuple(float(100 * (value - 1)) for value in (np.median(ratios), low, high))  # type: ignore[return-value]


def profile(block: Block, first: int) -> str:
    """Return the share of each of the package's functions in one block, callees included, from 0.1 percent up."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(block, first, BLOCK_STEPS)
    stats: Any = pstats.Stats(profiler)
    own = [(times[3] / stats.total_tt, key) for key, times in stats.stats.items() if PACKAGE in key[0]]
    return "\n".join(f"{share:7.2%}  {Path(file).name}:{line} {name}" for share, (file, line, name) in sorted(own, reverse=True) if share >= 1e-3)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Build both loops in one process, measure them, and return what was found."""
    steps = (args.rounds + 2) * BLOCK_STEPS  # the first block is warm-up, the last may be profiled
    config = configure(folder, SIZES[args.size], steps)
    config.run_dir.mkdir()
    prepared = mixture.read_prepared(config.data.prepared)
    weights = {source.name: source.weight for source in prepared.sources}
    with groups.gang(config.parallel, config.seed) as grid, ExitStack() as stack:
        assert config.model is not None and not host.has_cuda()
        models = [build.build(config.model, grid, config.parallel, config.precision)[0] for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        dataset = loader.train_dataset(prepared, weights, config.data.seq_length, steps * config.batch.global_size, SEED, folder / "cache")
        bare = Bare(models[0], config, dataset)
        other = Bare(models[1], config, dataset) if args.control else stack.enter_context(ours(models[1], config, dataset, grid))
        found = alternate({"ours": other, "bare": bare}, args.rounds)
        profiled = profile(other, (args.rounds + 1) * BLOCK_STEPS) if args.profile else ""
    losses = other.mean_losses() if isinstance(other, Bare) else read_losses(config.run_dir)
    overhead, low, high = overhead_percent(found)
    return {
        "bench": "trainer", "size": args.size, "control": args.control, **vars(SIZES[args.size]),
        "parameters": build.num_parameters(models[:1]), "rounds": args.rounds, "block_steps": BLOCK_STEPS,
        "ours_cpu_s": float(np.median(found["ours"])), "bare_cpu_s": float(np.median(found["bare"])),
        "overhead_percent": overhead, "overhead_low_percent": low, "overhead_high_percent": high,
        "max_loss_difference": max(abs(a - b) for a, b in zip(losses, bare.mean_losses(), strict=False)),
        "torch": torch.__version__, "megatron_core": version("megatron-core"), "profile": profiled,
    }  # fmt: skip


def read_losses(run_dir: Path) -> list[float]:
    """Return the loss of each step that metrics.jsonl holds."""
    return [json.loads(line)["loss"] for line in (run_dir / metrics.METRICS).read_text().splitlines()]


def show(result: dict[str, Any]) -> None:
    """Print the table and one line of JSON."""
    size = "hidden {hidden_size}, {num_layers} layers, seq {seq_length}, {num_microbatches} x {micro_size} sequences a step".format(**result)
    print(f"{result['size']}: {size}, {result['parameters']:,} parameters; {result['rounds']} rounds of {result['block_steps']} steps each")
    print(f"{'loop':<24}CPU-ms a step (median)")
    print(f"{'bare, again' if result['control'] else 'ours':<24}{1e3 * result['ours_cpu_s']:.2f}")
    print(f"{'bare Megatron-Core':<24}{1e3 * result['bare_cpu_s']:.2f}")
    print("{:<24}{overhead_percent:+.2f} %   95% interval {overhead_low_percent:+.2f} to {overhead_high_percent:+.2f} %".format("overhead", **result))
    print(f"{'largest loss difference':<24}{result['max_loss_difference']:.1e}")
    if profiled := result.pop("profile"):
        print(f"share of a block of ours, callees included (cProfile, main thread):\n{profiled}")
    print(json.dumps(result))


def main() -> None:
    """Measure in a folder that goes away; what a run would say on standard error goes to a file there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--control", action="store_true", help="measure bare against bare: the interval should hold 0")
    parser.add_argument("--profile", action="store_true", help="profile one more block of ours")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, (Path(name) / "stderr.log").open("w") as stream:
        with redirect_stderr(stream):  # no progress bar: its thread would draw in both loops' time
            log.setup()
            result = measure(Path(name), args)
    show(result)


if __name__ == "__main__":
    main()
