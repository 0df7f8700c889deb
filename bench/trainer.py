"""What our training step costs over a bare Megatron-Core loop of the same model: CPU-seconds a step, in one process.

Run: python bench/trainer.py [--size tiny|default] [--rounds N] [--control]
Ours is train.loop.fit, called for one block of steps after another: loader, learning rate, step, guard, timers, watchdog, metrics.jsonl,
TensorBoard, log line.
Bare is a loop as in Megatron-LM's minimal example, over batches collated beforehand: it loads, logs and checks nothing.
Blocks alternate, their order changes every round; both start from the same weights, read the same batches, and must find the same losses.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # read by torch at import: one thread, on the host
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import numpy as np
import torch

from megatron_prism.core import config as conf
from megatron_prism.core import log
from megatron_prism.core.config import GuardConfig
from megatron_prism.core.patch import replaced
from megatron_prism.data import loader, mixture, segments
from megatron_prism.jobs import prepare
from megatron_prism.models import build
from megatron_prism.parallel import groups, host
from megatron_prism.planning.flops import flops_per_token
from megatron_prism.train import garbage, loop, metrics, optim, safety, stop, watchdog
from megatron_prism.train.against_plan import AgainstPlan
from megatron_prism.train.guard import Guard

BLOCK_STEPS, WARM_UP_STEPS, SEED, VOCAB_SIZE = 2, 10, 1234, 384
WEIGHTS = {"math": 70.0, "code": 30.0}


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
    """Write a byte-level BPE of at most VOCAB_SIZE tokens as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["</s>"], show_progress=False))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def prepare_mixture(folder: Path) -> Path:
    """Return a mixture of two sources, 70 and 30 percent, prepared from text made here."""
    texts = {
        "math": ["\n".join(f"The sum of {a} and {b} is {a + b}, their product {a * b}." for b in range(20)) for a in range(300)],
        "code": ["\n".join(f"def f{a}(x):\n    return x * {a} + {b}\n" for b in range(20)) for a in range(300)],
    }
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    write_tokenizer(folder / "tokenizer", texts["math"][::9] + texts["code"][::9])
    sources = tuple(conf.SourceConfig(name=name, path=(str(folder / f"{name}.jsonl"),), weight=WEIGHTS[name]) for name in texts)
    prepare.run(conf.PrepareConfig(out=folder / "data", tokenizer=folder / "tokenizer", sources=sources, num_workers=1))
    return folder / "data"


def configure(folder: Path, size: Size, steps: int) -> conf.TrainConfig:
    """Return the run of both loops: one rank, fp32, a constant learning rate, every step logged."""
    model = conf.ModelConfig(
        family="llama",
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.hidden_size * 8 // 3 // 32 * 32,
        num_attention_heads=size.hidden_size // 32,
        num_query_groups=size.hidden_size // 64,
        kv_channels=32,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=size.seq_length,
    )
    return conf.TrainConfig(
        run_dir=folder,
        steps=steps,
        seed=SEED,
        model=model,
        precision="fp32",
        data=conf.DataConfig(prepared=prepare_mixture(folder), seq_length=size.seq_length),
        batch=conf.BatchConfig(global_size=size.micro_size * size.num_microbatches, micro_size=size.micro_size),
        optimizer=conf.OptimizerConfig(lr=1e-3),
        schedule=conf.ScheduleConfig(kind="constant"),
        guard=GuardConfig(on_nonfinite="skip", on_spike="skip"),
    )


class Bare:
    """The same model trained straight from Megatron-Core's interface; no line of train/ or data/ runs in its steps."""

    def __init__(self, model: torch.nn.Module, config: conf.TrainConfig, dataset: Any):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from torch.utils.data import DataLoader

        wanted, self.batch, self.seq_length = config.optimizer, config.batch, config.data.seq_length
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(model.config, settings, model)
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=wanted.lr,
                weight_decay=wanted.weight_decay,
                adam_beta1=wanted.beta1,
                adam_beta2=wanted.beta2,
                adam_eps=wanted.eps,
                clip_grad=wanted.clip_grad,
                params_dtype=torch.float32,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )
        for group in self.optimizer.param_groups:  # a scheduler would do this every step; at a constant rate once is enough
            group["weight_decay"] = wanted.weight_decay * group["wd_mult"]
        self.batches = list(
            DataLoader(dataset, batch_size=self.batch.micro_size, sampler=range(config.steps * self.batch.global_size), drop_last=True)
        )
        self.losses: list[Any] = []  # of each step, what the schedule returned

    def __call__(self, first: int, steps: int) -> None:
        """Train `steps` steps after the first `first`."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        num_microbatches = self.batch.global_size // self.batch.micro_size
        batches = iter(self.batches[first * num_microbatches : (first + steps) * num_microbatches])
        for _ in range(steps):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = get_forward_backward_func()(
                forward_step_func=self.forward_step,
                data_iterator=batches,
                model=self.model,
                num_microbatches=num_microbatches,
                seq_length=self.seq_length,
                micro_batch_size=self.batch.micro_size,
                forward_only=False,
            )
            self.losses.append(found)
            self.optimizer.step()

    @staticmethod
    def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)

        def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss, num_tokens = (output.float() * batch["loss_mask"]).sum(), batch["loss_mask"].sum()
            return loss, num_tokens.int(), {"loss": loss.detach(), "tokens": num_tokens}

        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), loss_of

    def mean_losses(self) -> list[float]:
        """Return each step's mean loss a token."""
        return [sum(float(part["loss"]) for part in step) / sum(float(part["tokens"]) for part in step) for step in self.losses]


