"""A gang of ranks: what one is told when its peer is gone (gloo raises nothing narrower than RuntimeError), and the determinism it asks for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.parallel import groups, hardware, host

RANKS = """
import json, os, signal, sys, time
import torch
import torch.distributed as dist
from megatron_prism.parallel import groups

os.environ.update(RANK=sys.argv[1], WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], GLOO_SOCKET_IFNAME="lo")
groups.join(timeout_s=30.0)
pending = dist.all_reduce(torch.ones(2), async_op=True) if sys.argv[1] == "0" else None  # rank 1 never answers it
if sys.argv[1] == "1":
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
tensor = torch.ones(2)
CALLS = {
    "a wait of its own": lambda: pending.wait(),
    "all_reduce": lambda: dist.all_reduce(tensor),
    "broadcast": lambda: dist.broadcast(tensor, src=1),
    "barrier": lambda: groups.barrier(),
    "gather_object": lambda: dist.gather_object(1, [None, None], dst=0),
    "all_gather_object": lambda: groups.gather(1),
    "broadcast_object_list": lambda: dist.broadcast_object_list([None], src=1),
    "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.ones(1), tensor),
    "recv": lambda: dist.recv(tensor, 1),
    "isend, waited for": lambda: dist.isend(tensor, 1).wait(),
    "several at once": lambda: [each.wait() for each in dist.batch_isend_irecv([dist.P2POp(dist.irecv, tensor, 1)])],
    "shapes": lambda: tensor @ torch.ones(3),
    "shapes, in torch": lambda: torch.nn.Linear(3, 1)(tensor),
    "words": lambda: int("gloo"),
}
told = {}
for name, call in CALLS.items():
    try:
        call()
    except Exception as error:
        told[name] = groups.is_silence(error)
print(json.dumps(told), flush=True)
os._exit(0)
"""


def test_a_peer_that_is_gone_is_told_from_other_errors() -> None:
    if host.has_cuda():
        pytest.skip("gloo computes on a host alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, rank, port], stdout=subprocess.PIPE, text=True) for rank in ("0", "1")]
    told = json.loads(ranks[0].communicate(timeout=120)[0])
    ranks[1].communicate(timeout=60)
    silences = {name: name not in ("shapes", "shapes, in torch", "words") for name in told}
    assert len(told) == 14 and told == silences


def test_determinism_is_the_gangs_and_ends_with_it() -> None:
    gang = """
import torch
from megatron_prism.core.config import GangConfig
from megatron_prism.parallel import groups

for deterministic in (False, True):
    with groups.gang(GangConfig(deterministic=deterministic)):
        print(torch.are_deterministic_algorithms_enabled())
    print(torch.are_deterministic_algorithms_enabled())
"""
    done = subprocess.run([sys.executable, "-c", gang], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False", "True", "False"], done.stderr


@pytest.mark.parametrize("named", ["0", "0,1,2,3", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"])
def test_a_rank_that_was_given_gpus_and_sees_none_does_not_join_on_the_cpu(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead driver, a container without GPUs, a torch for CPUs: the run would go on there in silence, or its peers would wait for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    for looks in (groups.join, hardware.read):  # the latter first in a run: it would call fp8 a mistake of the config
        with pytest.raises(EnvironmentFault, match=f"CUDA_VISIBLE_DEVICES={named} on .*sees no CUDA device.*export CUDA_VISIBLE_DEVICES="):
            looks()


@pytest.mark.parametrize("named", [None, "", " ", "-1", "NoDevFiles"])
def test_a_rank_that_was_given_none_computes_on_the_cpu(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    host.require_named_devices()  # raises nothing
    assert host.device() == torch.device("cpu")
