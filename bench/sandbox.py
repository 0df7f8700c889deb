"""Milliseconds that the sandbox adds to a run of Python: `print(1)` contained, against the same interpreter bare.

Run: python bench/sandbox.py [--rounds N]
The sides alternate. Wall time: run it on a quiet machine; the load is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time

from megatron_prism.grade.sandbox import choose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    sandbox = choose.choose()
    bare_ms, contained_ms = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sandbox.interpreter.program, "-I", "-S", "-c", "print(1)"], capture_output=True, check=True, env={})
        between = time.perf_counter()
        if sandbox.run("print(1)").stdout != b"1\n":
            raise SystemExit("the sandbox did not run a plain program")
        bare_ms.append(1e3 * (between - began))
        contained_ms.append(1e3 * (time.perf_counter() - between))
    bare, contained = statistics.median(bare_ms), statistics.median(contained_ms)
    figures = {"bench": "sandbox", "backend": sandbox.backend.name, "rounds": rounds, "load": os.getloadavg()[0], "bare_ms": bare}
    print(json.dumps({**figures, "contained_ms": contained, "overhead_ms": contained - bare}))


if __name__ == "__main__":
    main()
