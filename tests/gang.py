"""A gang whose ranks are forked from one process that has imported what they need: gang.py NUM_PROCESSES WORKER FOLDER.

Each rank runs the worker's main(FOLDER); one that fails ends all. With CUDA, which no fork may inherit, the ranks start one by one as
`prism train --nproc` starts them.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from ranks import free_port  # this file's folder is the first on the path

from megatron_prism.parallel import host, launch


def main(num_processes: int, worker: Path, folder: Path) -> int:
    if host.has_cuda():
        return launch.start_gang(num_processes, [str(worker), str(folder)])
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    host.install()
    spec = importlib.util.spec_from_file_location(worker.stem, worker)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return fork(module.main, num_processes, folder)


def fork(main_of_rank: Callable[[Path], None], num_processes: int, folder: Path) -> int:
    """Fork the ranks and wait for them.

    Not from torchrun's agent: its threads look names up, and a lock that one of them holds in the C library stays locked in a rank that is
    forked at that moment.
    """
    size = str(num_processes)
    os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=be, args=(rank, main_of_rank, folder)) for rank in range(num_processes)]
    for rank in ranks:
        rank.start()
    alive = {rank.sentinel: rank for rank in ranks}
    while alive:
        for ended in wait(list(alive)):
            alive.pop(ended).join()  # type: ignore[call-overload]
        if any(rank.exitcode for rank in ranks):
            for rank in alive.values():
                rank.kill()
    return int(any(rank.exitcode for rank in ranks))


def be(rank: int, main_of_rank: Callable[[Path], None], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    main_of_rank(folder)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
