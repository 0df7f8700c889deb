"""Write docs/models/NAME.md, a page for each of the seven models, of what was checked on a tiny model of its architecture, on this machine.

Run: python tools/verification_cards.py [--models NAME...] [--only-pages]      (needs transformers and the repository's tests)

The checks are the jobs behind `prism convert import`, `export`, `verify` and `prism generate`, called in this process; the layouts run in one gang of two
ranks. The figures are kept in docs/models/checks.json, and the pages are written from them (--only-pages). The models are those of tests/parity/tiny.py: random
weights. Nothing is said of the published weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from smoke import version, write_tokenizer
from verification_pages import FIGURES, ROOT, write_pages

sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # read at import

MODELS = {  # a preset, and its tiny model
    "granite-3.3-8b": "granite",
    "granite-4.0-h-micro": "granite_h_micro",
    "granite-4.0-micro": "granite_micro",
    "llama-3.1-8b": "llama",
    "mistral-7b-v0.1": "mistral",
    "mistral-small-24b": "mistral_small",
    "nemotron-h-8b": "nemotron_h",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 with sequence parallelism": {"tp": 2, "sequence_parallel": True},
    "PP2": {"pp": 2},
    "CP2": {"cp": 2},
}
TOKENS = [(7 * index * index + 3) % 300 for index in range(96)]
PROMPT, GENERATED = "The sum of 3 and 14 is", 64


def main() -> None:
    """Check the models, keep the figures, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only-pages", action="store_true", help="write the pages from the figures that are kept")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of:
        layouts(given.rank_of)
        return
    if not given.only_pages:
        kept = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
        with tempfile.TemporaryDirectory() as folder:
            kept |= checked(Path(folder), given.models)
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps({name: kept[name] for name in MODELS if name in kept}, indent=1) + "\n")
    write_pages()


def checked(work: Path, names: list[str]) -> dict[str, Any]:
    """Return the figures of models, made and checked in a folder."""
    figures = {}
    for name in names:
        print(f"cards: {name}", flush=True)
        figures[name] = one_process(work / name, name)
    from megatron_prism.parallel.launch import start_gang

    if code := start_gang(2, [__file__, "--rank-of", str(work)]):
        sys.exit(f"the gang of two ranks ended with exit code {code}")
    versions = {name: version(name) for name in ("torch", "megatron-core", "transformers")} | {"python": sys.version.partition(" ")[0]}
    for name, split in json.loads((work / "layouts.json").read_text()).items():
        figures[name] |= {"layouts": split, "versions": versions, "date": datetime.now(UTC).date().isoformat()}
    return figures


def one_process(home: Path, name: str) -> dict[str, Any]:
    """Return what is checked of a model in one process. home: a new folder, whose hf and ckpt the layouts need."""
    import torch

    from megatron_prism.checkpoint import folder, reference
    from megatron_prism.jobs import convert

    model = tiny(name)
    home.mkdir(parents=True)
    sums = [f"The sum of {a} and {b} is {a + b}." for a in range(40) for b in range(10)]
    write_tokenizer(home / "tokenizer", sums)
    for dtype in (torch.bfloat16, torch.float32):
        hf = home / ("hf" if dtype == torch.float32 else "hf_bf16")
        model.to(dtype).save_pretrained(hf, max_shard_size="200KB")
        shutil.copytree(home / "tokenizer", hf, dirs_exist_ok=True)
    trips = [round_trip(home / hf, home / ckpt) for hf, ckpt in (("hf_bf16", "ckpt_bf16"), ("hf", "ckpt"))]
    other = changed(home)
    found, control = (convert.run_verify(hf, home / "ckpt", len(TOKENS), "fp32", None, 1, 1, 0) for hf in (home / "hf", other))
    for file, hf in (("theirs", home / "hf"), ("control", other)):
        torch.save(log_probs_of(reference.load(hf, torch.float32)), home / f"{file}.pt")
    shape = folder.read(home / "ckpt").model
    return {
        "family": shape.family,
        "shape": f"{shape.num_layers} layers, hidden size {shape.hidden_size}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "round_trip": {"fp32": trips[1], "bf16": trips[0]},
        "logits": {
            key: found[key] for key in ("num_tokens", "max_abs_difference", "max_abs_logit", "relative_difference", "tolerance", "passed")
        },
        "control": {key: control[key] for key in ("relative_difference", "passed")},
        "generation": generation(home, other),
        "rotary": rotary(home, name),
    }


def tiny(name: str) -> Any:
    """Return a preset's tiny model.

    Granite's layers add .22 of their output to what its tied head made: with weights of the usual size it would repeat its last token,
    whatever the layers compute. They are four times as large.
    """
    from transformers.utils import logging

    from tests.parity.tiny import random_model

    logging.disable_progress_bar()
    model = random_model(MODELS[name])
    if getattr(model.config, "residual_multiplier", 1) != 1:
        for key, parameter in model.named_parameters():
            if ".layers." in key and parameter.ndim == 2:
                parameter.data *= 4
    return model


def round_trip(hf: Path, ckpt: Path) -> dict[str, Any]:
    """Import a folder and export it again. Return whether each of its files of weights has the same bytes."""
    from megatron_prism.core.manifest import sha256_file
    from megatron_prism.jobs import convert

    back = hf.with_name(f"{hf.name}_back")
    convert.run_import(hf, ckpt, dry_run=False)
    convert.run_export(ckpt, back, dry_run=False)
    files = {path.name for path in hf.glob("*.safetensors")}
    same = [sha256_file(hf / name) == sha256_file(back / name) for name in sorted(files)]
    return {"num_files": len(files), "is_equal": all(same) and files == {path.name for path in back.glob("*.safetensors")}}


