"""Results that are damaged in a way that JSON allows: each costs its own part of a report, and is told of."""

from __future__ import annotations

from pathlib import Path

from megatron_prism.report import build, read
from tests.unit.report.study import write, write_evaluation, write_run


def test_a_run_without_a_start_and_numbers_that_no_float_holds_cost_their_own_part(tmp_path: Path) -> None:
    none, endless, large = (tmp_path / "all" / name for name in ("none", "endless", "large"))
    write(write_run(none) / "manifest.json", {"kind": "run", "starts": []})
    write(write_run(endless) / "config.yaml", "steps: .inf\n")
    write(write_evaluation(large, 0.5) / "results.jsonl", f'{{"task": "math", "id": "1", "score": {10**400}}}\n')
    weights = {"kind": "analysis", "analysis": "responses", "models": {"a": {"tasks": {"t": {"pass_rate": {"value": 10**400}}}}}}
    write(tmp_path / "all" / "responses.json", weights)
    (one,) = read.read([tmp_path / "all"])
    assert {told.partition(":")[0] for told in one.told} == {"large", "endless", "none"} and len(one.evaluations) == 1
    absent = {section.id for section in build.build([one], {}, "T").sections if section.absent.startswith("A result is not in the form")}
    assert absent == {"responses"}