class Unused:
    """A saver that has nothing to do."""

    longest_s = 0.0

    def is_saving(self) -> bool:
        return False

    is_writing = is_saving

    def finish(self) -> None:
        return None


def run_of(config: conf.TrainConfig, stack: ExitStack, **own: Any) -> loop.Run:
    """Return what loop.fit works on, in a process of its own, without validation, saving and samples. own: the other fields of loop.Run."""
    stack.enter_context(replaced(safety, "save", lambda *args, **kwargs: None))  # bench/save.py's
    return loop.Run(
        config=config,
        recorder=stack.enter_context(metrics.Recorder(config.run_dir, 0, config.steps, enabled=True)),
        valid_batches={},
        samples=None,
        saver=Unused(),
        guard=Guard(config.guard),
        stop=stack.enter_context(stop.StopRequest(None)),
        watchdog=stack.enter_context(watchdog.Watchdog(3600.0, 0)),
        collect_garbage=stack.enter_context(garbage.collected(config.gc_interval)),
        **own,
    )


@contextmanager
def ours(model: torch.nn.Module, config: conf.TrainConfig, dataset: Any, grid: groups.Groups) -> Iterator[Block]:
    """Yield a function that trains one block with loop.fit; between blocks only the validation and the saving are left out."""
    chunks = optim.wrap([model], config)
    assert config.model is not None
    with ExitStack() as stack:
        run = run_of(
            config,
            stack,
            groups=grid,
            chunks=chunks,
            against_plan=AgainstPlan(None, 0),
            optimizer=optim.build(chunks, config.optimizer, config),
            train_batches=loader.batches(dataset, 0, config.steps, config.batch, loader.Position(0, 1), 0, pin_memory=False),
            flops=flops_per_token(config.model, config.data.seq_length),
            peak_tflops=1.0,  # so that the MFU is recorded too
        )

        def block(first: int, steps: int) -> None:
            loop.fit(replace(run, config=replace(config, steps=first + steps)), first)

        yield block


def alternate(sides: dict[str, Block], rounds: int) -> dict[str, list[float]]:
    """Return each side's CPU-seconds a step by round, of all threads of the process; the order changes every round."""
    for block in sides.values():
        block(0, WARM_UP_STEPS)
    gc.freeze()  # what stands now is in no later collection: each block pays for its own garbage only
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            gc.collect()
            started = time.process_time()
            sides[name](WARM_UP_STEPS + number * BLOCK_STEPS, BLOCK_STEPS)
            found[name].append((time.process_time() - started) / BLOCK_STEPS)
    return found


def overhead_percent(found: dict[str, list[float]]) -> tuple[float, float, float]:
    """Return the median over rounds of ours/bare - 1 in percent, and its bootstrap 95% interval."""
    ratios = np.array(found["ours"]) / np.array(found["bare"])
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, ratios.size)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return 100 * (float(np.median(ratios)) - 1), 100 * (float(low) - 1), 100 * (float(high) - 1)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Build both loops in one process, measure them, and return what was found."""
    steps = WARM_UP_STEPS + args.rounds * BLOCK_STEPS
    config = configure(folder, SIZES[args.size], steps)
    with groups.gang(config) as grid, ExitStack() as stack:
        assert config.model is not None and not host.has_cuda()
        models = [build.build(config.model, grid, config)[0] for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        prepared = mixture.read_prepared(config.data.prepared)
        dataset = loader.Sequences([segments.Segment(prepared, mixture.walk(prepared, WEIGHTS, config.data.seq_length, SEED))])
        bare = Bare(models[0], config, dataset)
        other = Bare(models[1], config, dataset) if args.control else stack.enter_context(ours(models[1], config, dataset, grid))
        found = alternate({"ours": other, "bare": bare}, args.rounds)
    path, (overhead, low, high) = config.run_dir / metrics.METRICS, overhead_percent(found)
    losses = other.mean_losses() if isinstance(other, Bare) else [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    return {
        "bench": "trainer",
        "size": args.size,
        "control": args.control,
        **vars(SIZES[args.size]),
        "parameters": build.num_parameters(models[:1]),
        "rounds": args.rounds,
        "block_steps": BLOCK_STEPS,
        "ours_cpu_s": float(np.median(found["ours"])),
        "bare_cpu_s": float(np.median(found["bare"])),
        "overhead_percent": overhead,
        "overhead_low_percent": low,
        "overhead_high_percent": high,
        "max_loss_difference": max(abs(a - b) for a, b in zip(losses, bare.mean_losses(), strict=True)),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table and one line of JSON."""
    interval = "95% interval {overhead_low_percent:+.2f} to {overhead_high_percent:+.2f} %".format(**result)
    rows = {
        f"{result['size']}, {result['rounds']} rounds": "CPU-ms a step, median",
        "bare, again" if result["control"] else "ours": f"{1e3 * result['ours_cpu_s']:.2f}",
        "bare Megatron-Core": f"{1e3 * result['bare_cpu_s']:.2f}",
        "overhead": f"{result['overhead_percent']:+.2f} %, {interval}",
        "largest loss difference": f"{result['max_loss_difference']:.1e}",
    }
    print("\n".join(f"{name:<26}{value}" for name, value in rows.items()))
    print(json.dumps(result))


def main() -> None:
    """Measure in a folder that goes away, and print; what a run says on standard error goes to a file there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--control", action="store_true", help="measure bare against bare: the interval should hold 0")
    args = parser.parse_args()
    # on a terminal, Recorder would start a progress bar whose thread draws in both loops' time
    with tempfile.TemporaryDirectory() as name, (Path(name) / "stderr.log").open("w") as stream, redirect_stderr(stream):
        log.setup()
        result = measure(Path(name), args)
    show(result)


if __name__ == "__main__":
    main()
