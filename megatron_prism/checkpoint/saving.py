"""Saving a checkpoint: Megatron-Core plans it, child processes write it, then it is sealed and renamed into place.

Every rank of the gang holds one Saving of a checkpoint. All ranks call the same methods in the same order.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from megatron_prism.checkpoint import folder, frozen, integrity, run_folder, sharded, writers
from megatron_prism.core import disk, log
from megatron_prism.core.config import SaveConfig
from megatron_prism.core.defect import is_defect
from megatron_prism.core.errors import CheckpointError, EnvironmentFault, PrismError, Problem
from megatron_prism.parallel import groups, megatron_versions
from megatron_prism.parallel.groups import Groups

RESERVE_BYTES = 64 << 20  # beside the tensors: names, tokenizer, file system
FILES_PER_RANK = 1  # the ranks of a node write side by side


class Contents(Protocol):
    """What a checkpoint holds beside its tensors (run_folder.Contents)."""

    def write(self, path: Path, step: int, facts: Mapping[str, Any]) -> None:
        """Add it to the checkpoint of a step: rank 0 alone."""


class Saver:
    """Writes a run's checkpoints, one at a time, and keeps as many as the config says (train/loop.py calls it)."""

    def __init__(
        self,
        run_dir: Path,
        config: SaveConfig,
        contents: Contents,
        chunks: Sequence[Any],
        optimizer: Any,
        groups: Groups,
        beside: sharded.Beside | None = None,
    ):
        self.longest_s, self.num_rewinds, self._beside = 0.0, 0, beside
        self._run_dir, self._config, self._contents = run_dir, config, contents
        self._chunks, self._optimizer, self._groups = chunks, optimizer, groups
        self._saving: Saving | None = None
        self._removals: list[threading.Thread] = []

    def begin(self, step: int, facts: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of this step; `facts` are kept with it."""
        assert self._saving is None
        self._began = time.monotonic()
        for removal in self._removals:  # of the save before, long done as a rule: its room may be what this one needs
            removal.join()
        state = sharded.training_state(self._chunks, self._optimizer, self._groups, is_loading=False, beside=self._beside)
        state = frozen.in_full(state, self._chunks)
        write_contents = partial(self._contents.write, step=step, facts=dict(facts))
        self._saving = Saving(run_folder.step_folder(self._run_dir, step), state, write_contents, self._config.timeout_s)

    def is_saving(self) -> bool:
        """Say whether a save was begun and is not finished."""
        return self._saving is not None

    def is_writing(self) -> bool:
        """Say whether this rank's child processes still write it."""
        return self._saving is not None and self._saving.is_writing()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, make it the newest, and remove those that are no longer kept.

        Raises: EnvironmentFault on every rank where one of them could not write.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.finish()
        self.longest_s = max(self.longest_s, time.monotonic() - self._began)
        if dist.get_rank() == 0:
            log.get().info("saved %s in %.1f s", saving.target, time.monotonic() - self._began)
            self._remove(run_folder.prune(self._run_dir, self._config.keep_last, self._config.keep_every))

    def _remove(self, paths: list[Path]) -> None:
        """Remove checkpoints that were moved away, in threads: a file system may be slow, and training goes on."""
        self._removals = [removal for removal in self._removals if removal.is_alive()]
        for path in paths:
            self._removals.append(threading.Thread(target=run_folder.remove, args=(path,), name=f"remove {path.name}"))
            self._removals[-1].start()

    def rewind(self) -> int | None:
        """Bring the run back to its newest whole checkpoint; return its step, None where there is none."""
        assert self._saving is None
        path = newest_whole(self._run_dir)
        if path is None:
            return None
        self.num_rewinds += 1
        sharded.load_training(path, self._chunks, self._optimizer, self._groups, self._beside)
        return folder.read(path).step

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._saving is not None:  # the run ends with an error
            self._saving.abandon()
        for removal in self._removals:
            removal.join()


def newest_whole(run_dir: Path) -> Path | None:
    """Return a run's newest whole checkpoint, None where it has none at all; every rank of the gang calls this.

    Damaged checkpoints after it are named in the log and moved aside.
    Raises: CheckpointError where there are checkpoints, and none is whole.
    """
    damaged: dict[Path, list[Problem]] = {}
    for path in reversed(groups.from_first(list(run_folder.checkpoints(run_dir).values()))):
        problems = sharded.check(path) or groups.from_first(_misplaced(path))
        if not problems:
            if dist.get_rank() == 0:
                for bad, reasons in damaged.items():
                    log.get().warning("%s", "\n".join(map(str, reasons)))
                    log.get().warning("%s is damaged, and now %s; going on from %s", bad, run_folder.set_aside(bad).name, path.name)
            groups.barrier()
            return path
        damaged[path] = problems
    if damaged:
        raise CheckpointError([problem for problems in damaged.values() for problem in problems]).agreed()
    return None


def _misplaced(path: Path) -> list[Problem]:
    """Return what is wrong where a whole checkpoint is another step's than its folder says."""
    try:
        step = folder.read(path).step
    except CheckpointError as error:
        return list(error.problems)
    found, wanted = f"the checkpoint of step {step}", run_folder.step_folder(path.parent.parent, step).name
    return [] if path.name == wanted else [Problem(str(path), found, f"a folder named {wanted}", "it was renamed or copied")]


class Saving:
    """A checkpoint that is being written. Constructing it begins the save of Megatron's sharded `state` as it is at that moment.

    write_contents: adds what is no tensor to the folder once the tensors are in it; rank 0 calls it.
    Raises: InputError where `target` is there already. EnvironmentFault where it does not fit on the disk or cannot be written.
    """

    def __init__(self, target: Path, state: Mapping[str, Any], write_contents: Callable[[Path], None], timeout_s: float):
        self.target, self._write_contents = target, write_contents
        part = groups.from_first(secrets.token_hex(4))  # random, so a writer left over from a crashed start cannot write here
        self._temporary = target.with_name(f".{target.name}.{part}.tmp")
        self._is_first = dist.get_rank() == 0
        with _faults_named(self._temporary, self._clean):
            if self._is_first:
                folder.refuse_existing(target)
                (self._temporary / folder.STATE).mkdir(parents=True)
            groups.barrier()
            disk.await_path(self._temporary / folder.STATE)
            request = _plan(state, self._temporary / folder.STATE)
            self._check_space(writers.num_bytes(request))
            self._writers = writers.Writers(request, timeout_s)

    def _check_space(self, num_bytes: int) -> None:
        needed = groups.total(num_bytes) + RESERVE_BYTES
        free = shutil.disk_usage(self._temporary).free
        if groups.agree([self._is_first and free < needed])[0]:
            self._clean()
            found = f"{self._temporary.parent}: {free / 2**30:.2f} GiB are free, and the checkpoint {self.target.name} takes {needed / 2**30:.2f} GiB"
            fault = f"{found}: no space left on device; free some, or lower save.keep_last; earlier checkpoints are whole"
            raise EnvironmentFault(fault).agreed()

    def is_writing(self) -> bool:
        """Say whether this rank's files are still being written."""
        return self._writers.poll()

    def finish(self) -> None:
        """Wait for every rank's files, seal the folder and rename it into place.

        Raises: EnvironmentFault on every rank where one of them could not write; nothing stays behind.
        """
        while self._writers.poll(wait_s=0.2):
            pass
        failures = [failure for failure in groups.gather(self._writers.failure) if failure]
        if failures:
            self.abandon()
            raise EnvironmentFault(f"{failures[0]}; {self.target.name} was not saved; earlier checkpoints are whole").agreed()
        with _faults_named(self._temporary, self._clean):
            self._writers.finalize()
            sums = groups.gather({f"{folder.STATE}/{name}": value for name, value in self._writers.sums.items()})
            if self._is_first:
                self._write_contents(self._temporary)
                integrity.seal(self._temporary, {path: value for part in sums for path, value in part.items()})
                folder.publish(self._temporary, self.target)
                folder.point_latest(self.target.parent, self.target.name)
            groups.barrier()

    def abandon(self) -> None:
        """Stop writing, and remove what was written."""
        self._writers.kill()
        self._clean()

    def _clean(self) -> None:
        if self._is_first:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _plan(state: Mapping[str, Any], path: Path) -> Any:
    """Return Megatron-Core's AsyncRequest: what this rank writes where, and how the checkpoint is finished."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    megatron_versions.write_results_in_memory()
    wanted = dict(state)
    apply_factories(wanted)
    for shard in nested_values(wanted):
        if isinstance(shard, ShardedTensor):
            shard.data = writers.uncopied(shard.data)
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=FILES_PER_RANK)
    if dist.get_world_size(replicas := groups.replica_group()) > 1:  # each writes a part of what all of them hold
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    return dist_checkpointing.save(wanted, str(path), strategy, async_sharded_save=True, **megatron_versions.save_arguments())


@contextmanager
def _faults_named(path: Path, clean: Callable[[], None]) -> Iterator[None]:
    """Turn whatever Megatron, torch and the file system raise while a checkpoint is written into one error that names the folder."""
    try:
        yield
    except (PrismError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        # before cleaning up: the disk's state is part of the message
        told = groups.silence(error) if groups.is_silence(error) else writers.describe(path, error)
        clean()
        if is_defect(error):
            raise
        raise EnvironmentFault(f"{told}; the checkpoint was not saved; earlier ones are whole") from error
