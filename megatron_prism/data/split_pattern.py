"""The pattern by which tokenizer.json splits a text into words, where it is known to be another than the model was trained with.

Mistral Small 2501 to 2506 and their derivatives were published with LLaMA 3's pattern in place of Tekken's: `NaOH` is split otherwise than in
training. transformers warns of it; its own repair is `fix_mistral_regex=True`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prism.data.special_tokens import read_object

MISTRALS = ("mistral", "mistral3", "voxtral", "ministral", "ministral3", "pixtral")  # transformers' list of model_type, and its successors
MIN_VOCAB_SIZE = 100_000  # Tekken's has 131,072 tokens; Mistral's vocabularies before it have no such pattern
LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"  # Tekken's pattern begins otherwise: it tells capitals from small letters


def fault(folder: Path) -> str | None:
    """Say that a folder's tokenizer.json splits by a pattern that is known to be wrong for its model; None where it does not.

    Source: transformers 5.24, TokenizersBackend._patch_mistral_regex. It goes by version and vocabulary alone; here the pattern decides.
    """
    if read_object(folder / "config.json").get("model_type") not in MISTRALS:
        return None
    tokenizer = read_object(folder / "tokenizer.json")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, (dict, list)) or len(vocabulary) <= MIN_VOCAB_SIZE:
        return None
    if not any(pattern.startswith(LLAMA3) for pattern in _patterns(tokenizer.get("pre_tokenizer"))):
        return None
    repair = "AutoTokenizer.from_pretrained(DIR, fix_mistral_regex=True).save_pretrained(DIR)"
    return f"tokenizer.json splits texts by LLaMA 3's pattern, and not by Tekken's, as Mistral's models were trained: {repair} mends it"


def _patterns(pre_tokenizer: Any) -> Iterator[str]:
    """Yield the regular expressions of a pre-tokenizer and of those within it."""
    if not isinstance(pre_tokenizer, dict):
        return
    pattern = pre_tokenizer.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        yield pattern["Regex"]
    within = pre_tokenizer.get("pretokenizers")
    for part in within if isinstance(within, list) else ():
        yield from _patterns(part)
