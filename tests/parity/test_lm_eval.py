"""lm-eval on our model and on its own `hf` model: the same log-likelihoods and the same greedy generations, on every layout.

The sets are lm-eval's own tasks on local files: GSM8K and MATH-500 as published, and small ones made here. lm-eval reads them by itself for
`hf` (dataset_kwargs), our harness by its own reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from . import lm_eval_worker
from .tiny import random_model

Answers = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.slow
LIMIT = 2
LOGPROB = 1e-4  # of a sum of log-probabilities; relative above 1, since fp32 sums of hundreds of nats round at 1e-5
NAMES = ["arc_easy", "mmlu_anatomy", "winogrande", "lambada_openai", "wikitext", "gsm8k", "hendrycks_math500"]
GENERATED = {"gsm8k", "hendrycks_math500"}
CHOSEN = ["arc_easy", "gsm8k"]  # of a control, or another limit
SHORT = 40  # a context that every prompt of CHOSEN exceeds
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}
FAMILIES = ("granite", "nemotron_h")
ALL = ["stories260k", *FAMILIES]
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "tp1": {
        "all": {"names": NAMES, "models": ALL},
        "again": {"names": CHOSEN, "models": ["granite"], "again": True},
        "short": {"names": CHOSEN, "models": ["stories260k"], "max_context": SHORT},
        "positions one early": {"names": CHOSEN, "models": ["stories260k"], "control": "positions one early"},
        "cut on the right": {"names": CHOSEN, "models": ["stories260k"], "max_context": SHORT, "control": "cut on the right"},
    },
    "tp2_sp": {
        "all": {"names": NAMES, "models": ALL},
        "largest of a rank": {"names": CHOSEN, "models": ["granite"], "control": "the largest of a rank alone"},
    },
    "pp2": {"all": {"names": NAMES, "models": ALL}},
    "dp2": {"all": {"names": CHOSEN, "models": ["granite"]}},
}
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
    return {
        "question": f"Which part of body {number} is red?",
        "subject": "anatomy",
        "choices": ["eye", "arm", "leg", "lip"],
        "answer": number % 4,
    }


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
                write(
                    path, [json.loads(line) for line in (shared_data / source).read_text().splitlines()[: 200 if split == "train" else 12]]
                )
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
def theirs(models: dict[str, tuple[Path, Path]], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    """Return a function: the responses that lm-eval's own `hf` model gives, by task and document, of a model's name, with HFLM's arguments."""

    @cache
    def ask(name: str, names: tuple[str, ...], **choices: Any) -> dict[str, Any]:
        return oracle(models[name][0], data, names, **choices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ask


def oracle(hf: Path, data: Path, names: Sequence[str], **choices: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from megatron_prism.checkpoint import reference

    class Short(HFLM):
        max_gen_toks = lm_eval_worker.MAX_TOKENS

    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False)
    model = Short(pretrained=reference.load(hf), tokenizer=tokenizer, backend="causal", batch_size=1, device="cpu", **choices)
    tasks = [{"task": name, **their_files(data, name)} for name in names]
    evaluation = lm_eval.simple_evaluate(
        model=model, tasks=[{"group": "theirs", "task": tasks}], limit=LIMIT, bootstrap_iters=0, task_manager=lm_eval_worker.manager()
    )
    return {name: {sample["doc_id"]: [one[0] for one in sample["resps"]] for sample in evaluation["samples"][name]} for name in names}


def their_files(data: Path, name: str) -> dict[str, Any]:
    dataset, config, splits = SPLITS[name]
    files = {split: str(data / dataset / config / f"{split}.jsonl") for split in splits}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


@pytest.fixture(scope="module")
def ours(run_distributed: Callable[..., list[Any]], models: dict[str, tuple[Path, Path]], data: Path) -> Answers:
    """Return a function that gives what our harness returns on a layout, by model and case."""
    ckpts = {name: str(ckpt) for name, (_, ckpt) in models.items()}

    @cache
    def run(layout: str) -> dict[str, Any]:
        num_ranks, parallel = LAYOUTS[layout]
        arguments = {"layout": parallel, "models": ckpts, "data": str(data), "cases": CASES[layout], "limit": LIMIT}
        return run_distributed(lm_eval_worker.run, num_ranks, timeout_s=500, parallel=parallel, **arguments)[0]

    return run


def differences(mine: dict[str, Any], other: dict[str, Any]) -> tuple[float, list[str]]:
    """Return the largest difference of a log-likelihood (relative above 1), and the documents whose generations differ."""
    largest, differ = 0.0, []
    for result in mine["results"]:
        task, doc_id = result["task"].removeprefix("lm_eval/"), int(result["id"].split("-")[0])
        responses = other[task][doc_id]
        if task in GENERATED:
            differ += [f"{task} {doc_id}"] * (result["text"] != responses[0])
        else:
            numbers = [one[0] if isinstance(one, (tuple, list)) else one for one in responses]
            pairs = zip(map(float, result["text"].split()), numbers, strict=True)
            largest = max(largest, *(abs(own - their) / max(1.0, abs(their)) for own, their in pairs))
    return largest, differ


def logprobs(answers: dict[str, Any], task: str) -> list[float]:
    return [float(part) for result in answers["results"] if result["task"] == f"lm_eval/{task}" for part in result["text"].split()]


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in CASES[layout]["all"]["models"]])
def test_answers_are_those_of_lm_evals_hf_model(ours: Answers, theirs: Answers, layout: str, name: str) -> None:
    mine, names = ours(layout)[f"{name} all"], CASES[layout]["all"]["names"]
    assert len(mine["results"]) == LIMIT * len(names)
    hf = theirs(name, tuple(NAMES)) | theirs(name, ("wikitext",), add_bos_token=False)
    largest, differ = differences(mine, hf)
    assert largest <= LOGPROB and not differ, (largest, differ)


