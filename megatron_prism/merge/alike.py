"""What parents must have in common, and what they may differ in: architecture, config.json, tokenizer. Nothing differs in silence."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_prism.checkpoint.at_rest import CONFIG, AtRest
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import Problem
from megatron_prism.core.manifest import sha256_file
from megatron_prism.data import tokenizer
from megatron_prism.hf.files import read_object

# What the same weights compute depends on these; every other field of ModelConfig but SAID changes what the weights are.
MEANING = {
    "norm_epsilon",
    "rotary_base",
    "rope_scaling",
    "yarn",
    "window_size",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "tie_word_embeddings",
}
SAID = {"max_position_embeddings", "init_method_std"}
# keys of config.json that say nothing of the model, or that ModelConfig has under one name for two spellings
NOT_COMPARED = {
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "architectures",
    "dtype",
    "torch_dtype",
}
SAID_FILES = ("generation_config.json", "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json")
NAME_IT = "--config-from says whose to take, knowing that the other's weights were trained with theirs"


def problems(origin: AtRest, other: AtRest, place: str, is_named: bool) -> list[Problem]:
    """Return why a parent cannot be merged into a model that has the origin's config and tokenizer.

    place: the parent's key. is_named: the user has said by --config-from that the origin's config holds.
    """
    differing = list(_fields(origin, other, place, is_named))
    return [*differing, *([] if origin.model.vocab_size != other.model.vocab_size else _vocabulary(origin, other, place, is_named))]


def _fields(origin: AtRest, other: AtRest, place: str, is_named: bool) -> Iterator[Problem]:
    ours, theirs = _comparable(origin.model), _comparable(other.model)
    for field, value in theirs.items():
        if value == ours[field] or field in SAID:
            continue
        where, found, required = f"{place} ({other.path}): {field}", str(value), f"{ours[field]}, as in {origin.path}"
        if field == "family":
            yield Problem(where, f"{value}, another architecture", required, "only models of one architecture can be merged")
        elif field not in MEANING:
            yield Problem(where, found, required, "only tensors of one shape and meaning can be merged")
        elif field == "tie_word_embeddings" and origin.model.tie_word_embeddings:
            fix = f"the merge would lose its head: --config-from {other.path} keeps both heads apart"
            yield Problem(where, found, required, fix)
        elif not is_named:
            fix = f"the merge gets a head of its own, {other.path}'s embedding standing for its head: say so by --config-from {origin.path}"
            yield Problem(where, found, required, fix if field == "tie_word_embeddings" else NAME_IT)


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Return an architecture's fields, without what changes speed alone."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return fields if model.mamba is None else {**fields, "mamba": dataclasses.replace(model.mamba, chunk_size=1)}


def _vocabulary(origin: AtRest, other: AtRest, place: str, is_named: bool) -> Iterator[Problem]:
    """Yield a problem where the same row of both embeddings stands for different tokens. --config-from settles added tokens alone."""
    if _sum(origin, tokenizer.FILE) == _sum(other, tokenizer.FILE) is not None:
        return
    ours, theirs = _tokens(origin), _tokens(other)
    if not ours or not theirs:
        yield from _sentencepiece(origin, other, place, is_named)
        return
    differing = sorted(id for id, (token, _) in theirs.items() if id in ours and ours[id][0] != token)
    if not differing or (is_named and all(ours[id][1] and theirs[id][1] for id in differing)):
        return
    id = differing[0]
    where = f"{place} ({other.path}): {tokenizer.FILE}"
    found = f"{len(differing)} ids that are other tokens, such as {id}: {reprlib.repr(theirs[id][0])}"
    fix = NAME_IT if all(ours[id][1] and theirs[id][1] for id in differing) else "only models of one vocabulary can be merged"
    yield Problem(where, found, f"{reprlib.repr(ours[id][0])}, as in {origin.path}", fix)


def _tokens(parent: AtRest) -> Mapping[int, tuple[str, bool]]:
    """Return the tokens of a parent's tokenizer.json by id, and whether each is an added one; nothing where it has no such file."""
    path = parent.assets / tokenizer.FILE
    if not path.is_file():
        return {}
    described = read_object(path, "a tokenizer of the `tokenizers` library")
    model = described.get("model") or {}
    vocab = model.get("vocab") or {}
    plain = {index: part[0] for index, part in enumerate(vocab)} if isinstance(vocab, list) else {id: token for token, id in vocab.items()}
    added = {entry["id"]: (entry["content"], True) for entry in described.get("added_tokens") or []}
    return {**{id: (token, False) for id, token in plain.items()}, **added}


def _sentencepiece(origin: AtRest, other: AtRest, place: str, is_named: bool) -> Iterator[Problem]:
    for name in tokenizer.OTHER_FILES:
        ours, theirs = origin.assets / name, other.assets / name
        if not is_named and ours.is_file() and theirs.is_file() and sha256_file(ours) != sha256_file(theirs):
            yield Problem(f"{place} ({other.path}): {name}", "another file", f"the same as in {origin.path}", NAME_IT)


def notes(origin: AtRest, other: AtRest) -> list[str]:
    """Return, in words, what a parent has otherwise than the one whose files the merge takes."""
    said = [
        f"{field} {getattr(origin.model, field)}, and {getattr(other.model, field)} there"
        for field in sorted({*SAID, *MEANING})
        if getattr(origin.model, field) != getattr(other.model, field)
    ]
    ours, theirs = read_object(origin.assets / CONFIG, "a config"), read_object(other.assets / CONFIG, "a config")
    named = {
        "max_position_embeddings",
        "initializer_range",
        "tie_word_embeddings",
        "rms_norm_eps",
        "sliding_window",
        *NOT_COMPARED,
        *MEANING,
    }
    said += [
        f"{key} {json.dumps(ours.get(key))[:80]}, and {json.dumps(theirs.get(key))[:80]} there"
        for key in sorted({*ours, *theirs} - named)
        if ours.get(key) != theirs.get(key)
    ]
    dtypes = [", ".join(parent.plan.summary()["dtypes"]) for parent in (origin, other)]
    if dtypes[0] != dtypes[1]:
        said.append(f"weights in {dtypes[0]}, and {dtypes[1]} there")
    files = [name for name in (tokenizer.FILE, *tokenizer.OTHER_FILES, *SAID_FILES) if _sum(origin, name) != _sum(other, name)]
    if own := [name for name in files if _sum(origin, name) is not None]:
        said.append(f"its own {', '.join(own)}")
    if lacking := [name for name in files if _sum(origin, name) is None]:
        said.append(f"no {', '.join(lacking)}")
    return [f"differs from {other.path}, and the merge takes {origin.path}'s: {text}" for text in said]


def _sum(parent: AtRest, name: str) -> str | None:
    path = parent.assets / name
    return sha256_file(path) if path.is_file() else None
