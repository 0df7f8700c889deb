"""A torchrun gang whose ranks are forked from one process that has imported what they need: gang.py NUM_PROCESSES WORKER FOLDER.

Each rank runs the worker's main(FOLDER). With CUDA, which no fork may inherit, the ranks start one by one as `prism train --nproc` starts them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=f"prism{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="fork",
    )
    elastic_launch(config, module.main)(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
