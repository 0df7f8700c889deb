"""Compare models before and after reinforcement learning on held-out problems: the share that they solve, and a problem of each kind of answer.

Run: python examples/quickstart_rl_compare.py --prompts PROMPTS_DIR --out OUT_DIR NAME=HF_DIR [NAME=HF_DIR...]

Only plain transformers reads the models: what it finds is what any user of them gets. `prism grade` says which answers are right. OUT_DIR then holds
each model's responses, graded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

NUM_SAMPLES = 4
MAX_TOKENS = 16
SEED = 0


def main() -> None:
    """Sample and grade each model's responses, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=Path, required=True, metavar="PROMPTS_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT_DIR")
    parser.add_argument("models", nargs="+", metavar="NAME=HF_DIR")
    args = parser.parse_args()
    prompts = [json.loads(line) for line in (args.prompts / "prompts.jsonl").read_text().splitlines()]
    args.out.mkdir(parents=True, exist_ok=True)
    graded = {}
    for model in args.models:
        name, _, folder = model.partition("=")
        graded[name] = grade(responses(Path(folder), prompts), args.out / f"{name}.jsonl")
    show(graded, len(prompts))


@torch.inference_mode()
def responses(folder: Path, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return NUM_SAMPLES responses to each prompt, sampled at temperature 1, as lines for `prism grade`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    end, lines = tokenizer.eos_token_id, []
    torch.manual_seed(SEED)
    encoded = [tokenizer(prompt["prompt"])["input_ids"] for prompt in prompts]
    for length in sorted(set(map(len, encoded))):  # prompts of one length need no padding
        chosen = [number for number, tokens in enumerate(encoded) if len(tokens) == length]
        tokens_BS = torch.tensor([encoded[number] for number in chosen for _ in range(NUM_SAMPLES)])
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": MAX_TOKENS, "eos_token_id": end, "pad_token_id": end}
        written_BS = model.generate(tokens_BS, attention_mask=torch.ones_like(tokens_BS), **options)[:, length:]
        for row, written in enumerate(written_BS):
            prompt, sample = prompts[chosen[row // NUM_SAMPLES]], row % NUM_SAMPLES
            has_ended, text = end in written.tolist(), tokenizer.decode(written, skip_special_tokens=True)
            line = {"id": f"{prompt['id']}/{sample}", "kind": prompt["kind"], "gold": prompt["gold"], "prompt": prompt["prompt"]}
            lines.append(line | {"response": text, "is_truncated": not has_ended})
    return lines


def grade(lines: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Grade lines with `prism grade`; return them with their outcome."""
    asked = out.with_suffix(".ungraded.jsonl")
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.unlink(missing_ok=True)
    subprocess.run(["prism", "grade", asked, "--out", out], check=True, stdout=subprocess.DEVNULL)
    asked.unlink()
    return [json.loads(line) for line in out.read_text().splitlines()]


def show(graded: dict[str, list[dict[str, Any]]], num_prompts: int) -> None:
    """Print each model's pass rate, and the first problem that the last model but one got wrong and the last one gets right."""
    print(f"{num_prompts} held-out problems, {NUM_SAMPLES} responses to each at temperature 1, by plain transformers:")
    for name, lines in graded.items():
        print(f"  {name:<12} {sum(line['outcome'] == 'right' for line in lines) / len(lines):6.1%} right")
    if len(graded) < 2:
        return
    (before, earlier), (after, later) = list(graded.items())[-2:]
    for old, new in zip(earlier, later, strict=True):
        if old["outcome"] == "wrong" and new["outcome"] == "right":
            print(f"for example {old['prompt']}  {before}: {old['response']} (wrong)  {after}: {new['response']} (right)")
            return


if __name__ == "__main__":
    main()
