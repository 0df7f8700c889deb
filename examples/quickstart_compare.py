"""Compare a base model and its mid-trained successor on held-out text: what was gained, what was kept, what was forgotten.

Run: python examples/quickstart_compare.py --base HF_DIR --mid HF_DIR --data CORPUS_DIR [--json FILE]

Only plain transformers reads the two folders, nothing of megatron_prism: what it finds is what any user of them gets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

SOURCES = ("math", "code", "general")
WINDOW_TOKENS = 128
MAX_WINDOWS = 120  # of each source, spread evenly over its held-out text
WINDOWS_AT_ONCE = 10
TOLERANCE_NATS = 0.05  # about 5 percent of perplexity
SAMPLE_TOKENS = 64
CAPTION = (
    f"Mean loss a token in nats, on held-out text. gain: it fell by more than {TOLERANCE_NATS}; "
    f"forgot: it rose by more than {TOLERANCE_NATS}; retained: neither."
)


def main() -> None:
    """Load both models, measure, print, and write the JSON result where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--mid", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="CORPUS_DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    for path in [args.base / "config.json", args.mid / "config.json", *(args.data / f"{name}_valid.jsonl" for name in SOURCES)]:
        if not path.is_file():
            parser.error(f"found no {path}")
    result = compare(args.base, args.mid, args.data)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def compare(base: Path, mid: Path, data: Path) -> dict[str, Any]:
    """Return the losses of both models by source, the verdicts, and a continuation by each."""
    models = {"base": load(base), "mid": load(mid)}
    texts = {name: read_texts(data / f"{name}_valid.jsonl") for name in SOURCES}
    problem = shown_problem(data / "math_valid.jsonl")
    losses: dict[str, dict[str, float]] = {name: {} for name in SOURCES}
    samples, counts = {}, {}
    for who, (model, tokenizer) in models.items():
        for name in SOURCES:
            windows = cut(tokenizer, texts[name], model.config.max_position_embeddings)
            losses[name][who] = loss_per_token(model, windows)
            counts.setdefault(name, windows.tolist())
            if counts[name] != windows.tolist():
                raise SystemExit(f"the tokenizers of {base} and {mid} differ on {name}: losses a token do not compare")
        samples[who] = continuation(model, tokenizer, problem["question"])
    return {
        "base": str(base),
        "mid": str(mid),
        "tolerance_nats": TOLERANCE_NATS,
        "sources": {
            name: {
                "base_loss": loss["base"],
                "mid_loss": loss["mid"],
                "change": loss["mid"] - loss["base"],
                "verdict": verdict(loss["mid"] - loss["base"]),
                "num_tokens": len(counts[name]) * (len(counts[name][0]) - 1),
            }
            for name, loss in losses.items()
        },
        "sample": {"question": problem["question"], "answer": problem["answer"], **samples},
    }


def load(folder: Path) -> tuple[Any, Any]:
    """Return a folder's model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_texts(path: Path) -> list[str]:
    """Return a file's documents as the models are trained on them: `text`, or the question, a line break, the answer."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [record["text"] if "text" in record else f"{record['question']}\n{record['answer']}" for record in records]


def shown_problem(path: Path) -> dict[str, str]:
    """Return the held-out problem to show: the shortest whose answer has steps."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return min(records, key=lambda record: ("\n" not in record["answer"], len(record["question"])))


def cut(tokenizer: Any, texts: list[str], max_tokens: int) -> torch.Tensor:
    """Return windows of the documents joined with EOS. Shapes: [windows, tokens], or one shorter window of a short text."""
    ids: list[int] = []
    for text in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [*text, tokenizer.eos_token_id]
    size = min(WINDOW_TOKENS, max_tokens, len(ids))
    windows = torch.tensor(ids[: len(ids) // size * size]).view(-1, size)
    spread = torch.linspace(0, len(windows) - 1, min(MAX_WINDOWS, len(windows))).round().long()
    return windows[spread]


@torch.inference_mode()
def loss_per_token(model: Any, windows_WT: torch.Tensor) -> float:
    """Return the mean cross entropy of each token after a window's first, in nats."""
    total = 0.0
    for batch_BT in windows_WT.split(WINDOWS_AT_ONCE):
        logits_BTV = model(input_ids=batch_BT).logits.float()
        flat = logits_BTV[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(flat, batch_BT[:, 1:].flatten(), reduction="sum").item()
    return total / windows_WT[:, 1:].numel()


def verdict(change: float) -> str:
    """Return the word for a change of loss."""
    if change < -TOLERANCE_NATS:
        return "gain"
    return "forgot" if change > TOLERANCE_NATS else "retained"


@torch.inference_mode()
def continuation(model: Any, tokenizer: Any, question: str) -> str:
    """Return what a model writes after a question, greedily."""
    prompt = torch.tensor([tokenizer(f"{question}\n", add_special_tokens=False)["input_ids"]])
    stop = tokenizer.eos_token_id
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=SAMPLE_TOKENS, eos_token_id=stop, pad_token_id=stop
    )
    return tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)


def show(result: dict[str, Any]) -> None:
    """Print the table and the two continuations."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"gain": "green", "retained": "cyan", "forgot": "red"}
    table = Table(title="Base and mid-trained model, reloaded with plain transformers", title_justify="left")
    table.add_column("source")
    for column in ("base loss", "mid-trained loss", "change"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, row in result["sources"].items():
        word = Text(row["verdict"], style=colours[row["verdict"]])
        table.add_row(name, f"{row['base_loss']:.3f}", f"{row['mid_loss']:.3f}", f"{row['change']:+.3f}", word)
    console = Console()
    console.print(table)
    console.print(CAPTION, style="dim", highlight=False)
    for title, key in {"problem": "question", "expected": "answer", "base": "base", "mid-trained": "mid"}.items():
        lines = result["sample"][key].split("\n")
        console.print(Text.assemble((f"{title}: ", "bold"), " / ".join(line.strip() for line in lines if line.strip())))


if __name__ == "__main__":
    main()