def changed(home: Path) -> Path:
    """Return a copy of a folder whose first value projection has its rows in another order: what every comparison must see."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(home / "hf", home / "changed")
    for path in sorted((home / "changed").glob("*.safetensors")):
        tensors = load_file(path)
        if name := next((name for name in tensors if name.endswith("v_proj.weight")), None):
            save_file({**tensors, name: tensors[name].flip(0).contiguous()}, path, metadata={"format": "pt"})
            return home / "changed"
    raise AssertionError(f"no value projection in {home}")


def log_probs_of(model: Any) -> Any:
    """Return transformers' log-probability of each next token of TOKENS."""
    import torch

    with torch.no_grad():
        logits_SV = model(torch.tensor([TOKENS])).logits[0].float()
    return torch.log_softmax(logits_SV[:-1], -1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


def generation(home: Path, other: Path) -> dict[str, Any]:
    """Return whether greedy generation is transformers'; and the changed folder's, which must differ."""
    from megatron_prism.generate.engine import Sampling
    from megatron_prism.jobs import generate

    greedy = Sampling(max_tokens=GENERATED)
    ours = generate.from_checkpoint(home / "ckpt", PROMPT, greedy, 0, 1, 1)
    theirs, control = (generate.from_hf(hf, PROMPT, greedy, 0) for hf in (home / "hf", other))
    return {"num_tokens": GENERATED, "is_equal": ours == theirs, "control_is_equal": ours == control}


def rotary(home: Path, name: str) -> dict[str, Any]:
    """Return the check of rotary positions of the tiny model as each long-context recipe of its preset extends it, to 131,072 positions.

    config.json is what a run writes beside its checkpoints, and its export copies.
    """
    from megatron_prism.checkpoint import folder
    from megatron_prism.core.check.train import check_extension
    from megatron_prism.core.config import TrainConfig
    from megatron_prism.core.load import load
    from megatron_prism.core.manifest import read_json, write_json
    from megatron_prism.families import dense
    from megatron_prism.jobs import convert

    before, made = folder.read(home / "ckpt").model, {}
    for recipe in sorted((ROOT / "configs" / "recipes" / name).glob("longctx*.yaml")):
        if recipe.stem == "longctx_attention":  # trains fewer parameters of the same model
            continue
        init = load(recipe, TrainConfig, []).init
        if problems := list(check_extension(init, before)):
            raise AssertionError(problems)
        hf, ckpt = home / recipe.stem, home / f"ckpt_{recipe.stem}"
        shutil.copytree(home / "hf", hf)
        write_json(hf / "config.json", dense.extended(read_json(hf / "config.json"), before, init.extend(before)))
        convert.run_import(hf, ckpt, dry_run=False)
        found = convert.run_verify(hf, ckpt, len(TOKENS), "fp32", None, 1, 1, 0)
        text = (hf / "config.json").read_text()
        (hf / "config.json").write_text(json.dumps(_turned(json.loads(text))))
        control = convert.run_verify(hf, ckpt, len(TOKENS), "fp32", None, 1, 1, 0)
        made[recipe.stem] = {
            "positions": folder.read(ckpt).model.max_position_embeddings,
            "has_rotary": before.position_embedding == "rope",
            **{key: found[key] for key in ("rotary_transformers", "rotary_v4_reading", "relative_difference", "passed")},
            "control": control["rotary_transformers"],
        }
    return made


def _turned(config: Any) -> Any:
    """Return a config with twice each rotary base."""
    if isinstance(config, dict):
        return {key: 2 * value if key == "rope_theta" else _turned(value) for key, value in config.items()}
    return config


def layouts(work: Path) -> None:
    """Compare each model's log-probabilities on each layout with those of transformers: a rank of the gang of two."""
    import torch

    from megatron_prism.checkpoint import folder, parity
    from megatron_prism.core.check.model import check_split
    from megatron_prism.core.config import GangConfig, ParallelConfig
    from megatron_prism.models.forward import log_probs
    from megatron_prism.parallel.groups import grid, join

    join()
    tokens_BS = torch.tensor([TOKENS])
    batch = {"tokens": tokens_BS, "position_ids": torch.arange(len(TOKENS))[None], "labels": tokens_BS.roll(-1, 1)}
    figures: dict[str, Any] = {}
    for home in sorted(path.parent for path in work.glob("*/ckpt")):
        theirs_S, control_S = (torch.load(home / f"{name}.pt", weights_only=True) for name in ("theirs", "control"))
        figures[home.name] = {}
        for layout, parallel in LAYOUTS.items():
            if problems := check_split(folder.read(home / "ckpt").model, parallel.get("tp", 1), parallel.get("pp", 1), "tp", "pp"):
                figures[home.name][layout] = {"refused": problems[0].fix or str(problems[0])}
                continue
            config = GangConfig(parallel=ParallelConfig(**parallel), precision="fp32")
            with grid(config) as groups:
                ours_S = log_probs(parity.checkpoint_model(home / "ckpt", config, groups), [batch], groups)[0][0, :-1]
            apart, control = (float((ours_S - other_S).abs().max()) for other_S in (theirs_S, control_S))
            figures[home.name][layout] = {"max_abs_difference": apart, "control": control, "num_tokens": len(theirs_S)}
    if torch.distributed.get_rank() == 0:
        (work / "layouts.json").write_text(json.dumps(figures))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
