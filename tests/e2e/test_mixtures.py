"""Three mixtures of real text, as the paper blends them: prepared with its steps, trained on briefly, read as planned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import TrainConfig
from megatron_prism.core.load import load
from megatron_prism.jobs import locate

pytestmark = pytest.mark.slow

STEPS, GLOBAL_SIZE, SEQ_LENGTH = 12, 16, 64
BUDGET = STEPS * GLOBAL_SIZE * SEQ_LENGTH
WEIGHTS = {  # the domains' shares of the paper's three mixtures; its science has a stand-in: other problems, solved
    "math": {"math": 75, "general": 25},
    "math_code": {"math": 47.5, "code": 42.5, "general": 10},
    "math_code_science": {"math": 37, "code": 40.5, "science": 12.5, "general": 10},
}


PACKED = ("math_code_science",)  # packed by best fit, and its documents masked from each other


def prism(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", "megatron_prism.cli", *map(str, arguments)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def source_configs(data: Path) -> dict[str, dict[str, Any]]:
    return {
        "math": {"path": [data / "gsm8k_train.jsonl"], "text": "{question}\n{answer}", "dedup": "minhash", "min_tokens": 60},
        "code": {
            "path": [data / "humaneval.jsonl.gz"],
            "text": "{prompt}{canonical_solution}",
            "keep": [{"field": "prompt", "starts_with": "\n"}],
            "decontaminate": False,
        },
        "science": {
            "path": [data / "math500.jsonl"],
            "text": "{problem}\n{solution}",
            "dedup": "exact",
            "keep": [{"field": "level", "at_least": 2}],
            "sample": {"field": "subject", "counts": {"Algebra": 90, "Geometry": 30}},
        },
        "general": {"path": [data / "wikitext2_valid.txt"], "split": "paragraph"},
    }


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with NAME/data and the run NAME/run of each mixture."""
    root = tmp_path_factory.mktemp("mixtures")
    prism("convert", "import", "--hf", shared_data / "stories260k", "--out", root / "ckpt")
    for name, weights in WEIGHTS.items():
        known = source_configs(shared_data)
        against = [
            {"path": [shared_data / "gsm8k_test.jsonl"], "text": "{question}"},
            {"path": [shared_data / "aime24.jsonl"], "text": "{problem}"},
        ]
        mixture = {
            "out": root / name / "data",
            "tokenizer": shared_data / "stories260k",
            "tokens": BUDGET,
            "read": "all",  # so that each step meets every record; what is needed alone: tests/unit/prepare/test_reading.py
            "decontaminate": {"against": against},
            "sources": [{"name": source, "domain": source, "weight": weight, **known[source]} for source, weight in weights.items()],
            "packing": {"seq_length": SEQ_LENGTH, "overlap": 8} if name in PACKED else None,
        }
        train = {
            "run_dir": root / name / "run",
            "init": {"checkpoint": root / "ckpt"},
            "steps": STEPS,
            "precision": "fp32",
            "data": {"prepared": root / name / "data", "seq_length": SEQ_LENGTH, "document_mask": name in PACKED},
            "batch": {"global_size": GLOBAL_SIZE, "micro_size": 4},
            "optimizer": {"lr": 1e-3, "eps": 1e-8},
            "schedule": {"warmup_steps": 2},
        }
        (root / name).mkdir()
        for job, config in (("prepare", mixture), ("train", train)):
            (root / name / f"{job}.yaml").write_text(json.dumps(config, default=str))  # JSON is YAML
            prism(job, root / name / f"{job}.yaml")
    return root


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_realised_blend_is_the_planned_one(folder: Path, name: str) -> None:
    planned = json.loads((folder / name / "data" / "manifest.json").read_text())["blend"]
    realised = json.loads((folder / name / "run" / "manifest.json").read_text())["realised_blend"]
    assert planned["tokens"] == sum(part["tokens"] for part in realised) == BUDGET
    assert {part["name"]: part["share"] * 100 for part in planned["sources"]} == pytest.approx(WEIGHTS[name], abs=0.01)
    for plan, part in zip(planned["sources"], realised, strict=True):
        assert plan["name"] == part["name"] and abs(plan["tokens"] - part["tokens"]) <= SEQ_LENGTH  # whole sequences: one more or less


def test_a_packed_mixture_learns_from_whole_documents(folder: Path) -> None:
    manifest = json.loads((folder / "math_code_science" / "data" / "manifest.json").read_text())
    assert all(0.9 < source["packing"]["efficiency"] <= 1 for source in manifest["sources"])
    losses = [json.loads(line)["loss"] for line in (folder / "math_code_science" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5


def test_each_step_left_out_what_it_should(folder: Path, shared_data: Path) -> None:
    manifest = json.loads((folder / "math_code_science" / "data" / "manifest.json").read_text())
    found = {source["name"]: source for source in manifest["sources"]}
    problems = [json.loads(line) for line in (shared_data / "math500.jsonl").read_text().splitlines()]
    hard = Counter(problem["subject"] for problem in problems if problem["level"] >= 2)
    assert found["science"]["train_documents"] == 120
    assert found["science"]["left_out"] == {"keep": len(problems) - sum(hard.values()), "sample": sum(hard.values()) - 120}
    num_math = found["math"]["train_documents"] + sum(found["math"]["left_out"].values())
    assert num_math == 7473 and set(found["math"]["left_out"]) <= {"dedup", "min_tokens", "decontaminate"}
    assert found["code"]["train_documents"] + found["code"]["left_out"]["keep"] == 164 and found["code"]["left_out"]["keep"] > 0
    assert not any(source["bad_records"] for source in found.values())


def test_what_a_step_read_is_named(folder: Path, shared_data: Path) -> None:
    config = folder / "math" / "train.yaml"
    prism("locate", config, "--step", STEPS, "--sample", 5, "--json", folder / "located.json")
    located = json.loads((folder / "located.json").read_text())
    assert sum(document["num_tokens"] for document in located["documents"]) == SEQ_LENGTH
    for document in located["documents"]:
        back = locate.reader_of(load(config, TrainConfig), 1, located["source"], document["epoch"], document["document"], document["token"])
        assert (back["step"], back["dp_rank"], back["sample"]) == (STEPS, 0, 5)
        text = (shared_data / ("gsm8k_train.jsonl" if located["source"] == "math" else "wikitext2_valid.txt")).read_text()
        words = document["text"].replace("</s>", "").replace("\n", " ").split()[1:4]  # the first may be cut
        assert " ".join(words) in " ".join(text.replace("\\n", " ").split())
