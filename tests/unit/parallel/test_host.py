"""The CPU that stands in for CUDA: in processes of their own, since it changes torch for as long as a process lives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys
import torch
from megatron_prism.parallel import host

compiled = torch.compile
found = {"before": "megatron.core" in sys.modules}
host.install()
host.install()
found["after"] = "megatron.core" in sys.modules
found["compile restored"] = torch.compile is compiled

weight = torch.ones(2, device="cuda", requires_grad=True)
placed = {
    "literal": weight,
    "device object": torch.zeros(2, device=torch.device("cuda", 0)),
    "current device": torch.zeros(2, device=torch.cuda.current_device()),
    "to": torch.zeros(2).to("cuda:0"),
    "to keyword": torch.zeros(2).to(device="cuda", dtype=torch.float64),
    "cuda()": torch.zeros(2).cuda(),
    "pinned": torch.zeros(2, pin_memory=True).pin_memory(),
    "module": torch.nn.Linear(2, 2).to("cuda").weight,
}
found["devices"] = {name: str(tensor.device) for name, tensor in placed.items()}
found["dtype kept"] = str(placed["to keyword"].dtype)
found["told the truth"] = [torch.cuda.is_available(), host.has_cuda(), str(host.device()), host.device_name()]

from megatron.core.tensor_parallel import checkpoint, model_parallel_cuda_manual_seed, get_cuda_rng_tracker
from megatron.core import parallel_state
import os
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(7)

seen = []
def layer(x):
    noise = torch.rand(2, device="cuda")
    seen.append((str(noise.device), noise.tolist()))
    return (x * weight * noise).sum()

output = checkpoint(layer, False, torch.full((2,), 3.0, device="cuda", requires_grad=True))
output.backward()
found["recompute"] = {"runs": seen, "gradient": weight.grad.tolist()}
state = torch.get_rng_state()
with get_cuda_rng_tracker().fork():
    torch.rand(3, device="cuda")
found["tracker leaves the host's generator"] = torch.equal(state, torch.get_rng_state())
torch.manual_seed(3); first = torch.rand(2, device="cuda").tolist()
torch.manual_seed(3)
found["seeded"] = first == torch.rand(2).tolist()
print(json.dumps(found))
"""
LATE = """
import megatron.core
from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.parallel import host
try:
    host.install()
except EnvironmentFault as error:
    print(error)
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict:
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA is here: nothing stands in for it")
    return json.loads(python(PROBE))


def test_megatron_is_imported_by_install_and_not_before(found: dict) -> None:
    assert (found["before"], found["after"]) == (False, True)


def test_every_way_to_name_cuda_lands_on_the_host(found: dict) -> None:
    assert set(found["devices"].values()) == {"cpu"} and len(found["devices"]) == 8
    assert found["dtype kept"] == "torch.float64"


def test_code_that_asks_is_told_the_truth(found: dict) -> None:
    assert found["told the truth"] == [False, False, "cpu", "cpu"]


def test_torch_compile_is_put_back(found: dict) -> None:
    assert found["compile restored"] is True


def test_backward_with_recompute_stays_on_the_host_and_draws_the_same(found: dict) -> None:
    (device, noise), (again, same) = found["recompute"]["runs"]
    assert (device, again) == ("cpu", "cpu") and noise == same
    assert found["recompute"]["gradient"] == pytest.approx([3 * value for value in noise], rel=1e-6)


def test_generators_are_the_hosts(found: dict) -> None:
    assert found["seeded"] is True and found["tracker leaves the host's generator"] is True


def test_install_after_megatron_is_refused(found: dict) -> None:
    assert "megatron.core was imported before" in python(LATE)
