"""Where gloo would listen on the loopback while ranks of other machines wait, it gets the interface of the route to them."""

from __future__ import annotations

import socket

import psutil
import pytest

from megatron_prism.parallel import interface

TWO_MACHINES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
ADDRESSES = {"lo": "127.0.0.1", "ib0": "10.9.0.7", "eth0": "10.1.0.7"}
ROUTES = {"gpu007": "127.0.1.1", "gpu001": "10.9.0.7", interface.ELSEWHERE: "10.1.0.7"}  # from gpu007: the own address towards each


class Probe:
    """A socket that is only asked for the route that it would take."""

    def __init__(self, *_: object) -> None:
        self.own = ""

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None: ...

    def connect(self, address: tuple[str, int]) -> None:
        self.own = ROUTES[address[0]]

    def getsockname(self) -> tuple[str, int]:
        return self.own, 0


@pytest.fixture
def gpu007(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make this a machine whose name stands for 127.0.1.1, as Debian's installer has it."""
    for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(interface.VARIABLE, "")
    monkeypatch.delenv(interface.VARIABLE)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu007")
    monkeypatch.setattr(socket, "gethostbyname", lambda host: ROUTES[host])
    monkeypatch.setattr(socket, "socket", Probe)
    entry = type("Entry", (), {})
    made = {name: [entry()] for name in ADDRESSES}
    for name, (each,) in made.items():
        each.address = ADDRESSES[name]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: made)
    return monkeypatch


def chosen(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    interface.set_for_gloo()
    return interface.os.environ.get(interface.VARIABLE)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({**TWO_MACHINES, "MASTER_ADDR": "gpu001"}, "ib0"),
        ({**TWO_MACHINES, "MASTER_ADDR": "gpu007"}, "eth0"),  # the first machine reaches itself by the loopback
        ({"SLURM_STEP_NUM_NODES": "2", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu001"}, "ib0"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu001"}, None),
        ({**TWO_MACHINES, "MASTER_ADDR": "gpu001", interface.VARIABLE: "bond0"}, "bond0"),
    ],
)
def test_the_interface_of_a_machine_that_calls_itself_loopback(
    environment: dict[str, str], wanted: str | None, gpu007: pytest.MonkeyPatch
) -> None:
    assert chosen(environment, gpu007) == wanted


def test_a_machine_with_a_reachable_name_is_left_alone(gpu007: pytest.MonkeyPatch) -> None:
    gpu007.setattr(socket, "gethostbyname", lambda host: "10.1.0.7")
    assert chosen({**TWO_MACHINES, "MASTER_ADDR": "gpu001"}, gpu007) is None


def test_the_route_is_asked_of_this_machine_itself() -> None:
    assert interface.towards("127.0.0.1") is None
    assert interface.towards(interface.ELSEWHERE) in {None, *psutil.net_if_addrs()}
