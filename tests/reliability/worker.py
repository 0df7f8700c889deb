"""Trains cases in children forked from one process that has everything imported, each with a fault built in; or one gang's rank with a fault.

python worker.py FOLDER: the cases of FOLDER/cases.json; writes FOLDER/results.json.
python worker.py --gang N CONFIG FAULT: start a gang of N whose ranks train CONFIG (YAML) with a fault (JSON).
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import integrity, optimizer_state, saving, writers
from megatron_prism.core import log
from megatron_prism.core.config import TrainConfig
from megatron_prism.core.errors import PrismError
from megatron_prism.core.load import build
from megatron_prism.jobs import train
from megatron_prism.parallel import host, launch
from megatron_prism.train import loop, optim

TIMEOUT_S = 120.0


def build_in(fault: dict[str, Any]) -> None:
    """Build a fault into this process and those it forks."""
    kind = fault["kind"]
    if fault.get("rank", 0) not in (None, int(os.environ.get("RANK", "0"))):  # None: every rank
        return
    if kind == "crash":
        crash_at(fault["event"], fault["path"], fault.get("within", ""), fault.get("nth", 1))
    elif kind == "writer":
        break_writer(fault["how"])
    elif kind == "threads":
        compute_while_writing()
    elif kind == "full":
        saving.Saving._check_space = lambda self, num_bytes: None  # type: ignore[method-assign]
    elif kind == "device":
        inject("device", fault["step"])
    elif kind == "draws":
        draw_after_each_step()
    elif kind == "unreadable":
        fail_to_read(fault["within"])
    elif kind == "nonfinite":
        inject(fault["site"], fault["step"])
    elif kind == "hang":
        hang_at(fault["step"])
    elif kind == "offloaded":
        play_a_device()
    elif kind == "fused adam":
        take_transformer_engines_adam(fault.get("copies", False), fault.get("fp8_recipe"))


def crash_at(event: str, end: str, within: str, nth: int) -> None:
    """SIGKILL this process and all it forked when Python is about to do something (an audit event) to such a path for the nth time."""
    seen = [0]

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if name != event:
            return
        paths = [str(arg) for arg in args[:2] if isinstance(arg, (str, os.PathLike))]
        if not any(path.endswith(end) and within in path for path in paths):
            return
        if name == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen[0] += 1
        if seen[0] == nth:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


def break_writer(how: str) -> None:
    """Let the processes that write files die, hang or raise."""
    write = writers._write

    def broken(transforms: Any, number: int, bucket: Any, pipe: Any) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "killed half-way":
            Path(bucket[0]).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raises":
            bucket = (str(Path(bucket[0]).parent / "no such folder" / "x.distcp"), *bucket[1:])
        write(transforms, number, bucket, pipe)

    writers._write = broken


def compute_while_writing() -> None:
    """Give this process OpenMP threads, and its writers something to compute that is shared among such threads."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    def compute_and_write(*args: Any, **kwargs: Any) -> None:
        torch.ones(1 << 20).exp()
        write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(compute_and_write)  # type: ignore[method-assign,assignment]
    torch.set_num_threads(2)
    torch.ones(1 << 20).exp()  # starts them


