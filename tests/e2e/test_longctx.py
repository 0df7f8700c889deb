"""Long context lost in mid-training comes back: base, mid-training at 128 tokens, merge, long-context step, scored by `prism evaluate`.

The example of examples/quickstart_longctx.sh, from the command line, one seed. docs/MERGE.md has three seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, HOME = ROOT / "configs" / "tiny" / "longctx", Path("runs/quickstart_longctx")
MODELS = ("base", "mid", "merged_ckpt", "extended", "extended_attention", "unmerged")
Scores = dict[str, dict[str, float]]
Prism = Callable[..., None]


def run(root: Path, *words: object) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Return each model's retrieval score, by length."""
    root = tmp_path_factory.mktemp("longctx")

    def prism(job: str, *words: object) -> None:
        run(root, "-m", "megatron_prism.cli", job, *words)

    run(root, ROOT / "examples" / "quickstart_longctx_corpus.py", HOME / "corpus")
    for name in ("short", "base", "mid", "long"):
        prism("prepare", CONFIGS / f"{name}_mixture.yaml")
    for name in ("short", "base", "mid"):
        prism("train", CONFIGS / f"{name}.yaml")
    prism("merge", "--model", f"{HOME}/base=0.15", "--model", f"{HOME}/mid=0.85", "--out", HOME / "merged")
    prism("convert", "import", "--hf", HOME / "merged", "--out", HOME / "merged_ckpt")
    prism("train", CONFIGS / "extend.yaml")
    prism("train", CONFIGS / "extend_attention.yaml")
    prism("train", CONFIGS / "extend.yaml", f"run_dir={HOME}/unmerged", f"init.checkpoint={HOME}/mid")
    return {model: score(prism, root, model) for model in MODELS}


def score(prism: Prism, root: Path, model: str) -> dict[str, float]:
    """Evaluate a model of the example; return its score by length."""
    out = HOME / "scores" / model
    prism("evaluate", CONFIGS / "evaluate.yaml", f"model.checkpoint={HOME}/{model}", f"out={out}")
    return json.loads((root / out / "summary.json").read_text())["tasks"]["retrieval"]["by"]["length"]


def test_the_base_model_finds_values_at_both_lengths(scores: Scores) -> None:
    assert scores["base"]["128"] > 0.9 and scores["base"]["512"] > 0.7, scores


def test_mid_training_at_128_tokens_forgets_512(scores: Scores) -> None:
    assert scores["mid"]["512"] < scores["base"]["512"] - 0.15, scores
    assert scores["mid"]["128"] > scores["mid"]["512"] + 0.15, scores  # within its own length it keeps more


def test_merge_and_long_context_step_bring_it_back(scores: Scores) -> None:
    lost = scores["base"]["512"] - scores["mid"]["512"]
    assert scores["merged_ckpt"]["512"] >= scores["mid"]["512"], scores
    assert scores["extended"]["512"] > scores["mid"]["512"] + lost / 2, scores
    assert scores["extended_attention"]["512"] > scores["mid"]["512"] + lost / 4, scores
    assert scores["extended"]["128"] > 0.9, scores


def test_the_step_does_it_without_the_merge_too(scores: Scores) -> None:
    lost = scores["base"]["512"] - scores["mid"]["512"]
    assert scores["unmerged"]["512"] > scores["mid"]["512"] + lost / 4, scores
