"""lm-eval's requests a CPU-second: our LM, and lm-eval's own `hf` model, on the same weights.

Run: python -m bench.evaluate --data FOLDER [--model llama|nemotron_h] [--hidden 128 256] [--rounds N] [--kind KIND...] [--batch N]
FOLDER holds stories260k (its tokenizer) and wikitext2_test.txt, from which contexts of 40 to 400 tokens are cut. Three kinds of requests: `letters`, four choices of one
token each for a question, as in MMLU; `endings`, four choices of 8 to 30 tokens, as in HellaSwag; `generate`, 64 greedy tokens. One process, one
thread, fp32; the hf model has batches of 16, or --batch. Sides alternate, the order turns each round; CPU time, never wall time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from bench.generate import hf_model
from megatron_prism.checkpoint import folder, reference, sharded
from megatron_prism.core.config import GangConfig
from megatron_prism.data import tokenizer
from megatron_prism.eval.retention.lm import GangLM, InMemory
from megatron_prism.eval.retention.serve import Asking, Served
from megatron_prism.jobs import convert
from megatron_prism.models import build
from megatron_prism.parallel.groups import gang

NUM_QUESTIONS, NUM_PROMPTS, MAX_TOKENS = 48, 24, 64
METHODS = {"letters": "loglikelihood", "endings": "loglikelihood", "generate": "generate_until"}


def requests(text: str) -> dict[str, list[Instance]]:
    """Return the requests by kind, cut from a text."""
    words = text.split()
    made: dict[str, list[Instance]] = {kind: [] for kind in METHODS}
    for number in range(NUM_QUESTIONS):
        start, length = 300 * number, 12 + 7 * (number % 16)
        context = " ".join(words[start : start + length])
        endings = [" " + " ".join(words[start + 150 + 12 * choice :][: 3 + (number + choice) % 7]) for choice in range(4)]
        for kind, choices in (("letters", list("abcd")), ("endings", endings)):
            joined = context + "\nAnswer: " if kind == "letters" else context
            made[kind] += [instance("loglikelihood", (joined, choice), number, index) for index, choice in enumerate(choices)]
        if number < NUM_PROMPTS:
            how = {"until": ["Question:"], "max_gen_toks": MAX_TOKENS, "do_sample": False}
            made["generate"].append(instance("generate_until", (context, how), number, 0))
    return made


def instance(kind: str, arguments: tuple[Any, ...], doc_id: int, index: int) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=index, metadata=("bench", doc_id, 1))


def sides(name: str, hidden_size: int, home: Path, data: Path, groups: Any, batch: int) -> dict[str, Any]:
    """Return our LM, made anew for each round since it keeps its answers, and lm-eval's own."""
    hf_model(name, hidden_size).save_pretrained(home / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (home / "hf" / file).write_bytes((data / "stories260k" / file).read_bytes())
    convert.run_import(home / "hf", home / "ckpt", dry_run=False)
    checkpoint = folder.read(home / "ckpt")
    chunks = build.build(checkpoint.model, groups, GangConfig(precision="fp32"))
    sharded.load_weights(home / "ckpt", chunks)
    served = Served(chunks, checkpoint.model, groups, tokenizer.load(home / "hf"), num_rows=NUM_PROMPTS, batch_tokens=4096)
    theirs = HFLM(
        pretrained=reference.load(home / "hf"),
        tokenizer=AutoTokenizer.from_pretrained(home / "hf", trust_remote_code=False),
        backend="causal",
        batch_size=batch,
        device="cpu",
        max_length=2048,
    )
    return {"ours": lambda: GangLM(Asking(served), "one", 0, InMemory()), "hf": lambda: theirs}


def measure(by_name: dict[str, Any], kind: str, asked: list[Instance], rounds: int) -> dict[str, float]:
    """Return each side's median of requests a CPU-second, after a round that is not counted and whose answers must agree."""
    rates: dict[str, list[float]] = {name: [] for name in by_name}
    answers: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name in sorted(by_name, reverse=bool(number % 2)):
            gc.collect()
            lm, begun = by_name[name](), time.process_time()
            answers[name] = getattr(lm, METHODS[kind])(asked, disable_tqdm=True)
            rates[name].append(len(asked) / (time.process_time() - begun))
    if kind == "generate":
        same = sum(own == other for own, other in zip(answers["ours"], answers["hf"], strict=True))
        print(f"{kind}: {same} of {len(asked)} generations agree (random logits: near-ties may flip some)", flush=True)
    else:
        worst = max(abs(own[0] - other[0]) for own, other in zip(answers["ours"], answers["hf"], strict=True))
        print(f"{kind}: the largest difference of a log-likelihood is {worst:.1e}", flush=True)
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=["llama", "nemotron_h"], choices=["llama", "nemotron_h"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batch", type=int, default=16, help="the hf model's batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    asked = requests((arguments.data / "wikitext2_test.txt").read_text())
    results = []
    with tempfile.TemporaryDirectory() as temporary, gang(GangConfig(precision="fp32")) as groups:
        for name in arguments.model:
            for hidden_size in arguments.hidden:
                home = Path(temporary, f"{name} {hidden_size}")
                home.mkdir()
                by_name = sides(name, hidden_size, home, arguments.data, groups, arguments.batch)
                for kind in arguments.kind:
                    rates = measure(by_name, kind, asked[kind], arguments.rounds)
                    ratio = rates["ours"] / rates["hf"]
                    said = f"ours {rates['ours']:.1f}, hf {rates['hf']:.1f} requests a CPU-second, {ratio:.2f} times"
                    print(f"{name:11} {hidden_size:4} {kind:9} {said}", flush=True)
                    results.append({"model": name, "hidden_size": hidden_size, "kind": kind, "requests_per_cpu_s": rates, "ratio": ratio})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
