"""The parts on a device, one test each; without one, the same programs tiny on the CPU, so that they cannot rot, and what the runner does with them.

`bash tools/gpu_check.sh` runs the parts without pytest, and says how fast it all was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import mcore, report, resume, runs, table, throughput, two_cudnns
from tests.gpu.__main__ import PARTS, Part, Runner
from tests.gpu.options import ROOT, Options

RUNNER = ["bash", "tools/gpu_check.sh"]
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def checks(tmp_path: Path, *arguments: str, timeout_s: float = 580.0) -> list[dict[str, Any]]:
    """Run the runner, and return its checks."""
    out = tmp_path / "gpu_check.json"
    command = [*RUNNER, "--out", str(out), "--work", str(tmp_path), *arguments]
    environment = {**os.environ, "PRISM_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert out.is_file(), done.stderr[-4000:]
    checked = json.loads(out.read_text())["checks"]
    assert done.returncode == any(check["ok"] is False for check in checked)
    assert all(f"| {check['check']} |" in out.with_suffix(".md").read_text() for check in checked)
    return checked


@needs_device
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", [part.name for part in PARTS])
def test_a_part_holds_on_this_device(tmp_path: Path, part: str) -> None:
    checked = checks(tmp_path, "--parts", part)
    assert checked and [check for check in checked if check["ok"] is False] == []


@pytest.mark.slow
def test_every_program_runs_tiny_on_a_cpu(tmp_path: Path) -> None:
    """What a part checks of a device alone it leaves out; where the data for the golden text is absent, that too."""
    named = [part.name for part in PARTS if part.name != "rl hybrid"]  # the slowest, and the program of rl dense
    checked = checks(tmp_path / "work", "--tiny", "--parts", *named)
    assert [check for check in checked if check["ok"] is False] == []
    assert {check["part"].split()[0] for check in checked if check["ok"]} == {part.program for part in PARTS} - {"two_cudnns"} | {
        "fixtures"
    }


def test_every_setting_is_a_config_that_is_accepted(tmp_path: Path) -> None:
    """What the matrix would train on a device passes every check that comes before a machine's."""
    from megatron_prism.core import layers, load
    from megatron_prism.core.config import TrainConfig
    from megatron_prism.jobs import train
    from tests.gpu import fixtures

    fixtures.main(tmp_path / "fixtures", sorted({family for family, _, _ in resume.SETTINGS.values()}))
    given = Options(tmp_path / "fixtures", tmp_path, tiny=False, data=tmp_path, group="")
    for name, (family, keys, _) in resume.SETTINGS.items():
        path = runs.config(given, resume.path_of(given, name), family, **keys)
        config = load.build(layers.merge(layers.config_layers(path, TrainConfig)), TrainConfig, str)
        assert train.resolve(config, 1).figures["microbatches"] == 2, name


def test_a_check_that_raises_fails_and_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    with report.check("part", "raises") as checked:
        checked.ok = True
        raise ValueError("a reason")
    with report.check("part", "figures") as checked:
        checked.ok, checked.figures = True, {"error": float("nan"), "many": [1 / 3]}
    with report.check("part", "left out") as checked:
        checked.skip("no device")
    output = "a library's line\n" + capfd.readouterr().out + '{"part": "cut'
    raised, plain, left_out = report.read(output)
    assert raised["ok"] is False and "a reason" in raised["figures"]["error"]
    assert plain["ok"] is True and plain["figures"] == {"error": "nan", "many": [0.3333]}
    assert left_out["ok"] is None and left_out["figures"] == {"skipped": "no device"}
    assert "| part | raises | **fails** |" in table.table({"device": "cpu"}, [raised, plain, left_out])


def test_an_import_hides_no_device() -> None:
    """A module that takes the devices away when it is imported would have a part measure the host, and say nothing."""
    programs = sorted({f"tests.gpu.{part.program}" for part in PARTS} | {"bench.generate"})
    code = f"import os; kept = dict(os.environ); import {', '.join(programs)}; assert os.environ == kept, set(os.environ.items()) ^ set(kept.items())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=runs.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]


