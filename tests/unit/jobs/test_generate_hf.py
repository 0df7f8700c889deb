"""`prism generate --hf`, the oracle: the model's own choice alone, up to any end token that the folder names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prism.data import tokenizer
from megatron_prism.generate.engine import Sampling
from megatron_prism.jobs import generate

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
