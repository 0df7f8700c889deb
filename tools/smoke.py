"""Say whether an installation works: packages, a plan of a real recipe, and a tiny model through the whole walk, in about a minute.

Run: python tools/smoke.py [--torch VERSION] [--vllm VERSION]      (the images run it as they are built, continuous integration without an image)

Where torch is built for CUDA and there is no GPU, as in the build of an image, nothing is trained: run it again where there is one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "llama-3.1-8b" / "midtrain.yaml"
MODEL = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


def main() -> None:
    """Run every check; the first that fails ends with its output and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", help="the version of torch that must be here: a base image's own, not one that pip put over it")
    parser.add_argument("--vllm", help="the version of vLLM that must be here (installed, not run)")
    asked = parser.parse_args()
    wanted = asked.torch
    import torch

    if wanted is not None and torch.__version__ != wanted:
        sys.exit(f"smoke: found torch {torch.__version__}, required {wanted}: something that was installed has replaced it")
    if asked.vllm is not None and (found := version("vllm").partition("+")[0]) != asked.vllm:
        sys.exit(f"smoke: found vllm {found}, required {asked.vllm}")
    prism("doctor")
    prism("plan", str(RECIPE))
    if torch.version.cuda is not None and not torch.cuda.is_available():
        print(
            f"smoke: not trained: torch {torch.__version__} is built for CUDA and there is no GPU here; run this again where there is one"
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        walk(Path(folder))


def version(package: str) -> str:
    """Return an installed package's version, or that it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def walk(home: Path) -> None:
    """Prepare, train, stop, go on, export, import and generate."""
    texts = [f"The sum of {a} and {b} is {a + b}." for a in range(40) for b in range(10)]
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_tokenizer(home / "tokenizer", texts)
    source = {"name": "sums", "path": [str(home / "texts.jsonl")], "weight": 100}
    mixture = {"out": str(home / "data"), "tokenizer": str(home / "tokenizer"), "sources": [source], "num_workers": 1}
    run = {
        "run_dir": str(home / "run"),
        "steps": 4,
        "model": MODEL,
        "init": {"tokenizer": str(home / "tokenizer")},
        "data": {"prepared": str(home / "data"), "seq_length": 64},
        "batch": {"global_size": 2},
        "save": {"interval": 2},
    }
    (home / "mixture.yaml").write_text(json.dumps(mixture))  # JSON is YAML
    (home / "run.yaml").write_text(json.dumps(run))
    prism("prepare", str(home / "mixture.yaml"))
    prism("train", str(home / "run.yaml"), "limits.wall_clock_s=0.001", code=3)  # saves after its first step, to be started again
    prism("train", str(home / "run.yaml"))
    prism("convert", "export", "--ckpt", str(home / "run"), "--out", str(home / "hf"))
    prism("convert", "import", "--hf", str(home / "hf"), "--out", str(home / "ckpt"))
    prism("generate", "--ckpt", str(home / "ckpt"), "--prompt", "The sum of", "--max-tokens", "8", "--greedy")


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Write a Hugging Face folder's tokenizer of 300 entries."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=MODEL["vocab_size"], special_tokens=["<eos>"], show_progress=False)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<eos>"})
    )


def prism(*arguments: str, code: int = 0) -> None:
    """Run one prism command; end with its output where it does not exit with `code`."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prism.cli", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    said = " ".join(part for part in arguments[:2] if not part.startswith(("-", "/")))
    if done.returncode != code:
        sys.exit(f"{done.stdout}\n{done.stderr}\nsmoke: prism {said}: exit code {done.returncode}, required {code}")
    print(f"smoke: prism {said}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
