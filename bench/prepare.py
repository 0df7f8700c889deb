"""`prism prepare` beside other ways from jsonl to tokens, each a process of its own: CPU-seconds, alternating in one run.

Run: python bench/prepare.py --text FILE... [--mb N] [--rounds N] [--peer-python PYTHON] [--megatron-lm FOLDER]
The text (.jsonl or .txt) is cut into documents and repeated to two sizes; what a MB costs is the difference of the two, so that a process's
start does not count. A 32k byte-level BPE with LLaMA-3's splitting is trained on it. A peer that is not there is named as not measured.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE, SMALL_MB, SEED = 32_000, 1.0, 0
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
tokenizer, count = AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=False), 0
for line in open(sys.argv[1], encoding="utf-8"):
    count += len(tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]) + 1
print(count)
"""
RAW = """
import itertools, json, sys
from tokenizers import Tokenizer
tokenizer, count = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json"), 0
lines = open(sys.argv[1], encoding="utf-8")
while texts := [json.loads(line)["text"] for line in itertools.islice(lines, 500)]:
    count += sum(len(encoding.ids) + 1 for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
print(count)
"""
GIGATOKEN = """
import itertools, json, sys
import gigatoken
tokenizer, count = gigatoken.Tokenizer(sys.argv[2] + "/tokenizer.json"), 0
lines = open(sys.argv[1], encoding="utf-8")
while texts := [json.loads(line)["text"] for line in itertools.islice(lines, 500)]:
    count += sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts, parallel=False))
print(count)
"""
DATATROVE = """
import sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
source, tokenizer, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
steps = [JsonlReader(str(source.parent), glob_pattern=source.name),
         MegatronDocumentTokenizer(out, tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="</s>")]
LocalPipelineExecutor(pipeline=steps, tasks=1, workers=1, logging_dir=out + "/logs").run()
"""
# typing.override came with Python 3.12; nothing else of the script is touched
MEGATRON = """
import runpy, sys, typing
if not hasattr(typing, "override"):
    typing.override = lambda method: method
root = sys.argv.pop(1)
sys.path.insert(0, root)
sys.argv[0] = root + "/tools/preprocess_data.py"
if __name__ == "__main__":
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Way:
    """One way to the tokens: the command for a file and an output folder, and whether it writes .bin and .idx."""

    name: str
    command: Callable[[Path, Path], Sequence[str]]
    prefix: str | None = None


def make_text(paths: Sequence[Path], out: Path, megabytes: float) -> None:
    """Write a jsonl of about so many MB: the documents of the files, shuffled and repeated, no two alike."""
    documents: list[str] = []
    for path in paths:
        if path.suffix == ".jsonl":
            documents += ["\n".join(str(value) for value in json.loads(line).values()) for line in path.read_text("utf-8").splitlines()]
        else:
            documents += [part for part in path.read_text("utf-8").split("\n \n") if part.strip()]
    draw, written = random.Random(SEED), 0
    with out.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            line = json.dumps({"text": f"{draw.choice(documents)}\n{draw.randrange(10**6)}"}) + "\n"
            stream.write(line)
            written += len(line)


def make_tokenizer(text: Path, folder: Path) -> None:
    """Train the tokenizer and write it as a Hugging Face folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in text.open(encoding="utf-8")), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def ways(tokenizer: Path, peer_python: str | None, megatron_lm: Path | None) -> list[Way]:
    """Return the ways that can be measured here."""

    def ours(num_workers: int, backend: str = "tokenizers") -> Callable[[Path, Path], Sequence[str]]:
        def command(text: Path, out: Path) -> Sequence[str]:
            source = {"name": "text", "path": [str(text)], "weight": 100}
            config = {
                "out": str(out / "data"),
                "tokenizer": str(tokenizer),
                "num_workers": num_workers,
                "tokenizer_backend": backend,
                "sources": [source],
            }
            (out / "prepare.yaml").write_text(json.dumps(config))
            return [sys.executable, "-m", "megatron_prism.cli", "prepare", str(out / "prepare.yaml")]

        return command

    def script(python: str, code: str, *before: str) -> Callable[[Path, Path], Sequence[str]]:
        return lambda text, out: [python, "-c", code, *before, str(text), str(tokenizer), str(out)]

    found = [
        Way("prism prepare, 1 process", ours(1), "data/text/00000.train"),
        Way("prism prepare, 2 processes", ours(2), "data/text/00000.train"),
        *(
            [Way("prism prepare, gigatoken, 1 process", ours(1, "gigatoken"), "data/text/00000.train")]
            if has(sys.executable, "gigatoken")
            else []
        ),
        Way("tokenizers, batches, nothing written", script(sys.executable, RAW)),
        Way("transformers, a text at a time, nothing written", script(sys.executable, TRANSFORMERS)),
    ]
    if peer_python and has(peer_python, "datatrove"):
        found.append(Way("datatrove MegatronDocumentTokenizer", script(peer_python, DATATROVE), "00000_tokens"))
    if has(sys.executable, "gigatoken"):
        found.append(Way("gigatoken, batches, nothing written", script(sys.executable, GIGATOKEN)))
    if peer_python and megatron_lm:

        def megatron(text: Path, out: Path) -> Sequence[str]:
            script_file = out / "preprocess_data.py"  # a file: its worker processes import it
            script_file.write_text(MEGATRON)
            return [
                peer_python,
                str(script_file),
                str(megatron_lm),
                "--input",
                str(text),
                "--output-prefix",
                str(out / "text"),
                "--workers",
                "1",
                "--tokenizer-type",
                "HuggingFaceTokenizer",
                "--tokenizer-model",
                str(tokenizer),
                "--append-eod",
            ]

        found.append(Way("Megatron-LM preprocess_data.py, 1 worker", megatron, "text_text_document"))
    return found


