"""`prism contaminate`'s scan: megabytes of text a CPU-second, from jsonl and from a prepared mixture's tokens; and the memory of two sizes.

Run: python bench/contaminate.py --data FOLDER [--mb N] [--rounds N]
FOLDER holds gsm8k_train.jsonl and wikitext2_test.txt (the text), gsm8k_test.jsonl, math500.jsonl and aime24.jsonl (the evaluation sets). Sides
alternate in one process, after the index is made. Beside ours: reading the records alone, decoding alone, and the usual way, a Python set of
n-grams of plain words, which finds no other LaTeX, names no question and no place.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prism.core.config import PrepareConfig, SourceConfig
from megatron_prism.eval import contamination
from megatron_prism.eval.benchmarks import Against
from megatron_prism.eval.contamination import Search, Tally
from megatron_prism.jobs import prepare
from megatron_prism.prepare import texts

SEED, VOCAB_SIZE, DOCUMENT_CHARS, NGRAM = 0, 32_000, 3000, 13
SETS = ("gsm8k_test", "math500", "aime24")


def write_text(data: Path, path: Path, mb: float) -> None:
    """Write documents drawn at random from the text, about `mb` of them."""
    draw, size = random.Random(SEED), 0
    answers = [json.loads(line) for line in (data / "gsm8k_train.jsonl").open("rb")]
    wiki = (data / "wikitext2_test.txt").read_text("utf-8")
    with path.open("w", encoding="utf-8") as stream:
        while size < mb * 1e6:
            start = draw.randrange(len(wiki) - DOCUMENT_CHARS)
            one = draw.choice(answers)
            text = wiki[start : start + DOCUMENT_CHARS] if draw.random() < 0.5 else f"{one['question']}\n{one['answer']}"
            stream.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())


def train_tokenizer(path: Path, folder: Path) -> None:
    """Write a byte-level BPE, trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    with path.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def scan(named: Path, search: Search) -> int:
    """Scan as the job does in one process; return the bytes of text."""
    of_sets, tally = contamination.index(search), Tally()
    for batch in texts.open_data(str(named), "{text}", None).batches():
        tally.add(contamination.scan(batch, search), of_sets, 3)
    return tally.num_bytes


def read(named: Path) -> int:
    """Read the texts alone."""
    return sum(len(text.encode()) for batch in texts.open_data(str(named), "{text}", None).batches() for _, text in batch.read([]))


def plain(path: Path, runs: set[tuple[str, ...]]) -> int:
    """Look every n-gram of plain words up in a set, until the first of a document that is there."""
    size = 0
    for line in path.open("rb"):
        text = json.loads(line)["text"]
        size += len(text.encode())
        words = text.lower().split()
        any(tuple(words[start : start + NGRAM]) in runs for start in range(len(words) - NGRAM + 1))
    return size


def peak_mb(data: Path, named: Path) -> float:
    """Return the largest resident memory of the whole command in one process."""
    program = """
import sys
from megatron_prism.cli.entry import main
sys.argv = ["prism", *sys.argv[1:]]
try:
    main()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", peak.split()[1])
"""
    sets = [word for name in SETS for word in ("--against", f"{name}={data / name}.jsonl")]
    command = [sys.executable, "-c", program, "contaminate", str(named), *sets, "--num-workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1].split()[1]) / 1e3


def measure(data: Path, mb: float, rounds: int) -> dict[str, Any]:
    """Return MB a CPU-second of each side, and the memory."""
    search = Search(tuple(Against(name, str(data / f"{name}.jsonl")) for name in SETS), NGRAM, 8)
    of_sets = contamination.index(search)
    words = [text.text.lower().split() for text in of_sets.texts]
    runs = {tuple(one[start : start + NGRAM]) for one in words for start in range(len(one) - NGRAM + 1)}
    with tempfile.TemporaryDirectory(prefix="bench_contaminate_") as home:
        text, quarter, mixture = Path(home) / "text.jsonl", Path(home) / "quarter.jsonl", Path(home) / "mixture"
        write_text(data, text, mb)
        write_text(data, quarter, mb / 4)
        train_tokenizer(quarter, Path(home) / "tokenizer")
        source = SourceConfig(name="text", path=(str(text),), weight=100)
        prepare.run(PrepareConfig(out=mixture, tokenizer=Path(home) / "tokenizer", sources=(source,), num_workers=1))
        sides: dict[str, Callable[[], int]] = {
            "jsonl, scanned": lambda: scan(text, search),
            "jsonl, read alone": lambda: read(text),
            "mixture, scanned": lambda: scan(mixture, search),
            "mixture, decoded alone": lambda: read(mixture),
            "a set of plain 13-grams": lambda: plain(text, runs),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                begin = time.process_time()
                rates[name].append(sides[name]() / 1e6 / (time.process_time() - begin))
        memory = {"whole": peak_mb(data, text), "quarter": peak_mb(data, quarter)}
    mean = {name: [statistics.median(of), min(of), max(of)] for name, of in rates.items()}
    return {"mb": mb, "num_ngrams": int(of_sets.num_ngrams.sum()), "mb_a_cpu_s": mean, "peak_mb": memory}


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mb", type=float, default=40.0)
    parser.add_argument("--rounds", type=int, default=5)
    result = measure(**vars(parser.parse_args()))
    for name, (middle, low, high) in result["mb_a_cpu_s"].items():
        print(f"{name:<26}{middle:6.1f} MB a CPU-second ({low:.1f} to {high:.1f})")
    for name, size in result["peak_mb"].items():
        print(f"memory, {name:<18}{size:6.0f} MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
