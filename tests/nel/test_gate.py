"""`nel gate` reads what a verdict writes, and comes to the same changes, flips and p-values (tools/test_nel_gate.sh)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.eval.verdicts import verdict
from tests.unit.eval.two_evaluations import result, scores, write

NEL = os.environ.get("PRISM_NEL")
pytestmark = pytest.mark.skipif(NEL is None, reason="tools/test_nel_gate.sh")


def gate(tmp_path: Path, old: list[Any], new: list[Any], max_drop: float) -> tuple[verdict.Verdict, dict[str, Any], int]:
    """Return our verdict, nel's report, and its exit code."""
    folders = write(tmp_path / "new", new), write(tmp_path / "old", old)
    ours = verdict.compare(*folders, PolicyConfig(max_drop={"a": max_drop}))
    verdict.write(tmp_path, ours)
    nel, report = tmp_path / "nel", tmp_path / "gate.json"
    words = [str(NEL), "gate", nel / "baseline", nel / "candidate", "--policy", nel / "policy.yaml", "--output", report, "--no-report"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert report.is_file(), done.stderr
    return ours, json.loads(report.read_text()), done.returncode


@pytest.mark.parametrize(
    ("num_lost", "decision", "code"), [(0, "GO", 0), (60, "NO-GO", 1), (8, "INCONCLUSIVE", 2)], ids=["GO", "NO-GO", "INCONCLUSIVE"]
)
def test_a_sample_a_question(tmp_path: Path, num_lost: int, decision: str, code: int) -> None:
    old, new = [1.0] * 120 + [0.0] * 80, [0.0] * num_lost + [1.0] * (123 - num_lost) + [0.0] * 77
    faulty: list[float | None] = [*new[:-1], None]
    ours, report, exit_code = gate(tmp_path, scores("a", old), list(reversed(scores("a", faulty))), 0.05)
    (theirs,) = report["benchmarks"]
    assert (ours.decision, report["verdict"], exit_code) == (decision, decision, code)
    change = ours.changes["a"]
    assert theirs["delta"] == pytest.approx(change.change, abs=1e-6) and theirs["n_paired"] == change.num_pairs == 199
    of_pairs = theirs["regression_report"]
    assert of_pairs["flip_report"]["summary"]["n_regressions"] == len(change.flips.lost) == num_lost
    assert of_pairs["flip_report"]["summary"]["n_improvements"] == len(change.flips.gained) == 3
    assert of_pairs["mcnemar"]["p_value"] == pytest.approx(change.flips.p_fall, abs=1e-6)


def test_several_samples_a_question(tmp_path: Path) -> None:
    old = [result("a", f"q{n:03d}", float((n * 7 + s * 3) % 5 < 3), s) for n in range(60) for s in range(4)]
    new = [result("a", f"q{n:03d}", float((n * 3 + s * 7) % 11 < 3), s) for n in range(60) for s in range(4)]
    ours, report, code = gate(tmp_path, old, new, 0.1)
    (theirs,) = report["benchmarks"]
    assert (ours.decision, report["verdict"], code) == ("NO-GO", "NO-GO", 1)
    change = ours.changes["a"]
    assert theirs["delta"] == pytest.approx(change.change, abs=1e-6) and theirs["baseline_score"] == pytest.approx(
        change.old_score, abs=1e-6
    )
    half = (theirs["delta_ci_upper"] - theirs["delta_ci_lower"]) / 2
    assert half == pytest.approx(2.001 * change.difference.standard_error, rel=1e-3), "Student's t of 59 degrees of freedom"
    p_value = theirs["regression_report"]["permutation_test"]["p_value"]
    assert p_value == pytest.approx(verdict.as_values(ours)["tasks"]["a"]["p_fall"], abs=1e-3)


def test_a_changed_score_is_seen(tmp_path: Path) -> None:
    """The negative control: one response changed in what was written, and the numbers are not the same any more."""
    ours, report, _ = gate(tmp_path, scores("a", [1.0] * 20), scores("a", [1.0] * 20), 0.5)
    assert report["benchmarks"][0]["delta"] == ours.changes["a"].change == 0.0
    path = tmp_path / "nel/candidate/a/results.jsonl"
    path.write_text(path.read_text().replace('"reward": 1.0', '"reward": 0.0', 1))
    words = [str(NEL), "gate", "nel/baseline", "nel/candidate", "--policy", "nel/policy.yaml", "--output", "again.json", "--no-report"]
    subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=300)
    assert json.loads((tmp_path / "again.json").read_text())["benchmarks"][0]["delta"] == pytest.approx(-0.05)
