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

_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_LATENT_TINY = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
SHORT_TABLE = 101
"""One more position than the longest sequence has tokens, and fewer than a chunk sees keys."""

OWN_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon, alibi": ("falcon", {"alibi": True, "multi_query": False}),
    "falcon, one kv head": ("falcon", {}),
    "gpt_neo, window, short table": (
        "gpt_neo",
        {
            "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
            "window_size": SHORT_WINDOW, "max_position_embeddings": SHORT_TABLE, "initializer_range": 0.15,
        },
    ),
    "gptj": ("gptj", {"rotary_dim": 8, **_NO_DROPOUT}),
    "mpt, short table": ("mpt", {"max_seq_len": SHORT_TABLE, "logit_scale": "inv_sqrt_d_model"}),
    "diffllama": ("diffllama", {}),
    "hrm_text": (
        "hrm_text",
        {"num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 2, "num_key_value_heads": 4, "head_dim": 16},
    ),
    "deepseek_v32, indexer": (
        "deepseek_v32",
        {
            **_LATENT_TINY, "first_k_dense_replace": 1, "index_n_heads": 16, "index_head_dim": 8,
            "index_topk": SHORT_WINDOW,
            "pad_token_id": None,  # its embedding is zero: to its indexer all keys are equal, and any may be picked
        },
    ),
}  # fmt: skip
"""Models that compute attention themselves, over keys from their cache."""

RECURRENT_TINY: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}  # fmt: skip
_MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8,
    "mamba_d_conv": 4, "mamba_expand": 2, "num_hidden_layers": 3,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"], "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_SHORT_CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
_NO_ATTENTION = {
    "num_attention_heads": None, "num_key_value_heads": None, "num_hidden_layers": 2, "state_size": 8,
    "residual_in_fp32": False,
}  # fmt: skip
_SELECTIVE = {**_NO_ATTENTION, "head_dim": None, "time_step_rank": 4}