def has(python: str, package: str) -> bool:
    """Say whether a Python has a package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def cpu_seconds(way: Way, text: Path, out: Path) -> float:
    """Run one way and return the CPU-seconds, user and system, of its process and all of theirs."""
    out.mkdir(parents=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    env = os.environ | threads | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with (out / "log").open("wb") as log:
        process = subprocess.Popen(way.command(text, out), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{way.name}: exit code {process.returncode}\n{(out / 'log').read_text(errors='replace')[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure, compare what was written, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--mb", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python")
    parser.add_argument("--megatron-lm", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small, large = root / "small.jsonl", root / "large.jsonl"
        make_text(args.text, small, SMALL_MB)
        make_text(args.text, large, args.mb)
        make_tokenizer(large, root / "tokenizer")
        todo = ways(root / "tokenizer", args.peer_python, args.megatron_lm)
        totals: dict[str, list[float]] = {way.name: [] for way in todo}
        slopes: dict[str, list[float]] = {way.name: [] for way in todo}
        megabytes = (large.stat().st_size - small.stat().st_size) / 1e6
        for number in range(args.rounds):
            for way in todo if number % 2 == 0 else reversed(todo):
                folder = root / f"{number}" / str(todo.index(way))
                start, whole = cpu_seconds(way, small, folder / "small"), cpu_seconds(way, large, folder / "large")
                totals[way.name].append(whole)
                slopes[way.name].append((whole - start) / megabytes)
        written = {way.name: root / "0" / str(todo.index(way)) / "large" / way.prefix for way in todo if way.prefix}
        show(large.stat().st_size / 1e6, totals, slopes, written)
    for name, is_there in (("datatrove", args.peer_python), ("gigatoken", True), ("Megatron-LM", args.megatron_lm and args.peer_python)):
        if not any(name in way for way in totals):
            print(f"not measured: {name} ({'the package is not there' if is_there else 'no --peer-python or --megatron-lm'})")


def show(megabytes: float, totals: dict[str, list[float]], slopes: dict[str, list[float]], written: dict[str, Path]) -> None:
    """Print what each way took, and whose files are equal to ours byte for byte."""
    ours = next(iter(written))
    print(f"{'':<50}CPU-s for {megabytes:.1f} MB   CPU-s a MB without the start (low to high)   MB a CPU-s")
    for name, values in totals.items():
        per_mb = statistics.median(slopes[name])
        print(
            f"{name:<50}{statistics.median(values):8.2f}{per_mb:20.4f} ({min(slopes[name]):.4f} to {max(slopes[name]):.4f}){1 / per_mb:20.2f}"
        )
    same = {
        name: [filecmp.cmp(f"{prefix}{suffix}", f"{written[ours]}{suffix}", shallow=False) for suffix in (".bin", ".idx")]
        for name, prefix in written.items()
        if name != ours
    }
    for name, (bin_is, idx_is) in same.items():
        print(f"{name}: .bin {'equal' if bin_is else 'DIFFERS'}, .idx {'equal' if idx_is else 'DIFFERS'}")
    print(json.dumps({"bench": "prepare", "mb": megabytes, "cpu_s": totals, "cpu_s_per_mb": slopes, "equal_bin_idx": same}))


if __name__ == "__main__":
    main()
