"""The main job on real weights and real text: stories260k mid-trained on 70 % GSM8K and 30 % WikiText, from the command line.

It learns the mathematics, keeps (here: also gains) on general text, and goes back to Hugging Face with the same loss.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

STEPS, SEQ_LENGTH, SEQUENCES, SEED = 100, 128, 32, 1234
MARGIN_NATS = 2.5  # measured: held-out GSM8K 5.32 to 2.28, WikiText 5.04 to 2.88


def prism(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", "megatron_prism.cli", *map(str, arguments)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data/, ckpt/, the run mid/ and its export hf/."""
    root = tmp_path_factory.mktemp("midtrain")
    mixture = {
        "out": root / "data",
        "tokenizer": shared_data / "stories260k",
        "sources": [
            {
                "name": "math",
                "weight": 70,
                "path": [shared_data / "gsm8k_train.jsonl"],
                "text": "{question}\n{answer}",
                "valid_path": [shared_data / "gsm8k_test.jsonl"],
            },
            {
                "name": "general",
                "weight": 30,
                "path": [shared_data / "wikitext2_valid.txt"],
                "split": "paragraph",
                "valid_path": [shared_data / "wikitext2_test.txt"],
            },
        ],
    }
    train = {
        "run_dir": root / "mid",
        "init": {"checkpoint": root / "ckpt"},
        "steps": STEPS,
        "seed": SEED,
        "precision": "fp32",
        "data": {"prepared": root / "data", "seq_length": SEQ_LENGTH},
        "batch": {"global_size": 16, "micro_size": 4},
        "optimizer": {"lr": 2e-3, "eps": 1e-8},
        "schedule": {"warmup_steps": 10},
        "validation": {"sequences": SEQUENCES},
        "log": {"interval": 50},
        "deterministic": True,
        "environment": {"NCCL_DEBUG": "WARN"},
    }
    for name, config in (("mixture", mixture), ("train", train)):
        (root / f"{name}.yaml").write_text(json.dumps(config, default=str))  # JSON is YAML
    prism("convert", "import", "--hf", shared_data / "stories260k", "--out", root / "ckpt")
    prism("prepare", root / "mixture.yaml")
    prism("train", root / "train.yaml", "--nproc", 2, "--json", root / "result.json")
    prism("convert", "export", "--ckpt", root / "mid", "--out", root / "hf")
    return root


@pytest.fixture(scope="module")
def valid_loss(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "result.json").read_text())["valid_loss"]


def test_math_is_learned(valid_loss: dict[str, dict[str, float]]) -> None:
    assert valid_loss["math"][str(STEPS)] < valid_loss["math"]["0"] - MARGIN_NATS


def test_general_text_is_retained(valid_loss: dict[str, dict[str, float]]) -> None:
    assert valid_loss["general"][str(STEPS)] < valid_loss["general"]["0"]


def test_blend_is_the_one_asked_for(run: Path) -> None:
    blend = json.loads((run / "mid" / "manifest.json").read_text())["realised_blend"]
    assert {part["name"]: round(part["share"], 3) for part in blend} == {"math": 0.7, "general": 0.3}
    assert sum(part["tokens"] for part in blend) == STEPS * 16 * SEQ_LENGTH


def test_the_manifest_says_what_the_environment_was(run: Path) -> None:
    (start,) = json.loads((run / "mid" / "manifest.json").read_text())["starts"]
    assert (
        start["plan"]["environment"].items()
        >= {"NCCL_DEBUG": "WARN", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_NVLS_ENABLE": "0"}.items()
    )


@pytest.mark.parametrize("source", ["math", "general"])
def test_transformers_gives_the_same_loss(run: Path, valid_loss: dict[str, dict[str, float]], source: str) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_prism.data import loader, mixture

    datasets = loader.held_out(mixture.read_prepared(run / "data"), SEQ_LENGTH, SEED)
    samples = [datasets[source][index] for index in range(SEQUENCES)]
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    with torch.inference_mode():
        logits = model(torch.stack([sample["tokens"] for sample in samples])).logits
    labels = torch.stack([sample["labels"] for sample in samples])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(valid_loss[source][str(STEPS)], abs=1e-4)
    assert loss.item() != pytest.approx(valid_loss[source]["0"], abs=1e-2)  # it is the trained model


def test_export_keeps_the_folder(run: Path, shared_data: Path) -> None:
    original = shared_data / "stories260k"
    assert {path.name for path in (run / "hf").iterdir()} == {path.name for path in original.iterdir()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (run / "hf" / name).read_bytes() == (original / name).read_bytes()
    assert (run / "hf" / "model.safetensors").stat().st_size == (original / "model.safetensors").stat().st_size
    assert (run / "hf" / "model.safetensors").read_bytes() != (original / "model.safetensors").read_bytes()
