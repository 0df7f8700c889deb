"""One rank's files of a checkpoint, each written by a forked child process while training goes on.

Megatron-Core plans a save and says what goes where (its AsyncRequest). Its own writers wait for ever for a child that was killed; ours are
watched: a child that dies, fails or takes too long is an error, and the others are ended. A child inherits whatever locks the rank's other
threads (gloo's, NCCL's) held at the fork, and nobody there releases them. So each child first rehearses what it will do, and says that it is
ready. Training waits for that, and forks a child that does not answer again.
On a host the fork is the snapshot: pages are copied as training changes them. From a GPU the tensors are first copied into pinned host
memory, which a forked child shares, so those copies are held until they are written.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import hashlib
import io
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from megatron_prism.core import disk, log

LIMITS = {errno.EDQUOT: "your quota there is used up", errno.EFBIG: "see ulimit -f"}  # a disk with room says nothing of these
PART_BYTES = 4 << 20
READY_S, MAX_FORKS = 60.0, 3  # a child is ready in milliseconds
FULL_BYTES = 1 << 20  # a writer that fails without a reason, with less than this free, is taken to have found the disk full


class Writers:
    """The child processes that write this rank's files. failure: what went wrong. sums: once all are done, the sha256 of each file by name."""

    def __init__(self, request: Any, timeout_s: float):
        self.failure: str | None = None
        self.sums: dict[str, str] = {}
        self._request, self._timeout_s, self._started = request, timeout_s, time.monotonic()
        self._written: dict[int, list[Any]] = {}
        self._running: dict[int, tuple[Any, Connection, Path]] = {}
        self._staged = request.preload_fn() if request.preload_fn is not None else []  # from the device to the host
        collects = gc.isenabled()
        gc.disable()  # a collection in the child would free CUDA tensors of the parent
        try:
            for number, bucket in enumerate(self._staged):
                self._running[number] = *_forked(request.async_fn.args[0], number, bucket), Path(bucket[0])
        finally:
            if collects:
                gc.enable()

    def poll(self, wait_s: float = 0.0) -> bool:
        """Read the children's answers, waiting at most wait_s; say whether any child still writes."""
        if self._running and wait([pipe for _, pipe, _ in self._running.values()], timeout=wait_s):
            for number, (process, pipe, path) in list(self._running.items()):
                if self.failure is None and pipe.poll():
                    self._take(number, process, pipe, path)
        if self._running and time.monotonic() - self._started > self._timeout_s:
            for process, _, _ in self._running.values():
                _show_stack(process)
            self._fail(f"{next(iter(self._running.values()))[2]}: not written after {self._timeout_s:g} s (save.timeout_s)")
        if not self._running:
            self._staged = []
        return bool(self._running)

    def _take(self, number: int, process: Any, pipe: Connection, path: Path) -> None:
        try:
            failure, results, sha256 = pipe.recv()  # the child ends by itself, and is reaped when the next one starts
        except EOFError:  # the child died without an answer
            process.join()
            failure = f"{path}: its writer died ({_ending(process.exitcode)})"
        if failure is not None:
            return self._fail(failure)
        del self._running[number]
        self._written[number], self.sums[path.name] = results, sha256

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self.kill()

    def kill(self) -> None:
        """Kill the children that still write."""
        for process, pipe, _ in self._running.values():
            process.kill()
            process.join()
            pipe.close()
        self._running.clear()
        self._staged = []

    def finalize(self) -> None:
        """Let Megatron-Core write the checkpoint's metadata. Every rank calls this, once all ranks' children are done."""
        _, _, results = self._request.async_fn_args or (None, None, None)
        if results is not None:
            results.put(self._written)
        for finalize in self._request.finalize_fns:
            finalize()


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _forked(transforms: Any, number: int, bucket: Any) -> tuple[Any, Connection]:
    """Return a child process that is ready to write a file, and its pipe. A child that does not answer is killed, and another one forked.

    The last child is returned in any case: one that died or is stuck is found by poll().
    """
    context = multiprocessing.get_context("fork")
    for left in reversed(range(MAX_FORKS)):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(transforms, number, bucket, theirs), daemon=True)
        process.start()
        theirs.close()
        if ours.poll(READY_S):
            with suppress(EOFError):  # it died
                ours.recv()
            break
        log.get().warning("%s: its writer was not ready after %g s%s", bucket[0], READY_S, ", and is forked again" if left else "")
        if left:
            _show_stack(process)
            process.kill()
            process.join()
            ours.close()
    return process, ours


