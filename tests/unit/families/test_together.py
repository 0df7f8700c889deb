"""Keys of config.json that mean something only together, and keys that a class never reads: transformers' own classes are asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.errors import CheckpointError, InputError, raise_problems
from megatron_prism.families import dense, registry
from tests.unit.checkpoint.foreign import LLAMA3

DEFAULT = {"rope_type": "default", "rope_theta": 777.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture
def silent(needed: dict[str, Any]) -> dict[str, Any]:
    return {**needed, "num_key_value_heads": 4, "max_position_embeddings": 131072}


def read(kind: str, config: dict[str, Any]) -> Any:
    """Return the architecture of a config.json of a class, checked."""
    named = {"architectures": [f"{kind}ForCausalLM"], **config}
    model = registry.of_hf(named, "config").read_config(named, "config")
    raise_problems([replace(problem, where=f"config:{dense.key_of(problem.where, config)}") for problem in check_architecture(model, "")])
    return model


ROTARY: dict[str, dict[str, Any]] = {
    "rope_parameters": {"rope_parameters": DEFAULT},
    "rope_scaling takes the place of rope_parameters": {"rope_parameters": LLAMA3, "rope_scaling": DEFAULT},
    "the base beside is rope_scaling's too": {"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "default"}, "rope_theta": 777.0},
    "an empty one does not": {"rope_parameters": DEFAULT, "rope_scaling": {}},
    "nor null": {"rope_parameters": DEFAULT, "rope_scaling": None},
    "the base beside": {"rope_scaling": {"type": "default"}, "rope_theta": 555.0},
    "the base within comes first": {"rope_parameters": DEFAULT, "rope_theta": 555.0},
    "the base beside rope_parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 555.0},
    "llama3": {"rope_parameters": LLAMA3},
    "llama3 of transformers 4": {"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}, "rope_theta": 3e5},
    "llama3 without the original positions": {
        "rope_parameters": {key: value for key, value in LLAMA3.items() if not key.startswith("original")},
        "max_position_embeddings": 8192,
    },
    "the original positions beside": {
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 8192,
    },
    "rope_type before type": {"rope_parameters": {"type": "linear", "factor": 2.0, **DEFAULT}},
    "yarn": {"rope_parameters": YARN},
    "yarn of transformers 4": {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 3e5},
    "yarn over rope_parameters": {"rope_scaling": YARN, "rope_parameters": DEFAULT, "rope_theta": 777.0},
    "yarn's ramp": {"rope_parameters": {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False}},
    "yarn's options of no value": {"rope_parameters": {**YARN, "beta_fast": 0, "beta_slow": None, "attention_factor": None}},
    "yarn's factor on attention": {"rope_parameters": {**YARN, "attention_factor": 1.25, "mscale": 0.7, "mscale_all_dim": 0.5}},
    "its two parts": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}},
    "one part means nothing": {"rope_parameters": {**YARN, "mscale": 0.7}},
    "nor do parts of 0": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0}},
    "yarn's original positions beside": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 4096,
    },
    "yarn by an explicit factor": {"rope_parameters": YARN, "max_position_embeddings": 32768},
    "yarn by 1": {"rope_parameters": {**YARN, "factor": 1.0}},
    "a part of a head, which the default does not read": {"rope_parameters": DEFAULT, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("keys", ROTARY.values(), ids=ROTARY)
def test_rotary_keys_read_as_transformers_reads_them(silent: dict[str, Any], kind: str, keys: dict[str, Any]) -> None:
    import copy

    import torch
    import transformers

    from megatron_prism.models import rope

    ours = read(kind, {**silent, **keys})
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**silent, **keys}))
    theirs = getattr(getattr(transformers.models, kind.lower()), f"modeling_{kind.lower()}")
    rotary = getattr(theirs, f"{kind}RotaryEmbedding")(config)
    assert torch.equal(rope.inverse_frequencies(ours), rotary.inv_freq)
    assert rope.attention_factor(ours) == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": DEFAULT}, "rope_scaling.rope_type"),
        ({"rope_scaling": YARN, "rope_parameters": DEFAULT}, "rope_parameters.rope_theta"),  # silent: transformers takes the base 10,000
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.original_max_position_embeddings"),  # silent: takes 131,072
        ({"rope_parameters": {**YARN, "factor": None}}, "rope_parameters.factor"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, "rope_parameters.factor"),
        ({"rope_parameters": {**YARN, "beta_fast": 0.5}}, "rope_parameters.beta_fast"),
        ({"rope_parameters": {**YARN, "attention_factor": 0.0}}, "rope_parameters.attention_factor"),
        ({"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {**LLAMA3, "rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {key: value for key, value in LLAMA3.items() if key != "factor"}}, "rope_parameters.factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "rope_scaling.high_freq_factor"),
        (
            {"rope_parameters": {key: value for key, value in LLAMA3.items() if not key.startswith("original")}},
            "rope_parameters.original_max_position_embeddings",  # silent: takes 131,072
        ),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 4096}, "rope_scaling"),
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": DEFAULT}, "layer_types": ["full_attention"] * 2}, "rope_parameters"),
    ],
)
def test_rotary_keys_that_cannot_be_honoured_are_refused_by_name(silent: dict[str, Any], keys: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"config:{named}: found"):
        read("Llama", {**silent, **keys})


UNREAD = {
    "Mistral": {"attention_bias": True, "mlp_bias": True, "layer_types": ["full_attention"] * 2, "use_sliding_window": True},
    "Qwen2": {"attention_bias": True, "mlp_bias": True},
    "GraniteMoeHybrid": {"mlp_bias": True, "intermediate_size": 7},
}
READ = [(kind, key) for kind in ("Llama", "Granite") for key in ("attention_bias", "mlp_bias")]
HYBRID = {"shared_intermediate_size": 96, "layer_types": ["full_attention"] * 2, "num_local_experts": 0, "position_embedding_type": "rope"}


def logits(kind: str, config: dict[str, Any]) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")._from_config(
        getattr(transformers, f"{kind}Config")(**config), attn_implementation="eager"
    )
    return made.eval()(torch.arange(12)[None]).logits


@pytest.mark.parametrize("kind", UNREAD)
def test_a_key_that_the_class_does_not_read_changes_nothing(silent: dict[str, Any], kind: str) -> None:
    import torch

    config = {**silent, "max_position_embeddings": 64, **(HYBRID if kind == "GraniteMoeHybrid" else {})}
    assert read(kind, {**config, **UNREAD[kind]}) == read(kind, config)
    assert torch.equal(logits(kind, {**config, **UNREAD[kind]}), logits(kind, config))


@pytest.mark.parametrize(("padding", "is_refused"), [(127, False), (None, False), (-1, False), (128, True), (151643, True)])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Granite", "Qwen2"])
def test_a_padding_token_without_a_row_is_refused_as_transformers_refuses_it(
    silent: dict[str, Any], kind: str, padding: int | None, is_refused: bool
) -> None:
    config = {**silent, "max_position_embeddings": 64, "pad_token_id": padding}
    if not is_refused:
        logits(kind, config)
        assert read(kind, config) == read(kind, {**config, "pad_token_id": None})
        return
    with pytest.raises(AssertionError, match="Padding_idx"):
        logits(kind, config)
    with pytest.raises(CheckpointError, match=f"config:pad_token_id: found {padding}; required an id below vocab_size 128"):
        read(kind, config)


@pytest.mark.parametrize(("kind", "key"), [*READ, ("GraniteMoeHybrid", "attention_bias")])
def test_a_key_that_the_class_reads_is_refused(silent: dict[str, Any], kind: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"config:{key}: found True"):
        read(kind, {**silent, **(HYBRID if kind == "GraniteMoeHybrid" else {}), key: True})


@pytest.mark.parametrize(
    ("keys", "is_windowed"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, True),
        ({"use_sliding_window": True, "max_window_layers": 2}, False),
        ({"use_sliding_window": True}, False),  # 28 layers without a window, by the class's own default
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, False),
        ({"use_sliding_window": False, "max_window_layers": 0}, False),
        ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2}, False),
        ({"use_sliding_window": True, "max_window_layers": 28, "layer_types": ["full_attention", "sliding_attention"]}, True),
    ],
)
def test_qwen2s_window_is_what_its_four_keys_make_of_it(silent: dict[str, Any], keys: dict[str, Any], is_windowed: bool) -> None:
    import transformers

    theirs = transformers.Qwen2Config(**{**silent, **keys})
    assert (theirs.sliding_window is not None and "sliding_attention" in theirs.layer_types) == is_windowed
    if is_windowed:
        with pytest.raises(CheckpointError, match="config:(use_sliding_window|layer_types): found"):
            read("Qwen2", {**silent, **keys})
    else:
        assert read("Qwen2", {**silent, **keys}) == read("Qwen2", silent)


@pytest.mark.parametrize("family", registry.FAMILIES, ids=lambda family: family.NAME)
def test_a_familys_model_type_is_that_of_its_class(family: Any) -> None:
    import transformers

    (name,) = family.ARCHITECTURES
    assert getattr(transformers, name.replace("ForCausalLM", "Config")).model_type == family.MODEL_TYPE


@pytest.mark.parametrize(
    "named",
    [
        ["LlamaForCausalLM"],
        ["FSDPLlamaForCausalLM"],
        ["LlamaModel"],
        ["FSDPLlamaModel"],
        ["FullyShardedDataParallel"],
        ["DistributedDataParallel"],
        ["OptimizedModule"],
        ["PeftModelForCausalLM"],
        [],
        None,
    ],
)
def test_a_wrapped_class_is_known_by_its_model_type(named: Any) -> None:
    assert registry.of_hf({"architectures": named, "model_type": "llama"}, "config").NAME == "llama"


@pytest.mark.parametrize(
    ("named", "kind", "key"),
    [
        (["LlamaForCausalLM"], "mistral", "model_type"),
        (["FSDPLlamaForCausalLM"], "mistral", "model_type"),
        (["MistralForCausalLM"], "mistral3", "model_type"),
        (["LlamaForCausalLM"], "", "model_type"),
        (["LlamaForSequenceClassification"], "llama", "architectures"),
        (["OptimizedModule"], None, "architectures"),
        (["OptimizedModule", "GemmaForCausalLM"], "llama", "architectures"),
        (None, "gemma", "architectures"),
        (["FSDPGemmaForCausalLM"], "gemma", "architectures"),
    ],
)
def test_two_names_for_one_class_must_agree(named: Any, kind: Any, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"config:{key}: found"):
        registry.of_hf({"architectures": named, "model_type": kind}, "config")


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        ("Llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ("Llama", {"rope_theta": "1e6"}, "rope_theta"),
        ("Llama", {"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta"),
        ("Llama", {"num_key_value_heads": "4"}, "num_key_value_heads"),
        ("Llama", {"head_dim": 0.5}, "head_dim"),
        ("Llama", {"initializer_range": "x"}, "initializer_range"),
        ("Mistral", {"sliding_window": "all"}, "sliding_window"),
    ],
)
def test_a_wrong_value_is_named_by_the_key_that_config_json_has(
    silent: dict[str, Any], kind: str, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=f"config:{named}: found"):
        read(kind, {**silent, **keys})


@pytest.mark.parametrize("order", [("layer_types", "layers_block_type"), ("layers_block_type", "layer_types")])
def test_the_two_names_of_a_hybrids_layers_must_agree(silent: dict[str, Any], order: tuple[str, str]) -> None:
    """To transformers they are one key, and which of the two it takes is hard to see."""
    kinds = ["linear_attention", "full_attention"]
    config = {**{key: value for key, value in silent.items() if key != "num_hidden_layers"}, "mamba_num_heads": 8, "mamba_head_dim": 32}
    assert read("NemotronH", {**config, **dict.fromkeys(order, kinds)}).layer_pattern == "M*"
    with pytest.raises(CheckpointError, match="config:layers_block_type: found .*the same as layer_types"):
        read("NemotronH", {**config, order[0]: kinds, order[1]: kinds[::-1]})
