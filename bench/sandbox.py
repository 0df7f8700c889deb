"""What the sandbox costs: a program of one line in each backend beside the same interpreter alone, and programs a second with four at once.

Run: python -m bench.sandbox [--rounds N] [--at-once N]
Sides alternate within a round, and the order turns. CPU-milliseconds are of this process and of all its children (getrusage), in steps of the kernel's
clock where it counts by ticks; wall time says little on a busy machine, so its smallest and median stand with the load average.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from megatron_prism.grade.sandbox import backend, choose
from megatron_prism.grade.sandbox.sandbox import Sandbox

PROGRAM = "print(int(input()) + 1)"


def cpu_ms() -> float:
    """Return the CPU-milliseconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return 1000 * sum(one.ru_utime + one.ru_stime for one in used)


def sandboxes() -> dict[str, Sandbox]:
    """Return a sandbox of each backend that holds on this machine."""
    held = {}
    for one in backend.candidates():
        name = "landlock" if not one.bwrap else "bubblewrap as nobody" if one.drops_uid and os.getuid() == 0 else "bubblewrap"
        if name not in held and choose.probe(one).holds:
            held[name] = Sandbox(backend=one)
    return held


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=4)
    arguments = parser.parse_args()
    held = sandboxes()
    program = str(backend.interpreter().program)

    def alone() -> None:
        subprocess.run([program, "-I", "-S", "-B", "-c", PROGRAM], input=b"41", capture_output=True, env={}, check=True)

    def contained(sandbox: Sandbox) -> Callable[[], None]:
        def run() -> None:
            result = sandbox.run(PROGRAM, "41")
            assert result.stdout == b"42\n", result

        return run

    sides = {"alone": alone} | {name: contained(sandbox) for name, sandbox in held.items()}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            before, start = cpu_ms(), time.perf_counter()
            sides[name]()
            wall[name].append(1000 * (time.perf_counter() - start))
            cpu[name].append(cpu_ms() - before)
    rates = {}
    for name, sandbox in held.items():
        start = time.perf_counter()
        with ThreadPoolExecutor(arguments.at_once) as pool:
            assert all(
                result.stdout == b"42\n" for result in pool.map(lambda _, one=sandbox: one.run(PROGRAM, "41"), range(arguments.rounds))
            )
        rates[name] = arguments.rounds / (time.perf_counter() - start)
    print(f"{'':22}wall ms: min, p50   CPU-ms: p50, beyond alone   wall p50 beyond alone   programs/s, {arguments.at_once} at once")
    figures = {}
    for name in sides:
        beyond_cpu = statistics.median(one - bare for one, bare in zip(cpu[name], cpu["alone"], strict=True))
        beyond = statistics.median(one - bare for one, bare in zip(wall[name], wall["alone"], strict=True))
        figures[name] = {
            "wall_min_ms": round(min(wall[name]), 2),
            "wall_p50_ms": round(statistics.median(wall[name]), 2),
            "cpu_p50_ms": round(statistics.median(cpu[name]), 2),
            "overhead_cpu_p50_ms": round(beyond_cpu, 2),
            "overhead_wall_p50_ms": round(beyond, 2),
            "per_s": round(rates.get(name, 0.0), 1),
        }
        print(f"{name:22}" + "   ".join(f"{value:9}" for value in figures[name].values()))
    print(json.dumps({"rounds": arguments.rounds, "load": [round(one, 1) for one in os.getloadavg()], **figures}))


if __name__ == "__main__":
    main()