def _child(transforms: Any, number: int, bucket: Any, pipe: Connection) -> None:
    """Be a writer: prepare, rehearse, say so through the pipe, write."""
    _end_with(os.getppid())
    if sys.__stderr__ is not None:
        with suppress(OSError, ValueError):  # standard error is closed
            faulthandler.register(signal.SIGUSR2, file=sys.__stderr__)
    torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here, and torch would wait for them
    torch.serialization.set_crc32_options(False)  # nobody reads the archive's checksums: the sha256 covers all of it
    _rehearse()
    pipe.send("ready")
    _write(transforms, number, bucket, pipe)


def _rehearse() -> None:
    """Start a thread, and copy and write a tensor to memory: where a lock was inherited that nobody releases, this waits for ever."""
    with ThreadPoolExecutor(1) as pool:
        written = io.BytesIO()
        torch.save(torch.zeros(2)[:1].clone(), written)
        pool.submit(hashlib.sha256, written.getvalue()).result()


def _show_stack(process: Any) -> None:
    """Let a child that is stuck print the Python stack of its threads to standard error."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR2)
        time.sleep(0.5)


def _write(transforms: Any, number: int, bucket: Any, pipe: Connection) -> None:
    """Write one file in a child process; send (failure, write results, sha256) through the pipe."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    path = Path(bucket[0])
    results: queue.Queue[Any] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(number)
    is_written = threading.Event()
    try:
        path.touch()
        with ThreadPoolExecutor(1) as pool:
            hashed = pool.submit(_sha256_behind, path, is_written)
            try:
                FileSystemWriterAsync.write_preloaded_data(
                    transforms, local_proc_idx=number, write_bucket=bucket, results_queue=results, count_queue=count, use_fsync=False
                )
                _, written = results.get()
            finally:
                is_written.set()
            if isinstance(written, Exception):
                raise written
            disk.sync([path])
            pipe.send((None, written, hashed.result()))
    except Exception as error:
        pipe.send((describe(path, error), None, None))


def _end_with(parent: int) -> None:
    """Make this child end when its rank ends, however it ends: nobody would seal what it writes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the rank ended before prctl
            os._exit(1)


def _sha256_behind(path: Path, is_written: threading.Event) -> str:
    """Return the sha256 of a file that is being written, reading close behind the writer: writing and hashing overlap."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while True:
            ended = is_written.is_set()  # asked before the read: a file that had ended by then is read to its end
            if part := stream.read(PART_BYTES):
                digest.update(part)
            elif ended:
                return digest.hexdigest()
            else:
                time.sleep(0.002)


def uncopied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a host tensor over the same memory, with a storage of its own size.

    Megatron-Core copies a view of a larger storage (all weights are views of their buffer) before it is written. The fork is copy enough,
    except for memory that a forked child shares.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and (tensor.is_pinned() or tensor.is_shared()):
        return tensor.clone()
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor
    return torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def num_bytes(request: Any) -> int:
    """Return the bytes of the tensors that this rank writes."""
    buckets = request.async_fn_args[1] if request.async_fn_args else []
    return sum(tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors)


def describe(path: Path, error: BaseException) -> str:
    """Say why a file or folder could not be written. torch's archive writer reports a full disk as an assertion."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    codes = [link.errno for link in chain if isinstance(link, OSError) and link.errno]
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.is_dir())).free
    if errno.ENOSPC in codes or (free < FULL_BYTES and not codes):
        return f"{path}: no space left on device ({free / 2**20:.0f} MiB are free there)"
    said = os.strerror(codes[0]) if codes else " ".join(f"{type(error).__name__}: {error}".split())[:300]
    hint = f" ({LIMITS[codes[0]]})" if codes and codes[0] in LIMITS else ""
    return f"{path}: {said}{hint}"
