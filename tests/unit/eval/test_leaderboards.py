"""The tables of the Open LLM Leaderboard against lm-eval's own configs, and version 2's scale against the leaderboard's own example."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prism.eval.retention import lm_tasks
from megatron_prism.eval.retention.leaderboards import LEADERBOARD_V1, LEADERBOARD_V2, Benchmark, above_guessing, average, score


def test_tables_are_lm_evals(lm_eval_index: dict[str, Any]) -> None:
    """Few-shot counts, metrics, filters, and the choices that guessing has, of every sub-task."""
    shots = {member["task"]: member["num_fewshot"] for member in lm_eval_index["openllm"].cfg["task"]}
    assert {one.task.removesuffix("_mc2"): one.num_fewshot for one in LEADERBOARD_V1} == shots
    leaves = 0
    for benchmark in LEADERBOARD_V1 + LEADERBOARD_V2:
        for task, _ in lm_tasks.leaves(benchmark.task, lm_eval_index):
            config, leaves = lm_eval_index[task].cfg, leaves + 1
            assert benchmark.metric in [metric["metric"] for metric in config["metric_list"]]
            assert benchmark.filter in [part["name"] for part in config.get("filter_list") or [{"name": "none"}]]
            if benchmark in LEADERBOARD_V2:
                assert config.get("num_fewshot", 0) == benchmark.num_fewshot
            if isinstance(benchmark.num_choices, dict) and isinstance(config["doc_to_choice"], list):
                assert len(config["doc_to_choice"]) == benchmark.num_choices[task.removeprefix("leaderboard_bbh_")]
    assert leaves == 5 + 57 + 24 + 7 + 3 + 3 + 2


def test_scores_are_the_leaderboards() -> None:
    """Its page's own numbers: GPQA 0.6 is 46.67, MuSR of 0.7, 0.4 and 0.6 is 35.01 (there 0.333 stands for a third)."""
    by_task = {one.task: one for one in LEADERBOARD_V2}
    assert above_guessing(0.6, 4) == pytest.approx(0.46667, abs=1e-5) and above_guessing(0.2, 4) == 0
    musr = {"murder_mysteries": 0.7, "object_placements": 0.4, "team_allocation": 0.6}
    metrics = {f"leaderboard_musr_{name}": {"acc_norm": value} for name, value in musr.items()}
    assert score(by_task["leaderboard_musr"], metrics, {}) == pytest.approx((0.4 + 0.25 + 0.4) / 3)
    gpqa = {"leaderboard_gpqa_main": {"acc_norm": 0.5}, "leaderboard_gpqa_diamond": {"acc_norm": 0.3}}
    pooled = score(by_task["leaderboard_gpqa"], gpqa, {"leaderboard_gpqa_main": 300, "leaderboard_gpqa_diamond": 100})
    assert pooled == pytest.approx((0.45 - 0.25) / 0.75)
    ifeval = {"leaderboard_ifeval": {"prompt_level_strict_acc": 0.4, "inst_level_strict_acc": 0.6}}
    assert score(by_task["leaderboard_ifeval"], ifeval, {}) == 0.5
    assert score(Benchmark("mmlu", 5, "acc"), {"mmlu_a": {"acc": 0.2}, "mmlu_b": {"acc": 0.6}}, {}) == pytest.approx(0.4)


def test_an_average_needs_every_benchmark() -> None:
    whole = {one.task: 0.5 for one in LEADERBOARD_V1}
    assert average(whole, LEADERBOARD_V1) == 0.5
    assert average({**whole, "gsm8k": None}, LEADERBOARD_V1) is None and average({}, LEADERBOARD_V2) is None