def test_as_many_runs_train_at_once_as_the_processors_of_this_job_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an allocation, not of the node: 26 runs on 4 processors would all be too late."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "cpu_count", lambda: 224)
    assert Options(Path(), Path(), tiny=False, data=Path(), group="").num_at_once == 2


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    """Without it a misspelt part runs nothing, and the check holds."""
    command = [sys.executable, "-m", "tests.gpu", "--tiny", "--out", str(tmp_path / "out.json"), "--parts", "parity", "resumes"]
    done = subprocess.run(command, cwd=ROOT, env=runs.environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "resumes" in done.stderr and "two_cudnns" in done.stderr and not (tmp_path / "out.json").exists()


def test_a_part_that_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    (line,) = Runner(argparse.Namespace(tiny=True, data=tmp_path, budget_s=1.0), tmp_path).run(PARTS[0])
    assert line["part"] == PARTS[0].name and line["ok"] is None and "budget is spent" in line["figures"]["skipped"]


@pytest.mark.parametrize(
    ("program", "limit_s", "reason"),
    [("fixtures", 0.3, "stopped after 0 s"), ("no_such_part", 30.0, "exit code 1: ")],
)
def test_a_part_that_ends_badly_has_a_failed_check(tmp_path: Path, program: str, limit_s: float, reason: str) -> None:
    runner = Runner(argparse.Namespace(budget_s=60.0), tmp_path)
    (line,) = runner.start(Part(program, limit_s), [str(tmp_path / "new")], limit_s)
    assert line["ok"] is False and reason in line["figures"]["error"]


def test_a_site_folder_is_unpacked_entered_and_removed(tmp_path: Path) -> None:
    """unpack.sh is told where to; what enter.sh sets is there for the parts, before the repository on PYTHONPATH or behind it."""
    site = tmp_path / "the site"
    site.mkdir()
    (site / "unpack.sh").write_text('mkdir -p "$1" && echo "print(open(__file__).name)" > "$1/sitecustomize.py"\n')
    (site / "enter.sh").write_text("export PYTHONPATH=$1${PYTHONPATH:+:$PYTHONPATH}\n")
    environment = {**os.environ, "PRISM_PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), "--site", "the site", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    entered, *said = done.stdout.splitlines()
    assert done.returncode == 0 and said[0].startswith("usage: gpu_check.sh"), done.stderr
    assert entered.endswith("/site/sitecustomize.py") and not Path(entered).exists()


@pytest.mark.parametrize(
    ("code", "said", "loaded_from", "ok"),
    [
        (4, "prism: two cuDNNs are loaded: export CUDNN_HOME=/env/nvidia/cudnn, which", 2, True),
        (4, "prism: install flash-attn", 2, False),
        (0, "", 2, False),
        (0, "", 1, None),
        (70, "prism: export CUDNN_HOME=/env/nvidia/cudnn", 2, False),
    ],
)
def test_two_cudnns_are_judged(monkeypatch: pytest.MonkeyPatch, code: int, said: str, loaded_from: int, ok: bool | None) -> None:
    """Refused with exit code 4 and the cure holds; trained all the same fails, or is left out where there was one cuDNN."""
    noted = {"cudnn": {"version": "9.19.0", "loaded_from": ["/usr/local/cuda/lib64", "/env/nvidia/cudnn/lib"][:loaded_from]}}
    monkeypatch.setattr(two_cudnns, "train", lambda *args: (Path(), runs.Ended(code, "", said, 1.0)))
    monkeypatch.setattr(two_cudnns.runs, "kernels", lambda run_dir: noted)
    checked = report.Check()
    two_cudnns.refused(Options(Path(), Path(), tiny=False, data=Path(), group=""), checked, Path("/env/nvidia/cudnn"))
    assert checked.ok is ok, checked


@pytest.mark.parametrize(("kept_groups", "ratio", "ok"), [(1.0, 1.0, True), (0.0, None, False), (1.0, 1.01, False)])
def test_steps_that_train_on_nothing_fail(kept_groups: float, ratio: float | None, ok: bool) -> None:
    line = {"kept_groups": kept_groups, "ratio": ratio, "sampler_kl": 0.0, "rollout_tokens_per_s": 1.0}
    checked = report.Check()
    mcore.judge(checked, [line] * mcore.STEPS)
    assert checked.ok is ok


SIDES = {
    "ours": {"tokens_per_s": 120.0, "tflops": 71.0, "peak_gib": 10.4, "planned_gib": 10.0, "step_s": 1.0, "planned_step_s": 0.9},
    "ours+fp8": {"tokens_per_s": 160.0},
    "transformers": {"tokens_per_s": 100.0},
    "bare": {"tokens_per_s": 123.0},
    "matmul": {"tflops": 100.0},
}


@pytest.mark.parametrize(
    ("side", "changes", "fails"),
    [
        ("ours", {}, None),
        ("transformers", {"tokens_per_s": 105.0}, "dense: faster than transformers"),
        ("bare", {"tokens_per_s": 125.0}, "dense: as fast as a bare Megatron-Core loop"),
        ("matmul", {"tflops": 102.0}, "dense: of the matrix rate"),
        ("ours+fp8", {"tokens_per_s": 155.0}, "dense: FP8 tensorwise beside bf16"),
        ("ours", {"planned_gib": 9.8}, "dense: ours against the plan"),
    ],
)
def test_a_claim_is_judged_on_a_device(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], side: str, changes: dict[str, float], fails: str | None
) -> None:
    monkeypatch.setattr(throughput.host, "has_cuda", lambda: True)
    given = Options(Path(), Path(), tiny=False, data=Path(), group="dense")
    throughput.judge(given, "dense", {**SIDES, side: {**SIDES[side], **changes}})
    checked = report.read(capfd.readouterr().out)
    assert len(checked) == 5
    assert [check["check"] for check in checked if not check["ok"]] == ([] if fails is None else [fails])
