"""The published shapes of the models that recipes name: what their config.json says about sizes.

Sources: the configuration classes of transformers 5.23 for gpt-oss, SmolLM3 and the defaults of Qwen3.5 (9B); the model
cards and config.json files of the makers for the others, as public repositories quote them. The towers of multimodal
models have the defaults of transformers: they are neither trained nor loaded.
"""

from __future__ import annotations

from typing import Any


def _qwen3_5(**sizes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_5", "text_config": {"max_position_embeddings": 262144, **sizes}}


def _gemma4(**sizes: Any) -> dict[str, Any]:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    layers = sizes["num_hidden_layers"]
    text = {"layer_types": kinds * (layers // 6), "final_logit_softcapping": 30.0, "global_head_dim": 512, **sizes}
    return {"model_type": "gemma4", "text_config": text}


QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768}
LLAMA_3_1 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        **QWEN2, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        **QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-14B-Instruct": {
        **QWEN2, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-32B-Instruct": {
        **QWEN2, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-72B-Instruct": {
        **QWEN2, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 152064,
    },
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_1,
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "Qwen/Qwen3.5-0.8B": _qwen3_5(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        linear_num_value_heads=16, tie_word_embeddings=True,
    ) | {"tie_word_embeddings": True},
    "Qwen/Qwen3.5-4B": _qwen3_5(hidden_size=2560, intermediate_size=9216, tie_word_embeddings=True)
    | {"tie_word_embeddings": True},
    "Qwen/Qwen3.5-9B": _qwen3_5(),
    "Qwen/Qwen3.5-27B": _qwen3_5(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24,
        linear_num_value_heads=48,
    ),
    "openai/gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
    "google/gemma-4-E4B-it": _gemma4(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=42, num_attention_heads=8, num_key_value_heads=2,
        num_kv_shared_layers=18, sliding_window=512,
    ),
    "google/gemma-4-31B-it": _gemma4(
        hidden_size=5376, intermediate_size=21504, num_hidden_layers=60, num_attention_heads=32, num_key_value_heads=16,
        num_global_key_value_heads=4, attention_k_eq_v=True, sliding_window=1024, hidden_size_per_layer_input=0,
        max_position_embeddings=262144,
    ),
    "HuggingFaceTB/SmolLM3-3B": {"model_type": "smollm3", "max_position_embeddings": 65536},
}  # fmt: skip
