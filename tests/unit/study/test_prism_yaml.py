"""The paper at full size: configs/studies/prism.yaml is what its tool writes, its stages load, and each table of the paper that is a result has its stages."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prism.cli.submit import read_command
from megatron_prism.core.check.study import check_study
from megatron_prism.core.config import EvaluateConfig, StageConfig, StudyConfig
from megatron_prism.core.load import load
from megatron_prism.jobs import study_stages
from megatron_prism.jobs.study_plan import model_of, of_landscape
from megatron_prism.study.graph import needed, tasks

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "configs" / "studies" / "prism.yaml"
RESULTS = {  # the paper's tables, and the stages that make ours
    "t01_data": "granite33_data_mcs",
    "t01_epochs": "granite33_data_m granite33_data_mc granite33_data_mcs",
    "t04_leaderboards": "granite33_base_scores granite33_mid_m_scores granite33_mid_mc_scores granite33_mid_mcs_scores",
    "t05_domains": "granite33_base_scores granite33_mid_m_scores granite33_mid_mc_scores granite33_mid_mcs_scores",
    "t06_base_vs_prism": "llama31_base_scores llama31_mid_mcs_scores mistral24b_mid_mcs_scores granite4hmicro_mid_mcs_scores",
    "t07_long_context": "granite33_merged_scores granite33_merge_long_full_scores granite33_merge_long_attention_scores"
    " granite33_mc_long_full_scores granite33_mc_long_attention_scores",
    "t08_context_length": "granite4micro_mid_mcs_scores granite4micro_mid_mcs_16k_scores granite4micro_mid_mcs_32k_scores",
    "t09_token_budget": "granite4micro_mid_mc_10k_steps_scores granite4micro_mid_mc_30k_steps_scores",
    "t11_pipeline": "granite33_mc_rl_mc_scores llama31_mcs_rl_mc_scores mistral7b_mc_rl_mcs_scores mistral7b_mcs_rl_mcs_scores",
    "t12_weight_change": "granite33_weights_mcs granite33_weights_mc_rl granite33_weights_base_rl nemotronh_weights_mc nemotronh_weights_rl",
    "t15_correctness": "granite33_responses llama31_responses nemotronh_responses",
    "t22_thresholds": "granite33_weights_mcs granite33_weights_rl",
    "t23_changed_by_group": "granite33_weights_rl nemotronh_weights_rl nemotronh_weights_base_rl",
    "aime26": "",  # no task yet: docs/REPRODUCE.md
    "cka_base_mid": "granite33_cka llama31_cka nemotronh_cka",
    "cka_minimum": "granite33_cka llama31_cka nemotronh_cka",
    "fig17_rl_training": "granite4micro_mcs_rl_mcs",
    "landscape_1d": "granite33_landscape llama31_landscape",
    "page_avg": "granite33_mid_mcs_scores",
    "page_rl": "mistral24b_mcs_rl_mcs_scores nemotronh_mcs_rl_mcs_scores",
    "rl_data": "prompts filter mixes",
    "rl_gains": "mistral24b_mcs_rl_mcs_balanced_scores granite4micro_mcs_rl_mcs_balanced_scores granite4hmicro_mcs_rl_mcs_balanced_scores",
    "rl_peaks": "granite33_mcs_rl_mcs_curve",
    "rl_peaks_base": "granite33_base_rl_mcs_curve",
    "update_cosine": "granite33_weights_mcs nemotronh_weights_mcs granite33_weights_again",
}
NO_RESULTS = {"icml_poster", "t10_rl", "t16_midtraining", "t17_long_context", "t18_long_context_data"}  # settings, data, ranges
NOT_POSSIBLE = {"t03_when_to_midtrain"}  # begins from checkpoints that are not public


@pytest.fixture(scope="module")
def study() -> StudyConfig:
    return load(FILE, StudyConfig)


def test_the_file_is_what_the_tool_writes() -> None:
    done = subprocess.run([sys.executable, "tools/make_study.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_its_graph_and_its_claims_are_sound(study: StudyConfig) -> None:
    assert check_study(study) == []
    assert {claim.name for claim in study.claims if claim.null} >= {"rl-changes-few", "cka-near-one", "cosine-half"}
    graph = tasks(study.stages)
    everything = {task.name for task in graph}
    assert needed(graph, ["report"]) == everything, "the report waits for every stage"
    assert {"granite33_mid_mcs", "prompts/0", "mixes/1"} <= needed(graph, ["llama31_mc_rl_mc"])
    looped = replace(study, stages=(replace(study.stages[0], after=("report",)), *study.stages[1:]))
    assert any("wait for each other" in problem.found for problem in check_study(looped))


def test_every_file_that_it_names_is_there(study: StudyConfig) -> None:
    named = {word for stage in study.stages for words in (stage.command, *stage.array) for word in words if word.startswith("configs/")}
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def one_of_each(stages: tuple[StageConfig, ...]) -> list[StageConfig]:
    """Return a stage for each kind of words: the job, its file, and the keys that are set."""
    kinds: dict[str, StageConfig] = {}
    for stage in stages:
        words = [
            word.partition("=")[0] if "=" in word else "PLACE" if word.startswith(("runs/", "hf/")) else word for word in stage.command
        ]
        kinds.setdefault(" ".join(words), replace(stage, after=(), array=stage.array[:1]))
    return list(kinds.values())


def test_a_stage_of_each_kind_loads(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sizes = {}
    for stage in one_of_each(study.stages):
        (read,) = study_stages.read(replace(study, stages=(stage,)), read_command)
        sizes[read.name] = study_stages.world_size(read)
    assert sizes["granite33_mid_m"] == 64 and sizes["granite33_base_scores"] == 8
    assert {"train", "rl", "evaluate", "analyze"} <= {stage.command[0] for stage in study.stages if stage.name in sizes}


def test_a_base_model_that_is_not_there_yet_is_planned_as_the_run_that_begins_from_it_wants(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    wanted = ("llama31_base", "llama31_data_mcs", "llama31_mid_mcs", "llama31_mid_mcs_hf")
    stages = {
        stage.name: stage
        for stage in study_stages.read(replace(study, stages=tuple(one for one in study.stages if one.name in wanted)), read_command)
    }
    base, exported = Path("runs/prism/llama31_base"), Path("runs/prism/llama31_mid_mcs_hf")
    model = model_of(base, stages)
    assert model is not None and model.vocab_size == 128256 and model_of(exported, stages) == model
    assert model_of(base, {"llama31_base": stages["llama31_base"]}) is None


def test_what_samples_for_hours_waits_and_grades_as_the_recipes_do(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan a shard of full responses takes 53 minutes, and the watchdog's default is an hour."""
    monkeypatch.chdir(ROOT)
    recipe = load(ROOT / "configs" / "recipes" / "granite-3.3-8b" / "eval.yaml", EvaluateConfig)
    asked = [replace(one, after=()) for one in study.stages if one.name.endswith(("_curve", "_landscape"))]
    stages = [stage for one in asked for stage in study_stages.read(replace(study, stages=(one,)), read_command)]
    assert len(stages) == 2 * 10 + 3
    assert all((stage.config.limits, stage.config.grade) == (recipe.limits, recipe.grade) for stage in stages)
    assert {(stage.config.world_size, stage.config.precision) for stage in stages} == {(8, "bf16")}


