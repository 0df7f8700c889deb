"""One rank's files of a checkpoint, each written by a process forked for it, while training goes on.

Megatron-Core plans a save and says what goes where (its AsyncRequest); its own writers, though, wait for ever for a process that was
killed. These are watched: one that dies, fails or takes too long is an error, and the others end with it.
On a host the fork is the snapshot (pages are copied as training changes them); from a GPU the tensors are copied to the host before it,
into pinned memory, which a forked process shares: those copies are held until they are written.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from megatron_prism.core import disk

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PART_BYTES = 4 << 20
FULL_BYTES = 1 << 20  # a writer that does not say why it failed, beside so little room, failed for want of it


class Writers:
    """The processes that write this rank's files. failure: what went wrong; sums: the sha256 of each file by its name, once they are done."""

    def __init__(self, request: Any, timeout_s: float):
        self.failure: str | None = None
        self.sums: dict[str, str] = {}
        self._request, self._timeout_s, self._started = request, timeout_s, time.monotonic()
        self._written: dict[int, list[Any]] = {}
        self._running: dict[int, tuple[Any, Connection, Path]] = {}
        self._staged = request.preload_fn() if request.preload_fn is not None else []  # from the device to the host
        context, collects = multiprocessing.get_context("fork"), gc.isenabled()
        gc.disable()  # a collection in the child would free CUDA tensors of the parent
        try:
            for number, bucket in enumerate(self._staged):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_write, args=(request.async_fn.args[0], number, bucket, theirs), daemon=True)
                process.start()
                theirs.close()
                self._running[number] = process, ours, Path(bucket[0])
        finally:
            if collects:
                gc.enable()

    def poll(self, wait_s: float = 0.0) -> bool:
        """Take in what the processes have said, waiting for at most wait_s; say whether any is still at work."""
        if self._running and wait([pipe for _, pipe, _ in self._running.values()], timeout=wait_s):
            for number, (process, pipe, path) in list(self._running.items()):
                if self.failure is None and pipe.poll():
                    self._take(number, process, pipe, path)
        if self._running and time.monotonic() - self._started > self._timeout_s:
            self._fail(f"{next(iter(self._running.values()))[2]}: not written after {self._timeout_s:g} s (save.timeout_s)")
        if not self._running:
            self._staged = []
        return bool(self._running)

    def _take(self, number: int, process: Any, pipe: Connection, path: Path) -> None:
        try:
            failure, results, sha256 = pipe.recv()  # it ends of itself, and is waited for when the next one starts
        except EOFError:  # it died without a word
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
        """End the processes that are still at work."""
        for process, pipe, _ in self._running.values():
            process.kill()
            process.join()
            pipe.close()
        self._running.clear()
        self._staged = []

    def finalize(self) -> None:
        """Let Megatron-Core finish the checkpoint with what was written; every rank calls this, when all are done on all ranks."""
        _, _, results = self._request.async_fn_args or (None, None, None)
        if results is not None:
            results.put(self._written)
        for finalize in self._request.finalize_fns:
            finalize()


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _write(transforms: Any, number: int, bucket: Any, pipe: Connection) -> None:
    """Write one file, in a process of its own; say (failure, write results, sha256) through the pipe."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    _end_with(os.getppid())
    torch.set_num_threads(1)  # the parent's OpenMP threads are not here, and would be waited for
    torch.serialization.set_crc32_options(False)  # nobody reads the archives' checksums; the sha256 stands for all
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
                _, found = results.get()
            finally:
                is_written.set()
            if isinstance(found, Exception):
                raise found
            disk.sync([path])
            pipe.send((None, found, hashed.result()))
    except Exception as error:
        pipe.send((describe(path, error), None, None))


def _end_with(parent: int) -> None:
    """Let this process end when its rank does, however that ends: nobody would seal what it writes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before that
            os._exit(1)


def _sha256_behind(path: Path, is_written: threading.Event) -> str:
    """Return the sha256 of a file that is being written, read close behind the writer: both then take little longer than the slower."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while True:
            ended = is_written.is_set()  # before the read: what comes after it has nothing behind it
            if part := stream.read(PART_BYTES):
                digest.update(part)
            elif ended:
                return digest.hexdigest()
            else:
                time.sleep(0.002)


def uncopied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a host tensor over the same memory, with a storage of its own size.

    Megatron-Core copies a view of something larger (all weights are views of their buffer) before it is written; the fork is copy enough,
    but for memory that a forked process shares.
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
    """Say why a file or folder could not be written: torch's archive writer hides a full disk behind an assertion of its own."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    codes = [link.errno for link in chain if isinstance(link, OSError) and link.errno]
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.is_dir())).free
    if set(codes) & FULL or (free < FULL_BYTES and not codes):
        return f"{path}: no space left on device ({free / 2**20:.0f} MiB are free there)"
    said = os.strerror(codes[0]) if codes else " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{path}: {said}"