def test_a_context_that_is_too_long_is_cut_as_theirs(ours: Answers, theirs: Answers) -> None:
    mine = ours("tp1")["stories260k short"]
    largest, differ = differences(mine, theirs("stories260k", tuple(CHOSEN), max_length=SHORT))
    assert largest <= LOGPROB and not differ, (largest, differ)
    assert mine["figures"]["counts"]["num_cut"] == 5 * LIMIT  # four choices and a generation


@pytest.mark.parametrize(
    ("layout", "control"),
    [("tp1", "stories260k positions one early"), ("tp1", "stories260k cut on the right"), ("tp2_sp", "granite largest of a rank")],
)
def test_control_is_seen(ours: Answers, theirs: Answers, layout: str, control: str) -> None:
    hf = theirs("stories260k", tuple(CHOSEN), max_length=SHORT) if "cut" in control else theirs(control.split()[0], tuple(NAMES))
    largest, _ = differences(ours(layout)[control], hf)
    assert largest > 20 * LOGPROB


def test_trap_4_a_whole_text_has_one_bos(ours: Answers, theirs: Answers) -> None:
    """lm-eval's own model puts its prefix before the BOS of a tokenizer that adds one, and predicts the second from the first."""
    mine = ours("tp1")["stories260k all"]
    doubled = [responses[0] for responses in theirs("stories260k", tuple(NAMES))["wikitext"].values()]
    assert all(abs(own - other) > 1 for own, other in zip(logprobs(mine, "wikitext"), doubled, strict=True))
    assert mine["figures"]["bos"] == "one" and mine["figures"]["counts"]["num_two_bos"] == 0


def test_answers_of_an_earlier_run_are_not_computed_again(ours: Answers) -> None:
    again, first = ours("tp1")["granite again"], ours("tp1")["granite all"]
    assert again["figures"]["counts"]["num_kept"] == again["figures"]["counts"]["num_requests"] == 5 * LIMIT
    kept = {(result["task"], result["id"]): result for result in first["results"]}
    assert all(result == kept[result["task"], result["id"]] for result in again["results"])