def test_a_landscapes_loss_is_on_a_mixture_that_holds_something_out(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for model in ("granite33", "llama31", "nemotronh"):
        data, name = f"{model}_data_mcs", f"{model}_landscape"
        listed = [replace(one, after=(data,) if one.name == name else ()) for one in study.stages if one.name in (data, name)]
        stages = {stage.name: stage for stage in study_stages.read(replace(study, stages=tuple(listed)), read_command)}
        assert stages[name].config.tasks["losses"].held_out.mixture == stages[data].output
        assert all(source.valid_percent for source in stages[data].config.sources)


def test_a_landscape_costs_what_one_of_its_points_does_at_each(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (stage,) = study_stages.read(
        replace(study, stages=tuple(replace(one, after=()) for one in study.stages if one.name == "llama31_landscape")), read_command
    )
    assert of_landscape(stage.config, {"hours": 0.5, "gpu_hours": 4.0, "usd": 10.0, "fits": True}) == {
        "hours": 20.0,
        "gpu_hours": 160.0,
        "usd": 400.0,
        "fits": True,
    }  # 11 points of the path, 25 of the plane, 3 of parts, 1 null


def test_each_result_of_the_paper_has_its_stages(study: StudyConfig) -> None:
    tables = {path.stem for path in (FILE.parent / "paper").glob("*.yaml")}
    assert tables == {*RESULTS, *NO_RESULTS, *NOT_POSSIBLE}
    names = {stage.name for stage in study.stages}
    assert {name for words in RESULTS.values() for name in words.split()} <= names
    page = (ROOT / "docs" / "REPRODUCE.md").read_text()
    assert [table for table in sorted(tables) if f"`{table}`" not in page] == []
    assert [claim.name for claim in study.claims if f"`{claim.name}`" not in page] == []


def test_what_trains_and_what_samples_is_scored_and_held_against_its_base(study: StudyConfig) -> None:
    names = {stage.name for stage in study.stages}
    runs = [stage.name for stage in study.stages if stage.command[0] in ("train", "rl") and stage.command[1].endswith(".yaml")]
    assert len(runs) == 43
    alone = {"granite33_mid_mcs_again"}  # for the cosine alone
    assert [name for name in runs if name not in alone and not {f"{name}_hf", f"{name}_scores", f"{name}_gate"} <= names] == []


def test_the_table_of_claims_has_each_claims_states_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = runpy.run_path(str(ROOT / "tools" / "claims_table.py"))
    table = tool["table"]
    words = {"name": "c", "says": "", "source": "", "judged_at": "", "note": ""}
    checks = [
        {"part": "requires", "value": "base:z", "than": 0.5},
        {"part": "shows", "value": "cka:mid|rl.x", "than": 0.1},
        {"part": "null", "value": "s:y", "than": "cka:mid|rl.x"},
    ]
    studies = [
        {"claims": [{**words, "state": state, "checks": checks, "figures": {"base:z": 1.0, "cka:mid|rl.x": value, "s:y": None}}]}
        for state, value in (("holds", 0.25), ("fails", 0.75), ("holds", 0.5))
    ]
    # 4.303 x .25 / sqrt(3) on either side; a prerequisite's figure is left out
    assert table(studies).splitlines()[2] == (
        r"| `c` | 2 of 3 | fails | `cka:mid\|rl.x` 0.5 (-0.121 to 1.12): 0.25, 0.75, 0.5<br>`s:y` not measured |"
    )
    assert table(studies[:1]).splitlines()[2] == r"| `c` | 1 of 1 |  | `cka:mid\|rl.x` 0.25: 0.25<br>`s:y` not measured |"
    for name, of in (("one", "tiny"), ("two", "prism")):
        (tmp_path / name / "study").mkdir(parents=True)
        (tmp_path / name / "study" / "study.json").write_text(json.dumps({"name": of, "claims": []}))
    assert len(tool["studies"]([tmp_path / "one"])) == 1
    for places in (("one", "one"), ("one", "two")):
        with pytest.raises(SystemExit, match="each once"):
            tool["studies"]([tmp_path / place for place in places])
    with pytest.raises(SystemExit, match="none/study/study.json: no such file"):
        tool["studies"]([tmp_path / "none"])


def test_the_table_of_claims_is_printed_and_the_page_is_written_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    main = runpy.run_path(str(ROOT / "tools" / "claims_table.py"))["main"]
    page, mark = tmp_path / "page.md", "<!-- written by tools/claims_table.py -->\n"
    page.write_text(f"{mark}old<!-- end -->")
    monkeypatch.setitem(main.__globals__, "DOCUMENT", page)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text(json.dumps({"name": "tiny", "claims": []}))
    for words, begins in (([], f"{mark}old"), (["--write"], f"{mark}| claim |")):
        monkeypatch.setattr(sys, "argv", ["claims_table.py", *words, str(tmp_path)])
        main()
        assert capsys.readouterr().out.startswith("| claim |") == (not words) and page.read_text().startswith(begins)
    monkeypatch.setattr(sys, "argv", ["claims_table.py", "--writ", str(tmp_path)])
    with pytest.raises(SystemExit, match="Print what studies"):
        main()
