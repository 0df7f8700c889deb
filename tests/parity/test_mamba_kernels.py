"""models/ssd.py against the official Mamba-2 kernels, which Triton's interpreter runs on a CPU: tools/test_mamba_kernels.sh runs this.

Outputs, final states and the gradient of every input, relative by norm. Minutes, and packages that the host does without: opt-in.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("mamba_kernels_worker.py")
FP32, BF16 = 1e-5, 3e-2  # bf16: the kernels round between their steps, ours scans in fp32
SEEN = 1e-2  # what an option changes at least, where a case sets it
Case = dict[str, Any]

FROM_0, FROM_1 = [0, 0], [0, 1]  # the number of each row's first document: an initial state belongs to document 0 alone
LIMITED = {"length": 96, "z": True, "dt_limit": [0.05, 0.5], "D": "channel"}
CARRIED = {"length": 80, "initial": True}


def cases(kind: str, **by_name: Case) -> list[Case]:
    return [{"name": f"{kind}: {name.replace('_', ' ')}", "kind": kind, **case} for name, case in by_name.items()]


def packed_or_not(name: str, case: Case) -> dict[str, Case]:
    return {
        f"{name}, {groups} groups, {'packed' if first else 'one document'}": {"groups": groups, "first": first, **case}
        for groups, first in itertools.product((1, 2), (None, FROM_0))
    }


CASES = [
    *cases("scan", **packed_or_not("limited time step and gate", LIMITED), **packed_or_not("initial states", CARRIED)),
    *cases(
        "scan",
        no_first_document_0={"first": [1, 1]},
        one_row_without_document_0={"first": FROM_1, "initial": True, "z": True},
        a_row_shorter_than_a_chunk={"first": FROM_0, "length": 17, "initial": True, "z": True},
        one_token={"length": 1, "initial": True},
        bare={"D": None, "softplus": False},
        small_time_steps={"dt_bias": -7.0, "initial": True},
        bf16={"dtype": "bfloat16", "first": FROM_0, "z": True, "initial": True, "tolerance": BF16},
    ),
    *cases("split", **packed_or_not("as the mixer calls it", {})),
    *cases(
        "split", one_row_without_document_0={"first": FROM_1, "initial": True}, limited_time_step={"D": "channel", "dt_limit": [0.05, 0.5]}
    ),
    *cases(
        "norm", gate_first={"z": True}, gate_last={"z": True, "before_gate": True}, no_gate={}, one_group={"z": True, "by_group": False}
    ),
    *cases(
        "step",
        a_value_a_head={"z": True},
        a_value_a_channel={"tied": False},
        rows_of_a_cache={"rows": [3, 1]},
        padding={"rows": [3, -1, 1]},
    ),
    *cases("convolution", one_document={}, packed={"first": FROM_0}),
    *cases("convolution step", rows_of_a_cache={"rows": [3, 1]}, padding={"rows": [3, -1, 1]}),
]

absent = [name for name in ("triton", "mamba_ssm") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("PRISM_SSD_ORACLE") != "1" or bool(absent),
        reason=f"the official kernels take minutes (opt-in: PRISM_SSD_ORACLE=1; absent here: {', '.join(absent) or 'nothing'}): bash tools/test_mamba_kernels.sh",
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mamba_kernels")
    (folder / "cases.json").write_text(json.dumps(CASES))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(WORKER), str(folder)], env=environment, check=True, timeout=3600)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_ours_is_the_official_kernel(results: dict[str, Any], case: Case) -> None:
    found = results["cases"][case["name"]]
    assert not {name: error for name, error in found["errors"].items() if not error <= case.get("tolerance", FP32)}
    assert not {name: error for name, error in found["without"].items() if not error > SEEN}


def test_signatures_are_the_official_ones(results: dict[str, Any]) -> None:
    """Of what ours takes: names, defaults, and the places of what may be given by place."""
    assert not {function: parameters for function, parameters in results["signatures"].items() if parameters}
