"""The network interface on which gloo listens where a gang spans several machines.

gloo takes the address that the host's name stands for. Debian and Ubuntu write 127.0.1.1 for it into /etc/hosts: no other machine reaches that.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping

import psutil

from megatron_prism.core import log

VARIABLE = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"  # an address of no machine (RFC 5737): the route to it is the default one


def set_for_gloo() -> None:
    """Set gloo's interface where it would listen on the loopback while ranks of other machines wait. One that is exported stays."""
    if VARIABLE in os.environ or not spans_machines(os.environ) or not is_loopback(socket.gethostname()):
        return
    for destination in (os.environ.get("MASTER_ADDR", ELSEWHERE), ELSEWHERE):  # the first machine reaches its own name by the loopback
        if name := towards(destination):
            os.environ[VARIABLE] = name
            log.get().info("%s=%s: this machine's name, %s, stands for the loopback", VARIABLE, name, socket.gethostname())
            return
    log.get().warning(
        "this machine's name, %s, stands for the loopback: if the ranks do not meet, export %s", socket.gethostname(), VARIABLE
    )


def spans_machines(environment: Mapping[str, str]) -> bool:
    """Say whether a rank's gang has ranks on other machines: by torchrun's variables, else by srun's."""
    if local := environment.get("LOCAL_WORLD_SIZE"):
        return int(local) < int(environment.get("WORLD_SIZE", "1"))
    return int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1


def is_loopback(host: str) -> bool:
    """Say whether a name stands for the loopback, or for nothing, for which gloo takes the loopback."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return True


def towards(destination: str) -> str | None:
    """Return the interface by which this machine reaches an address, None where that is the loopback or there is no route. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, 9))
            own = probe.getsockname()[0]
    except OSError:
        return None
    named = (name for name, addresses in psutil.net_if_addrs().items() if own in {each.address for each in addresses})
    return None if ipaddress.ip_address(own).is_loopback else next(named, None)
