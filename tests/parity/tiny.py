"""A tiny random model of each family's real Hugging Face class."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {"rms_norm_eps": 1e-5}
MULTIPLIERS = {"attention_multiplier": 1 / 16, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 16.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MICRO = {
    "shared_intermediate_size": 160,
    "tie_word_embeddings": True,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    **DENSE,
    **MULTIPLIERS,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 160, "rope_parameters": LLAMA3, **DENSE}),
    "mistral": ("Mistral", {"intermediate_size": 160, "sliding_window": 16, "head_dim": 16, **DENSE}),
    "mistral_small": ("Mistral", {"intermediate_size": 160, "sliding_window": None, "head_dim": 24, **DENSE}),
    "granite": ("Granite", {"intermediate_size": 160, "tie_word_embeddings": True, **DENSE, **MULTIPLIERS}),
    "granite_micro": ("GraniteMoeHybrid", {"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope", **MICRO}),
    "granite_h_micro": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "position_embedding_type": None,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 32,
            **MICRO,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
            "head_dim": 16,
            "intermediate_size": 160,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 32,
        },
    ),
    "qwen2": ("Qwen2", {"intermediate_size": 160, **DENSE}),
}


def random_model(name: str, **changes: Any) -> Any:
    """Return a family's tiny model (with other sizes), its norms moved off one so that a dropped norm would be seen, its Mamba mixers as trained ones are."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind, own = FAMILIES[name]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes}))
    ranges = {
        "norm": (0.5, 1.5),
        "dt_bias": (-9.0, -2.0),
        "A_log": (0.0, 2.77),
        "mixer.D": (-0.1, 0.1),
        "mamba.D": (-1.0, 1.0),
        "_proj.bias": (-0.5, 0.5),
    }
    for parameter_name, parameter in model.named_parameters():
        for part, (low, high) in ranges.items():
            if part in parameter_name:
                parameter.data.uniform_(low, high)
    return model
