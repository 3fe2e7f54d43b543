"""Tiny multimodal models: a text decoder of two layers with towers of one, as transformers builds them."""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96,
    "max_position_embeddings": 1024,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14,
    "image_size": 28,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": {
            **TEXT, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "rope_parameters": {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
        },
        "vision_config": QWEN_VISION,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {
            **TEXT, "rope_parameters": MROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        },
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN_VISION},
    "mistral3": {
        "text_config": {**TEXT, "model_type": "ministral3", "sliding_window": None},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
    },
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {
            **TEXT, "sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 96,
        },
        "vision_config": {**VISION, "head_dim": 8, "num_key_value_heads": 2},
        "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16,
            "subsampling_conv_channels": [4, 2]},
    },
    "muse_glimmer": {
        "text_config": {**TEXT, "sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": VISION,
    },
    "llama4": {
        "text_config": {
            **TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16,
            "no_rope_layers": [1, 0],
        },
        "vision_config": {**VISION, "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24},
    },
    "llava_next": {  # has a parameter of its own beside its towers
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
    },
    "cohere2_vision": {  # its decoder's class scales logits, and it does not
        "text_config": {**TEXT, "model_type": "cohere2", "sliding_window": 11, "logit_scale": 0.25,
                        "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "downsample_factor": 1,
    },
}  # fmt: skip
"""Model type -> settings of its configuration."""
