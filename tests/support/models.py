"""The tiny models that tests train: their sizes, and the architectures that exactness is proved on."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 1024,
}

# Shorter than a chunk, between chunk and sequence, longer than every sequence.
SHORT_WINDOW, MIDDLE_WINDOW, LONG_WINDOW = 11, 45, 400

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, own rope": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "llama, tied, one kv head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, head_dim, no gqa": ("llama", {"head_dim": 24, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    "qwen2, window in one layer": (
        "qwen2", {"use_sliding_window": True, "sliding_window": SHORT_WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases, tied, head_dim": ("qwen3", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral, short window": ("mistral", {"sliding_window": SHORT_WINDOW}),
    "mistral, middle window": ("mistral", {"sliding_window": MIDDLE_WINDOW, "head_dim": 32}),
    "mistral, long window": ("mistral", {"sliding_window": LONG_WINDOW}),
    "mistral, no window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window, one expert": (
        "mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": MIDDLE_WINDOW},
    ),
    "phi3": ("phi3", {}),
    "phi3, window, half rope": ("phi3", {"sliding_window": SHORT_WINDOW, "partial_rotary_factor": 0.5}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": SHORT_WINDOW}),
    "gemma3, layer types, cap": (
        "gemma3_text",
        {
            "head_dim": 24, "sliding_window": MIDDLE_WINDOW, "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 40, "tie_word_embeddings": False,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, biases, tied": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "granite": ("granite", {}),
    "granite, multipliers": (
        "granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    ),
    "glm4": ("glm4", {"head_dim": 16}),
    "glm4, biases, whole rope": ("glm4", {"head_dim": 16, "attention_bias": True, "partial_rotary_factor": 1.0}),
    "starcoder2": ("starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0, "use_bias": True}),
    "starcoder2, window, untied": (
        "starcoder2",
        {
            "residual_dropout": 0.0, "embedding_dropout": 0.0, "use_bias": False, "sliding_window": SHORT_WINDOW,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1]}),
    "smollm3, no rope, window": (
        "smollm3",
        {
            "no_rope_layers": [1, 0], "layer_types": ["full_attention", "sliding_attention"],
            "use_sliding_window": True, "sliding_window": MIDDLE_WINDOW, "attention_bias": True,
        },
    ),
}  # fmt: skip

BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss, sinks": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "sliding_window": SHORT_WINDOW}),
    "cohere, scaled head": ("cohere", {"logit_scale": 0.1, "use_qk_norm": True}),
    "gemma2, soft caps": (
        "gemma2",
        {
            "head_dim": 16, "sliding_window": SHORT_WINDOW, "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
    ),
}  # fmt: skip

MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}  # fmt: skip
SHARED_KEYS = {
    "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_hidden_layers": 6, "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": SHORT_WINDOW,
}  # fmt: skip
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": SHORT_WINDOW}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3, narrow values": ("deepseek_v3", {**MLA, **DEEPSEEK_EXPERTS, "v_head_dim": 16}),
    "minicpm3, wide values": ("minicpm3", {**MLA, "v_head_dim": 40}),
    "mimo_v2_flash, narrow values, sinks, heads by kind": (
        "mimo_v2_flash", {**TWO_KINDS, **DEEPSEEK_EXPERTS, "n_group": 1, "head_dim": 24, "v_head_dim": 16},
    ),
    "granite_swa, sinks": ("granite_swa", TWO_KINDS),
    "gemma3n, shared keys": (
        "gemma3n_text",
        {
            **SHARED_KEYS, "num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
        },
    ),
    "gemma4, shared keys, head_dim by kind": (
        "gemma4_text", {**SHARED_KEYS, "num_kv_shared_layers": 3, "global_head_dim": 24},
    ),
    "llama4, blocks, temperature": (
        "llama4_text",
        {
            "num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
            "attention_chunk_size": 10, "floor_scale": 8,
        },
    ),
    "afmoe, a view of the output": ("afmoe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
"""Attention of other shapes than plain ones: widths, heads and kinds of layers, sharing, blocks."""
