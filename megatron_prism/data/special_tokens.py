"""The tokens that begin and end a text, as each file of a Hugging Face folder names them.

The files may disagree: a chat model often ends a turn with another token than its base model's end of text, and only one file names it.
A document ends with the first named token (`first_id`). A generation ends at any named token (`end_ids`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.hf.files import refusal

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
FILES = (CONFIG, "config.json", "generation_config.json")  # in order of precedence for a document's EOS, and for BOS
TokenToId = Callable[[str], int | None]
Ends = tuple[tuple[str, tuple[int, ...]], ...]  # (file name, the end tokens it names)


def first_id(folder: Path, role: Literal["bos", "eos"], token_to_id: TokenToId) -> int | None:
    """Return the first token of a role that FILES name, or None. Within one file a token's spelling takes precedence over its id.

    Raises: InputError naming a file that is not a JSON object, or names a token that the tokenizer lacks.
    """
    return next((token_id for name in FILES for token_id in _ids(folder / name, role, token_to_id)), None)


def end_ids(folder: Path, token_to_id: TokenToId) -> Ends:
    """Return the end-of-text tokens of each file that names any.

    Raises: InputError naming a file that is not a JSON object, or names a token that the tokenizer lacks.
    """
    named = ((name, tuple(dict.fromkeys(_ids(folder / name, "eos", token_to_id)))) for name in (*FILES, MAP))
    return tuple((name, ids) for name, ids in named if ids)


def spellings(folder: Path) -> dict[str, str]:
    """Return a folder's special tokens by key (bos_token, eos_token, ...), as a chat template sees them.

    MAP overrides CONFIG, unless CONFIG has added_tokens_decoder.
    Source: transformers 5.24, PreTrainedTokenizerBase._from_pretrained.
    """
    config = read_object(folder / CONFIG)
    named = config if "added_tokens_decoder" in config else {**config, **read_object(folder / MAP)}
    extra = named.get("extra_special_tokens")
    tokens = {key: value for key, value in named.items() if key.endswith("_token")} | (extra if isinstance(extra, dict) else {})
    return {key: spelled for key, value in tokens.items() if isinstance(spelled := _spelling(value), str)}


def read_object(path: Path) -> Mapping[str, Any]:
    """Return a file's JSON object; an empty one where there is no file.

    Raises: InputError where the file holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(refusal(path, "a JSON object") or Problem(str(path), f"no JSON ({error})", "a JSON object")) from None
    if not isinstance(values, dict):
        raise InputError(Problem(str(path), f"a JSON {type(values).__name__}", "a JSON object"))
    return values


def _ids(path: Path, role: str, token_to_id: TokenToId) -> Iterator[int]:
    values = read_object(path)
    token, named = _spelling(values.get(f"{role}_token")), values.get(f"{role}_token_id")
    if token is not None:
        if (token_id := token_to_id(str(token))) is None:
            raise InputError(Problem(f"{path}:{role}_token", repr(token), "a token of tokenizer.json"))
        yield token_id
    for token_id in named if isinstance(named, list) else [] if named is None else [named]:  # the first of several is the model's own
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise InputError(Problem(f"{path}:{role}_token_id", repr(token_id), "a token id"))
        if token_id >= 0:  # -1 stands for none in older configs
            yield token_id


def _spelling(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token  # a dict describes an added token