_RELATIVE = {
    "num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "sliding_window_size": 9,
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 12, "d_rel": 4, "rel_extent": 7,
    "log_scaling_n_floor": 5, "log_scaling_alpha": 0.5, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "logits_mup_width_multiplier": 0.5, "vocab_size": 71, "unpadded_vocab_size": 67,
}  # fmt: skip
"""Inkling: distances, queries scaled by their positions, convolutions everywhere, and a head with unused rows."""

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**_DELTA, **_EXPERTS}),
    "qwen3_next": ("qwen3_next", {**_DELTA, **_EXPERTS}),
    "olmo_hybrid": ("olmo_hybrid", {**_DELTA, "num_key_value_heads": 4, "linear_num_key_heads": 4}),
    "kimi_linear": ("kimi_linear", {**_LATENT, "linear_head_dim": 8, "linear_num_heads": 4, "head_dim": None}),
    "bailing_hybrid": ("bailing_hybrid", {**_LATENT, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0}),
    "lfm2": ("lfm2", {**_SHORT_CONVOLUTIONS, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("lfm2_moe", {**_SHORT_CONVOLUTIONS, **_EXPERTS, "conv_L_cache": 3, "num_dense_layers": 1}),
    "lfm3": ("lfm3", {**_SHORT_CONVOLUTIONS, "conv_L_cache": 7, "sliding_window": 9}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "mlp"],
            "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
            "conv_kernel": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_MAMBA2, "mamba_d_ssm": 64, "num_hidden_layers": 2, "lm_head_multiplier": 0.7,
            "embedding_multiplier": 1.3, "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "ssm_in_multiplier": 0.8,
            "ssm_out_multiplier": 1.2, "key_multiplier": 1.1, "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 1.1, "mlp_multipliers": [0.9, 1.1],
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MAMBA2, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16, "logits_scaling": 3.0,
            "embedding_multiplier": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3,
        },
    ),
    "bamba": ("bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
    "zaya": (
        "zaya",
        {
            "num_hidden_layers": 3, "layer_types": ["hybrid", "hybrid_sliding", "hybrid"], "sliding_window": 9,
            "num_experts": 4, "moe_intermediate_size": 16, "cca_time0": 3, "cca_time1": 2, "num_local_experts": 4,
        },
    ),
    "minimax": (
        "minimax",
        {
            "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "linear_attn_alpha_factor": 0.9,
            "linear_attn_beta_factor": 1.1, "mlp_alpha_factor": 1.2,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "num_hidden_layers": 3, "block_types": ["recurrent", "attention", "recurrent"], "lru_width": 32,
            "attention_window_size": 9, "conv1d_width": 4, "logits_soft_cap": 5.0, "num_key_value_heads": 1,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "n_mamba_heads": 8,
            "mamba_d_state": 8, "mamba_ngroups": 2, "mamba_expand": 2, "chunk_size": 8, "num_mem_blocks": 1,
            "use_shared_attention_adapter": False, "use_mem_rope": True, "num_key_value_heads": 4, "head_dim": None,
            "adapter_rank": 4,
        },
    ),
    "mamba2": (
        "mamba2",
        {**_NO_ATTENTION, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8, "expand": 2},
    ),
    "jamba": (
        "jamba",
        {
            **_EXPERTS, "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
    ),
    "mamba": ("mamba", _SELECTIVE),
    "falcon_mamba": ("falcon_mamba", _SELECTIVE),
    "zamba": (
        "zamba",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "n_mamba_heads": 2,
            "mamba_d_state": 8, "mamba_dt_rank": 4, "num_key_value_heads": 4, "head_dim": None,
        },
    ),
    "rwkv": ("rwkv", {**_NO_ATTENTION, "head_dim": None, "attention_hidden_size": 40, "rescale_every": 1}),
    "xlstm": (
        "xlstm",
        {
            **_NO_ATTENTION, "head_dim": None, "num_heads": 2, "chunk_size": 8, "ffn_round_up_to_multiple_of": 16,
            "output_logit_soft_cap": 3.0, "gate_soft_cap": 2.0,
        },
    ),
    "qwen3_5, wide values, tied": (
        "qwen3_5_text",
        {
            **_DELTA, "linear_num_key_heads": 4, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 2,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid, one group, biases": (
        "granitemoehybrid",
        {
            **_MAMBA2, "mamba_n_groups": 1, "mamba_proj_bias": True, "num_local_experts": 0,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"], "shared_intermediate_size": 16,
        },
    ),
    "falcon_h1, gated norm": (
        "falcon_h1",
        {**_MAMBA2, "mamba_d_ssm": 64, "num_hidden_layers": 2, "mamba_n_groups": 1, "mamba_rms_norm": True},
    ),
    "lfm2, width 3, biases": ("lfm2", {**_SHORT_CONVOLUTIONS, "conv_L_cache": 3, "conv_bias": True}),
    "inkling": ("inkling_text", {**_RELATIVE, "n_shared_experts": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "inkling2": ("inkling2_text", {**_RELATIVE, "n_layers_per_attn_res_block": 2, "final_logit_softcapping": 2.0}),
}  # fmt: skip
"""Architectures with recurrent layers; build them with `recurrent_model`."""


_INDEXER = {"index_n_heads": 16, "index_head_dim": 8}  # of few heads, all may be negative: equal scores, at zero
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax_m3": (
        "minimax_m3_vl_text",
        {
            **_INDEXER, "num_hidden_layers": 3, "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 3,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "rotary_dim": 4,
            "num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 32,
            "shared_intermediate_size": 16,
        },
    ),
    "deepseek_v4": (
        "deepseek_v4",
        {
            **_INDEXER, "num_hidden_layers": 4, "index_topk": 3, "sliding_window": 7,
            "layer_types": [
                "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8,
            "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 1,
            "hc_mult": 2, "hc_sinkhorn_iters": 3, "partial_rotary_factor": 0.5,
        },
    ),
    "glm5_next": (
        "glm5_next",
        {
            **_LATENT, **_INDEXER, "num_hidden_layers": 4, "index_topk": 12, "index_kpool": 4, "q_lora_rank": 16,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
            "indexer_types": ["full", "full", "shared", "full"], "qk_rope_head_dim": 0, "n_group": 1, "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "n_routed_experts": 4, "hc_mult": 2,
            "linear_num_heads": 2, "linear_head_dim": 8, "head_dim": None, "num_local_experts": None,
        },
    ),
    "qwen4_exp": (
        "qwen4_exp_text",
        {
            **_DELTA, **_EXPERTS, "num_hidden_layers": 4, "indexer_budget": 12, "indexer_compress_ratio": 4,
            "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 16,
            "indexer_kv_heads": 1, "indexer_head_dim": 8, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1, 3],
            "ple_embed_dim": 32, "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "eos_token_id": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
    ),
}  # fmt: skip
"""Architectures that pick or sum up blocks of keys; build them with `recurrent_model`."""


def recurrent_model(name: str, dtype: Any = None, seed: int = 0, **settings: Any) -> Any:
    """Return a model of `RECURRENT` or `BLOCKS` in train mode, with weights under which a lost state shows.

    Its states fade slowly, and every weight, biases and norms too, differs from what would hide a mistake.
    """
    import torch
    from transformers import AutoConfig

    from chunkflow_cli.execution.precision import use_float64_parts
    from chunkflow_cli.model.loading import random_model

    dtype = torch.float32 if dtype is None else dtype
    model_type, changes = {**RECURRENT, **BLOCKS}[name]
    merged: dict[str, Any] = {
        key: value for key, value in {**RECURRENT_TINY, **changes, **settings}.items() if value is not None
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **({"text_config": merged} if model_type == "glm5_next" else merged))
        model = random_model(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter_name.endswith(("A_log", "dt_bias", "dt_proj.bias", "dt_proj_bias")):
                parameter.copy_(torch.rand(parameter.shape) * 2 - 1.5)
            elif parameter_name.endswith("igate_preact.bias"):
                parameter.copy_(noise)
            elif parameter_name.endswith("time_decay"):
                parameter.copy_(torch.rand(parameter.shape) * 2 - 4)
            elif "norm" in parameter_name or parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            elif "router" in parameter_name or "gate.weight" in parameter_name:
                parameter.copy_(noise)
            else:
                parameter.add_(0.05 * noise)
    model = model.to(dtype)
    for module in model.modules():
        if hasattr(module, "decay_factors"):  # minimax: tables that it has made in float32
            module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(module.slope_rate)
    use_float64_parts(model, dtype)
    model.config.use_cache = False
    return model.train()


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
    "ministral3, temperature": (
        "ministral3",
        {"rope_parameters": {**YARN_ROPE, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}},
    ),
    "phimoe, window in the mask alone": (
        "phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": SHORT_WINDOW, "router_jitter_noise": 0.0},
    ),
    "afmoe, a view of the output": ("afmoe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
"""Attention of other shapes than plain ones: widths, heads and kinds of layers, sharing, blocks."""
