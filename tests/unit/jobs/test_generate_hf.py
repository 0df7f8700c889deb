"""`prism generate --hf`, the oracle: the model's own choice alone, up to any end token that the folder names. And a gang's one checkpoint."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from megatron_prism.checkpoint import sharded
from megatron_prism.data import tokenizer
from megatron_prism.generate import cached
from megatron_prism.generate.engine import Sampling
from megatron_prism.jobs import generate
from megatron_prism.models import build
from megatron_prism.parallel import environment, groups

PROMPT = "2 + 2 ="


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> tuple[Path, Any]:
    """Return a folder of a tiny random model with a tokenizer, and the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(shutil.copytree(tiny_tokenizer, tmp_path_factory.mktemp("generate") / "hf"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    return folder, model


def greedy(folder: Path, model: Any, num_tokens: int = 12, **choices: Any) -> list[int]:
    """Return what the model itself continues with: each token the likeliest behind the ones before."""
    prompt = torch.tensor([tokenizer.encode_prompt(PROMPT, tokenizer.load(folder))])
    return model.generate(prompt, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **choices)[
        0, prompt.shape[1] :
    ].tolist()


def by_forward_passes(folder: Path, model: Any, prompt: str, num_tokens: int, mask_from: int | None = None) -> list[int]:
    """Return the likeliest tokens by whole forward passes. With mask_from, ids equal to it are masked: what from_hf must not do."""
    ids = tokenizer.encode_prompt(prompt, tokenizer.load(folder))
    length = len(ids)
    for _ in range(num_tokens):
        mask_1S = torch.tensor([[int(token != mask_from) for token in ids[:length]] + [1] * (len(ids) - length)])
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), attention_mask=mask_1S).logits[0, -1].argmax()))
    return ids[length:]


def said(folder: Path, ids: list[int]) -> str:
    spec = tokenizer.load(folder)
    return tokenizer.continuation(tokenizer.encode_prompt(PROMPT, spec), ids, spec)


def test_a_published_way_of_sampling_does_not_move_the_oracle(tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "repetition_penalty": 0.2, "temperature": 0.7, "top_k": 20})
    )
    ids = greedy(folder, model)
    assert greedy(folder, model, repetition_penalty=0.2) != ids
    assert generate.from_hf(folder, PROMPT, Sampling(max_tokens=12, temperature=0.0), 0) == said(folder, ids)


def test_a_generation_ends_at_a_token_that_one_file_names(tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    ids = greedy(folder, model)
    stop = next(token for at, token in enumerate(ids) if at > 1 and token not in ids[:at])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    assert (
        generate.from_hf(folder, PROMPT, Sampling(max_tokens=12, temperature=0.0), 0)
        == said(folder, ids[: ids.index(stop)])
        != said(folder, ids)
    )


def test_a_prompt_token_with_id_0_is_read(tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    (folder / "generation_config.json").unlink(missing_ok=True)
    prompt = f"<unk><unk>{PROMPT}"
    spec = tokenizer.load(folder)
    prompt_ids = tokenizer.encode_prompt(prompt, spec)
    assert prompt_ids[:2] == [0, 0]
    ids = by_forward_passes(folder, model, prompt, 12)
    assert by_forward_passes(folder, model, prompt, 12, mask_from=0) != ids
    text = generate.from_hf(folder, prompt, Sampling(max_tokens=12, temperature=0.0), 0)
    assert text == tokenizer.continuation(prompt_ids, ids, spec)


def test_all_ranks_load_the_checkpoint_that_rank_0_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is trained publishes another one meanwhile: two ranks would hold parts of two models."""
    model = SimpleNamespace(max_position_embeddings=64)
    older, newer = (SimpleNamespace(root=Path(name), assets=Path(name), model=model, facts={}) for name in ("step_1", "step_2"))
    loaded: list[Path] = []
    monkeypatch.setattr(generate.folder, "read", lambda _: newer)
    monkeypatch.setattr(generate, "_read", lambda *_: (SimpleNamespace(end_ids=(1,)), [5]))
    monkeypatch.setattr(generate.tokenizer, "continuation", lambda *_: "text")
    monkeypatch.setattr(environment, "set_variables", lambda _: None)
    monkeypatch.setattr(groups, "gang", lambda _: nullcontext())
    monkeypatch.setattr(groups, "from_first", lambda _: older)  # as rank 0 has it
    monkeypatch.setattr(build, "build", lambda *_: [])
    monkeypatch.setattr(sharded, "require_whole", loaded.append)
    monkeypatch.setattr(sharded, "load_weights", lambda root, _: loaded.append(root))
    monkeypatch.setattr(cached, "Cached", MagicMock(**{"return_value.generate.return_value": [MagicMock()]}))
    assert generate.from_checkpoint(Path("run"), PROMPT, Sampling(max_tokens=4), 0, 2, 1) == "text"
    assert loaded == [older.root] * 2