def draw_after_each_step() -> None:
    """Draw from the host's generator and from Megatron-Core's after every step; write to the file `draws` of the run what came."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_prism.train import metrics

    record = metrics.Recorder.record

    def drawn(self: Any, step: int, values: Any) -> None:
        record(self, step, values)
        with get_cuda_rng_tracker().fork(), open(Path(self._file.name).with_name("draws"), "a") as file:
            file.write(f"{torch.rand(1).item()}\n")
        with open(Path(self._file.name).with_name("draws"), "a") as file:
            file.write(f"{torch.rand(1).item()}\n")

    metrics.Recorder.record = drawn  # type: ignore[method-assign]


def fail_to_read(within: str) -> None:
    """Let the file system fail once, when a file is hashed."""
    plain, seen = integrity.sha256_file, []

    def failing(path: Path) -> str:
        if within in str(path) and not seen:
            seen.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path)

    integrity.sha256_file = failing


def inject(site: str, step: int) -> None:
    """Let a number go wrong at a step: the `step`-th that this process measures."""
    calls, wrap, measure, apply, decide = [0], optim.wrap, optim.measure, optim.apply, loop.decide

    def remembered(*args: Any) -> Any:
        CHUNKS[:] = [wrap(*args)]
        return CHUNKS[0]

    def measured(optimizer: Any) -> Any:
        calls[0] += 1
        if calls[0] == step and site == "device":
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        if calls[0] == step and site in ("gradient nan", "gradient inf"):
            CHUNKS[0][0].buffers[0].grad_data.fill_(torch.nan if site == "gradient nan" else torch.inf)
        return measure(optimizer)

    def decided(judge: Any, loss: float, *more: Any) -> Any:
        wrong = {"loss nan": torch.nan, "loss spike": 1e4}
        return decide(judge, wrong.get(site, loss) if calls[0] == step else loss, *more)

    def applied(optimizer: Any, *more: Any) -> None:
        apply(optimizer, *more)
        if calls[0] == step and site == "weights nan":
            with torch.no_grad():
                next(CHUNKS[0][0].parameters()).view(-1)[0] = torch.nan
                optimizer.param_groups[0]["params"][0].view(-1)[0] = torch.nan

    optim.wrap, optim.measure, optim.apply, loop.decide = remembered, measured, applied, decided  # type: ignore[assignment]


CHUNKS: list[Any] = []


def hang_at(step: int) -> None:
    """Let this rank sleep in its data at a step."""
    from megatron_prism.data import loader

    batches = loader.batches

    def sleepy(*args: Any, **kwargs: Any) -> Any:
        for number, batch in enumerate(batches(*args, **kwargs), start=1):
            if number == step:
                time.sleep(3600)
            yield batch

    loader.batches = sleepy  # type: ignore[assignment]


def play_a_device() -> None:
    """Let Megatron-Core's optimizer that is offloaded in part run where there is no device: what it would leave there stays in bf16, here."""
    from megatron.core.optimizer import optimizer_config
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    def split(self: Any, fraction: float) -> tuple[Any, ...]:
        """Do what HybridDeviceOptimizer._get_sub_optimizer_param_groups does with CUDA tensors."""
        on_host, on_device, copies, originals, masters = [], [], {}, {}, {}
        left = fraction * sum(parameter.numel() for group in self.param_groups for parameter in group["params"])
        for group in self.param_groups:
            halves: dict[bool, list[Any]] = {True: [], False: []}
            for parameter in group["params"]:
                master, is_offloaded = parameter.detach().clone().float(), left > 0
                masters[parameter] = master
                if is_offloaded:
                    left -= parameter.numel()
                    copies[parameter], originals[master] = master, parameter
                halves[is_offloaded].append(master)
            on_host += [{**group, "params": halves[True]}] if halves[True] else []
            on_device += [{**group, "params": halves[False]}] if halves[False] else []
        return on_host, on_device, copies, originals, masters

    begin = HybridDeviceOptimizer.__init__
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = split
    HybridDeviceOptimizer.__init__ = lambda self, *args, **more: begin(
        self, *args, **{**more, "pin_cpu_grads": False, "pin_cpu_params": False}
    )
    optimizer_config.is_te_min_version = lambda *args, **more: True  # type: ignore[assignment]
    train.check_machine = lambda *args: []  # type: ignore[assignment]


def take_transformer_engines_adam(loads_copies: bool, fp8_recipe: str | None) -> None:
    """Let the optimizer be Transformer Engine's FusedAdam (tests/te/fused_adam.py).

    loads_copies: load into what Megatron-Core would. fp8_recipe: of which the optimizer is told; under tensorwise Megatron-Core holds the main weights.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "te"))
    import fused_adam

    fused_adam.install()
    if loads_copies:
        optimizer_state._held = lambda part, parameter: {  # type: ignore[assignment]
            name: values for name, values in part._get_main_param_and_optimizer_states(parameter).items() if name != "step"
        }
    if fp8_recipe is not None:
        import megatron.core.optimizer as optimizers

        told = optimizers.OptimizerConfig
        optimizers.OptimizerConfig = lambda **fields: told(**{**fields, "fp8_recipe": fp8_recipe})  # type: ignore[misc,assignment]


def train_in_child(case: dict[str, Any], stderr: Path) -> None:
    os.setsid()
    handle = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    log.setup()
    if case.get("fault"):
        build_in(case["fault"])
    code = 0
    try:
        train.run(train.resolve(build(case["config"], TrainConfig, str), 1))
    except PrismError as error:
        print(f"prism: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def run_cases(cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run the cases in children of this process, as many at a time as there are processors."""
    results: dict[str, Any] = {}
    running: dict[int, tuple[int, float]] = {}  # (case, start) by process
    waiting = list(range(len(cases)))
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            number = waiting.pop(0)
            child = os.fork()
            if child == 0:
                train_in_child(cases[number], folder / f"{number}.txt")
            running[child] = number, time.monotonic()
        for child, (number, started) in list(running.items()):
            if time.monotonic() - started > TIMEOUT_S:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[child]
                found = {"code": os.waitstatus_to_exitcode(status), "stderr": (folder / f"{number}.txt").read_text()}
                results[cases[number]["name"]] = {**found, "run_dir": cases[number]["run_dir"], "seconds": time.monotonic() - started}
        time.sleep(0.01)
    return results


def main(folder: Path) -> None:
    host.install()
    for name in (
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron.core.models.gpt",
        "torch.utils.tensorboard",
        "torch._dynamo",
    ):
        importlib.import_module(name)  # once, not in each child

    cases = json.loads((folder / "cases.json").read_text())
    (folder / "results.json").write_text(json.dumps(run_cases(cases, folder)))


def rank(config: Path, fault: dict[str, Any]) -> None:
    from megatron_prism import cli

    build_in(fault)
    sys.argv = ["prism", "train", str(config)]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1] == "--gang":
        sys.exit(launch.start_gang(int(sys.argv[2]), [__file__, "--rank", *sys.argv[3:]]))
    if sys.argv[1] == "--rank":
        rank(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
