"""configs/mixtures: the paper's sources and weights, planned without data at its budget."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.check.data import check_prepare
from megatron_prism.core.config import EvaluateConfig, KeepConfig, PrepareConfig, PromptsConfig, SampleConfig, SourceConfig
from megatron_prism.core.load import load
from megatron_prism.eval.sets.published import SETS
from megatron_prism.jobs import prepare
from megatron_prism.prepare import pieces
from megatron_prism.prepare.records import PLACEHOLDER

MIXTURES = Path(__file__).resolve().parents[3] / "configs" / "mixtures"
EPOCHS = {  # the paper's Table 1 at 26.21 billion tokens
    "math": {"megamath_web_pro": 0.98, "mot_math": 4.37, "nemotron_pt_v1_math": 0.07, "chat": 2.88, "dclm_edu": 0.04},
    "math_code": {
        "megamath_web_pro": 0.49,
        "mot_math": 4.37,
        "nemotron_pt_v1_math": 0.07,
        "chat": 1.44,
        "dclm_edu": 0.01,
        "starcoder2": 0.01,
        "refinecode": 0.02,
        "opencodereasoning_2": 2.34,
        "mot_code": 1.11,
    },
    "math_code_science": {
        "megamath_web_pro": 0.36,
        "mot_math": 3.06,
        "nemotron_pt_v1_math": 0.07,
        "chat": 1.44,
        "dclm_edu": 0.01,
        "starcoder2": 0.01,
        "refinecode": 0.02,
        "opencodereasoning_2": 2.34,
        "mot_code": 0.67,
        "openthoughts3_science": 2.78,
        "mot_science": 2.96,
    },
    "longctx": {
        "megamath_web_pro": 0.24,
        "nemotron_pt_v1_math": 0.24,
        "starcoder2": 0.05,
        "xenarcai_codex": 0.05,
        "dclm_edu": 0.19,
    },  # ours
}
DOMAINS = {  # the rings of the paper's project page, in percent
    "math": {"math": 75, "general": 25},
    "math_code": {"math": 47.5, "code": 42.5, "general": 10},
    "math_code_science": {"math": 37, "code": 40.5, "science": 12.5, "general": 10},
    "longctx": {"math": 47.5, "code": 42.5, "general": 10},  # ours
}


@pytest.mark.parametrize("name", EPOCHS)
def test_a_papers_mixture_is_planned_without_data(name: str) -> None:
    plan = prepare.run(load(MIXTURES / f"{name}.yaml", PrepareConfig), dry_run=True)
    assert {part["name"]: round(part["epochs"], 2) for part in plan["sources"]} == EPOCHS[name]
    assert sum(part["tokens"] for part in plan["sources"]) == (1_000 * 36 * 131_072 if name == "longctx" else 25_000 * 128 * 8192)
    assert all(part["share"] * 100 == pytest.approx(part["weight"], abs=1e-6) for part in plan["sources"])


def test_what_is_said_of_a_source_is_checked() -> None:
    config = load(MIXTURES / "math.yaml", PrepareConfig)
    first, *others = config.sources
    problems = check_prepare(replace(config, sources=(replace(first, available_tokens=0), *others)))
    assert [problem.where for problem in problems] == ["sources.0.available_tokens"]


@pytest.mark.parametrize("name", DOMAINS)
def test_domains_are_those_of_the_papers_rings(name: str) -> None:
    found: Counter[str] = Counter()
    for source in load(MIXTURES / f"{name}.yaml", PrepareConfig).sources:
        assert source.domain
        found[source.domain] += source.weight
    assert found == DOMAINS[name]


def test_the_papers_preprocessing_stands_in_the_sources() -> None:
    """Section 3.1, step by step."""
    by_name = {source.name: source for name in EPOCHS for source in load(MIXTURES / f"{name}.yaml", PrepareConfig).sources}
    assert len(by_name) == 12  # the eleven of Table 1, and the long-context mixture's own
    assert by_name["dclm_edu"].keep == (KeepConfig(field="edu_int_score", at_least=3),)
    reasoning = by_name["opencodereasoning_2"].parts
    assert len(reasoning) == 2 and all(part.sample == SampleConfig(counts={"all": 60_000}) for part in reasoning)
    right = (KeepConfig(field="judgement", equals="right"), KeepConfig(field="pass_rate", not_equals=-1))
    assert all(part.keep == right and part.text.count("\n") == 1 for part in reasoning)
    wild, *others = by_name["chat"].parts
    assert wild.keep == (KeepConfig(field="model", starts_with="gpt-4"),) and not any(part.keep for part in others)
    assert all(part.turns and part.turns.prefix for part in by_name["chat"].parts)
    for name in ("mot_math", "mot_code", "mot_science", "openthoughts3_science", "nemotron_pt_v1_math"):
        assert by_name[name].turns and not by_name[name].turns.prefix and by_name[name].dedup != "none"
    for name in EPOCHS:
        assert not prepare._check_parts(config := load(MIXTURES / f"{name}.yaml", PrepareConfig)) and config.decontaminate


@pytest.mark.parametrize(("path", "kind"), [("mixtures/math.yaml", PrepareConfig), ("prompts/deepscaler.yaml", PromptsConfig)])
def test_decontamination_reads_each_set_in_the_form_in_which_it_is_evaluated(path: str, kind: type) -> None:
    configs = MIXTURES.parent
    by_file = {str(file): part.text for part in load(configs / path, kind).decontaminate.against for file in part.path}
    tasks = load(configs / "evaluations" / "reasoning.yaml", EvaluateConfig, ["model.hf=x", "out=y"]).tasks
    assert tasks and all(str(task.path) in by_file for task in tasks.values()), "what is evaluated is looked for"
    for file, text in by_file.items():
        fields = SETS[Path(file).name.partition(".")[0].removesuffix("_test")].fields
        assert PLACEHOLDER.findall(text) and set(PLACEHOLDER.findall(text)) <= set(fields), file


@pytest.mark.parametrize("name", EPOCHS)
def test_what_a_recipe_validates_on_is_held_out(name: str) -> None:
    """midtrain.yaml validates, and a landscape refuses a mixture that holds nothing out. The long-context step does not validate (Table 17)."""
    for source in load(MIXTURES / f"{name}.yaml", PrepareConfig).sources:
        read = min(source.available_tokens or 0, 26_214_400_000 * source.weight / 100)
        held_out = read * source.valid_percent / 100
        assert held_out == 0 if name == "longctx" else held_out > 10 * 32_768, f"{source.name}: ten sequences of Table 8's longest"


def test_every_mixture_is_listed_here() -> None:
    assert {path.stem for path in MIXTURES.glob("*.yaml")} == set(EPOCHS)


def test_the_dry_run_prints_how_to_fetch_what_is_needed(capsys: pytest.CaptureFixture) -> None:
    plan = prepare.run(load(MIXTURES / "math_code_science.yaml", PrepareConfig), dry_run=True)
    lines = {line["command"].split("--local-dir ")[1]: line for line in plan["downloads"] if line["command"]}
    assert len(plan["downloads"]) == 14 and len(lines) == 13, "two sources of several sets; the persona sets are to be chosen"
    assert lines["data/sources/nemotron_pt_v1_math"]["command"] == (
        "hf download nvidia/Nemotron-Post-Training-Dataset-v1 --repo-type dataset "
        "--include 'data/math-*[0-8]0-of-*.parquet' --local-dir data/sources/nemotron_pt_v1_math"
    )
    assert lines["data/sources/mot_math"]["share"] == 1 and lines["data/sources/opencodereasoning_2/cpp"]["note"] == ""
    assert "'megamath-web-pro/*_*[0-3].parquet'" in lines["data/sources/megamath_web_pro"]["command"]
    assert lines["data/sources/wildchat"]["command"].split("'")[1] == "*.parquet" and lines["data/sources/wildchat"]["share"] == 1
    read = {source.name: source for source in load(MIXTURES / "math_code_science.yaml", PrepareConfig).sources}
    for name in ("nemotron_pt_v1_math", "dclm_edu", "starcoder2", "refinecode", "mot_code"):
        (line,) = [line for line in plan["downloads"] if line["source"] == name]
        pattern, available = line["command"].split("'")[1], read[name].available_tokens
        need = 26_214_400_000 * read[name].weight / 100 / available
        for num_files in (1000, 2317):
            files = [f"{pattern.split('*')[0]}train-{number:05}-of-{num_files:05}.parquet" for number in range(num_files)]
            numbers = [number for number, file in enumerate(files) if fnmatch.fnmatch(file, pattern)]
            assert need <= len(numbers) / num_files <= max(2.2 * need, 0.011), "enough, and not much more"
            assert max(numbers) > 0.8 * num_files, "spread over all"


def test_a_mixture_in_the_papers_proportions_is_read_as_far_as_needed(tokenizer_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A millionth of Table 1: 790 thousand tokens offered, 26 thousand read."""
    monkeypatch.setattr(pieces, "LEAST_BYTES", 1 << 10)
    paper, sources = load(MIXTURES / "math_code_science.yaml", PrepareConfig), []
    for source in paper.sources:
        folder = tmp_path / source.name
        folder.mkdir()
        for number in range(4):
            count = source.available_tokens // 1_000_000 // 4 // 22  # a document has some 22 tokens
            texts = [f"{source.name} {number} {index}: even" for index in range(max(count, 2))]
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append(SourceConfig(name=source.name, weight=source.weight, path=(f"{folder}/*.jsonl",), dedup=source.dedup))
    tokens = paper.tokens // 1_000_000
    config = PrepareConfig(out=tmp_path / "one", tokenizer=tokenizer_folder, sources=tuple(sources), tokens=tokens, num_workers=1)
    result = prepare.run(config)
    wanted = {part["name"]: part["tokens"] for part in result["blend"]["sources"]}
    for source in result["sources"]:
        is_all = not source["reading"]["unread_bytes"] and not source["reading"]["is_last_cut"]
        assert is_all == (EPOCHS["math_code_science"][source["name"]] > 1)
        assert is_all or wanted[source["name"]] <= source["train_tokens"] <= 1.02 * wanted[source["name"]] + 60
    assert sum(source["train_tokens"] for source in result["sources"]) < 1.1 * sum(wanted.values())
    offered = sum(source["reading"]["num_bytes"] + source["reading"]["unread_bytes"] for source in result["sources"])
    assert sum(source["reading"]["num_bytes"] for source in result["sources"]) < 0.06 * offered
    for source in config.sources:
        assert abs(wanted[source.name] - tokens * source.weight / 100) < 1
