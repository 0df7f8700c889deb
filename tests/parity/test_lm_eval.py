"""lm-eval on our model and on its own `hf` model: the same log-likelihoods and the same greedy generations, on every layout.

The sets are lm-eval's own tasks on local files: GSM8K and MATH-500 as published, and small ones made here. lm-eval reads them by itself for
`hf` (dataset_kwargs), our harness by its own reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import lm_eval_worker
from .tiny import random_model

pytestmark = pytest.mark.slow
LIMIT = 6
LOGPROB = 1e-4  # of a sum of log-probabilities; relative above 1, since fp32 sums of hundreds of nats round at 1e-5
NAMES = ["arc_easy", "mmlu_anatomy", "winogrande", "lambada_openai", "wikitext", "gsm8k", "hendrycks_math500"]
GENERATED = {"gsm8k", "hendrycks_math500"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}
FAMILIES = ("granite", "nemotron_h")
CONTROLS = ["positions one early", "cut on the right"]
SPLITS = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", ("train", "validation", "test")),
    "mmlu_anatomy": ("cais/mmlu", "anatomy", ("dev", "test")),
    "winogrande": ("allenai/winogrande", "winogrande_xl", ("train", "validation")),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", ("test",)),
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", ("train", "validation", "test")),
    "gsm8k": ("openai/gsm8k", "main", ("train", "test")),
    "hendrycks_math500": ("HuggingFaceH4/MATH-500", "default", ("test",)),
}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def arc(number: int) -> dict[str, Any]:
    choices = [f"{number + 1} small birds", f"{number * 3}", "none of the brown dogs in the garden", "a red ball"]
    question = f"How many birds sat on branch {number} when {number % 7} of the birds flew away?"
    return {"id": f"q{number}", "question": question, "choices": {"text": choices, "label": list("ABCD")}, "answerKey": "ABCD"[number % 4]}


def sentence(number: int) -> dict[str, Any]:
    return {
        "sentence": f"The {'cat' if number % 2 else 'dog'} could not enter the box number {number} because the _ was too big.",
        "option1": "cat" if number % 2 else "dog",
        "option2": "box",
        "answer": str(1 + number % 2),
    }


def anatomy(number: int) -> dict[str, Any]:
    return {"question": f"Which part of body {number} is red?", "subject": "anatomy", "choices": ["eye", "arm", "leg", "lip"], "answer": number % 4}


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of datasets, each as `hf download` leaves it but for the records' format."""
    root = tmp_path_factory.mktemp("datasets")
    lines = [line for line in (shared_data / "wikitext2_test.txt").read_text().split("\n") if len(line) > 200]
    made = {"arc_easy": arc, "mmlu_anatomy": anatomy, "winogrande": sentence}
    for task, (dataset, name, splits) in SPLITS.items():
        folder = root / dataset / name
        for offset, split in enumerate(splits):
            path = folder / f"{split}.jsonl"
            if task in made:
                write(path, [made[task](1 + 100 * offset + number) for number in range(12)])
            elif task == "lambada_openai":
                write(path, [{"text": line[:150].rsplit(" ", 1)[0]} for line in lines[:12]])
            elif task == "wikitext":
                write(path, [{"page": "\n".join(lines[number : number + 2])} for number in range(4)])
            else:
                source = {"gsm8k": f"gsm8k_{split}.jsonl", "hendrycks_math500": "math500.jsonl"}[task]
                write(path, [json.loads(line) for line in (shared_data / source).read_text().splitlines()[: 200 if split == "train" else 12]])
    return root


@pytest.fixture(scope="module")
def models(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return (Hugging Face folder, checkpoint) by name: the real one, and tiny ones of a dense and a hybrid family with its tokenizer."""
    from megatron_prism.jobs import convert

    stories, made = shared_data / "stories260k", {}
    for name in ("stories260k", *FAMILIES):
        root = tmp_path_factory.mktemp(name)
        hf = stories
        if name != "stories260k":
            hf = root / "hf"
            random_model(name, vocab_size=512, max_position_embeddings=700).save_pretrained(hf)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (hf / file).write_bytes((stories / file).read_bytes())
        convert.run_import(hf, root / "ckpt", dry_run=False)
        made[name] = (hf, root / "ckpt")
    return made


@pytest.fixture(scope="module")
def theirs(models: dict[str, tuple[Path, Path]], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return by model and task what lm-eval's own `hf` model answers: (responses of each document, metrics)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: oracle(hf, data, NAMES) for name, (hf, _) in models.items()}


def oracle(hf: Path, data: Path, names: list[str], **choices: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from megatron_prism.checkpoint import reference

    class Short(HFLM):
        max_gen_toks = lm_eval_worker.MAX_TOKENS

    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = Short(pretrained=reference.load(hf), tokenizer=tokenizer, backend="causal", batch_size=1, device="cpu", **choices)
    tasks = [{"task": name, **their_files(data, name)} for name in names]
    evaluation = lm_eval.simple_evaluate(
        model=model, tasks=[{"group": "theirs", "task": tasks}], limit=LIMIT, bootstrap_iters=0, log_samples=True
    )
    return {
        name: ({sample["doc_id"]: [one[0] for one in sample["resps"]] for sample in evaluation["samples"][name]}, evaluation["results"][name])
        for name in names
    }


def their_files(data: Path, name: str) -> dict[str, Any]:
    dataset, config, splits = SPLITS[name]
    files = {split: str(data / dataset / config / f"{split}.jsonl") for split in splits}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


@pytest.fixture(scope="module")
def ours(run_distributed: Callable[..., list[Any]], models: dict[str, tuple[Path, Path]], data: Path) -> dict[str, Any]:
    """Return by layout and model what our harness returns."""
    made = {}
    for layout, (num_ranks, parallel) in LAYOUTS.items():
        made[layout] = run_distributed(
            lm_eval_worker.run,
            num_ranks,
            timeout_s=500,
            parallel=parallel,
            layout=parallel,
            models={name: str(ckpt) for name, (_, ckpt) in models.items() if fits(name, layout)},
            data=str(data),
            names=NAMES,
            limit=LIMIT,
            controls=["the largest of a rank alone"] if layout == "tp2_sp" else CONTROLS if layout == "tp1" else [],
        )[0]
    return made


def fits(name: str, layout: str) -> bool:
    return layout != "dp2" or name == "granite"


def differences(mine: dict[str, Any], other: dict[str, Any]) -> tuple[float, list[str]]:
    """Return the largest difference of a log-likelihood (relative above 1), and the documents whose generations differ."""
    largest, differ = 0.0, []
    for result in mine["results"]:
        task, doc_id = result["task"].removeprefix("lm_eval/"), int(result["id"].split("-")[0])
        responses = other[task][0][doc_id]
        if task in GENERATED:
            differ += [f"{task} {doc_id}"] * (result["text"] != responses[0])
        else:
            numbers = [one[0] if isinstance(one, (tuple, list)) else one for one in responses]
            pairs = zip(map(float, result["text"].split()), numbers, strict=True)
            largest = max(largest, *(abs(own - their) / max(1.0, abs(their)) for own, their in pairs))
    return largest, differ


CASES = [(layout, name) for layout in LAYOUTS for name in ("stories260k", *FAMILIES) if fits(name, layout)]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_answers_are_those_of_lm_evals_hf_model(ours: dict[str, Any], theirs: dict[str, Any], layout: str, name: str) -> None:
    mine = ours[layout][name]
    assert len(mine["results"]) == LIMIT * len(NAMES) - 2  # wikitext has four documents
    largest, differ = differences(mine, theirs[name])
    assert largest <= LOGPROB and not differ, (largest, differ)
