"""Reinforcement learning on a device: python -m tests.gpu.rl FIXTURES WORK --group dense|hybrid|engines.

dense, hybrid: the toy of docs/RL.md through the command line, from a base model trained here; a run killed in the middle goes on bit for bit. What the
trust gate allows on a host it must allow here. engines: tokens per second of the embedded engine, and of Megatron-Core's where it is served, beside
transformers.generate.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import folder, sharded
from megatron_prism.core.config import GangConfig
from megatron_prism.generate import mcore
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Engine, Sampling, seed_of
from megatron_prism.jobs import convert
from megatron_prism.models import build
from megatron_prism.parallel import groups, host
from tests.gpu import options, runs
from tests.gpu.options import ROOT, Options
from tests.gpu.report import check

CONFIGS, RUNS = ROOT / "configs" / "tiny" / "rl", Path("runs/quickstart_rl")
KEPT = ("reward", "loss", "grad_norm", "kl", "ratio", "entropy")
NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS = 32, 4, 64


def main(given: Options) -> None:
    """Run one group."""
    if given.group == "engines":
        for name in ("llama", "nemotron_h"):
            engines(given, name)
    elif importlib.util.find_spec("math_verify") is None:
        with check(f"rl {given.group}", "learns") as result:
            result.skip("math-verify is not installed: pip install 'megatron_prism[rl]', or carry it beside the site folder")
    else:
        toy(given, "" if given.group == "dense" else "hybrid_")
    sys.stdout.flush()
    os._exit(0)


def toy(given: Options, kind: str) -> None:
    """Train base and mid, learn by RL, and go on after a kill."""
    os.chdir(given.work)  # the configs' paths are relative
    with check(f"rl {given.group}", "base and mid") as result:
        command = [sys.executable, ROOT / "examples" / "quickstart_rl_corpus.py", RUNS / "corpus"]
        subprocess.run(command, env=runs.environment(), check=True, capture_output=True)
        for name in ("base_mixture", "mid_mixture"):
            runs.must(runs.prism("prepare", CONFIGS / f"{name}.yaml"))
        for name in ("train_prompts", "heldout_prompts"):
            runs.must(runs.prism("prompts", CONFIGS / f"{name}.yaml"))
        for name in ("base", "mid"):
            result.figures[f"{name}_s"] = runs.must(
                runs.prism("train", CONFIGS / f"{kind}{name}.yaml", *(["steps=25"] if given.tiny else []))
            ).seconds
        result.ok = True
    config, few = CONFIGS / f"{kind}rl.yaml", ["steps=4"] if given.tiny else []
    with check(f"rl {given.group}", "learns") as result:
        result.figures["seconds"] = runs.must(runs.prism("rl", config, "log.interval=1", "run_dir=rl", *few)).seconds
        lines = metrics("rl")
        rates = [line["valid/math/pass_at_1"] for line in lines if "valid/math/pass_at_1" in line]
        steps = [line for line in lines if line.get("kept_groups")]
        result.figures |= {"held_out": [rates[0], rates[-1]], "ratio": sorted({line["ratio"] for line in steps})}
        result.figures["sampler_kl"] = max((line["sampler_kl"] for line in steps), default=0.0)
        result.figures["rollout_tokens_per_s"] = sorted(line["rollout_tokens_per_s"] for line in lines if "loss" in line)[-1]
        result.ok = set(result.figures["ratio"]) <= {1.0} and (given.tiny or rates[-1] >= 0.9)
    with check(f"rl {given.group}", "killed, it goes on bit for bit") as result:
        # without `deterministic` an embedding's gradient and a convolution's are sums in any order on a device
        words = ["log.interval=1", "validation.prompts=null", "save.interval=2", "steps=6", "deterministic=true"]
        runs.must(runs.prism("rl", config, "run_dir=whole", *words))
        child = subprocess.Popen([*runs.PRISM, "rl", str(config), "run_dir=killed", *words], env=runs.environment(), start_new_session=True)
        while child.poll() is None and len(metrics("killed")) < 3:
            time.sleep(0.05)
        runs.kill(child)
        result.figures["steps_before"] = len(metrics("killed"))
        runs.must(runs.prism("rl", config, "run_dir=killed", *words))
        result.ok = curve("killed") == curve("whole") != curve("rl")


def metrics(run: str) -> list[dict[str, Any]]:
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def curve(run: str) -> list[list[float]]:
    return [[line.get(name, 0.0) for name in KEPT] for line in metrics(run) if "loss" in line]


def engines(given: Options, name: str) -> None:
    """Measure tokens per second of the engines and of transformers on the same random weights and prompts, in turn."""
    from bench import generate

    with check("rl engines", f"{name}: tokens per second") as result:
        hf = generate.hf_model(name, 64 if given.tiny else 2048).to(torch.bfloat16)
        hf.save_pretrained(given.work / name / "hf")
        convert.run_import(given.work / name / "hf", given.work / name / "ckpt", dry_run=False)
        hf = hf.to(host.device()).eval()
        hf.generation_config.eos_token_id = None
        max_tokens = 8 if given.tiny else 256
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, generate.VOCAB_SIZE, (NUM_PROMPTS, PROMPT_TOKENS), generator=generator)
        with groups.gang(config := GangConfig(precision="bf16")) as grid:
            sizes = folder.read(given.work / name / "ckpt").model
            chunks = build.build(sizes, grid, config)
            sharded.load_weights(given.work / name / "ckpt", chunks)
            rows = NUM_PROMPTS * NUM_SAMPLES
            sides: dict[str, Engine] = {"cached": Cached(chunks, sizes, grid, num_rows=rows)}
            if lacking := [*mcore.unsupported(sizes, 1), *mcore.absent(sizes, "bf16")]:
                result.figures["mcore"] = f"not here: {lacking[0]}"
            else:
                sides["mcore"] = mcore.MCore(chunks, sizes, grid, 1024, host.total_memory_bytes() // 4, num_rows=rows)
            sampling, seeds = Sampling(max_tokens=max_tokens, temperature=1.0), [seed_of(0, number) for number in range(NUM_PROMPTS)]

            def ours(engine: Engine) -> int:
                rollouts = engine.generate(prompts.tolist(), NUM_SAMPLES, sampling, seeds)
                return sum(len(rollout.token_ids) for rollout in rollouts)

            def theirs() -> int:
                drawn = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_return_sequences": NUM_SAMPLES}
                with torch.no_grad():
                    return hf.generate(prompts.to(hf.device), max_new_tokens=max_tokens, pad_token_id=0, **drawn)[:, PROMPT_TOKENS:].numel()

            for _ in range(2):  # the second time is the one that counts
                for side, run in [*((side, partial(ours, engine)) for side, engine in sides.items()), ("transformers", theirs)]:
                    began = time.perf_counter()
                    count = run()
                    if host.has_cuda():
                        torch.cuda.synchronize()
                    result.figures[side] = count / (time.perf_counter() - began)
        result.ok = True


if __name__ == "__main__":
    main(options.read())
