"""Learned positions end: a longer `data.max_length` is refused at the start, and for computed positions it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkflow_cli.config.schema import Config, DataConfig, Init, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.model.positions import check_positions

KINDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("gpt2", {"max_position_embeddings": 24}, "n_positions"),
    ("opt", {"max_position_embeddings": 24, "ffn_dim": 32, "word_embed_proj_dim": 64}, "max_position_embeddings"),
    ("gpt_neo", {"max_position_embeddings": 24, "num_layers": 2, "attention_types": [[["global"], 2]]},
     "max_position_embeddings"),
    ("biogpt", {"max_position_embeddings": 24}, "max_position_embeddings"),
    ("gptj", {"max_position_embeddings": 24, "rotary_dim": 8}, "n_positions"),
    ("mpt", {"max_seq_len": 24}, "max_seq_len"),
    ("llama", {"max_position_embeddings": 24}, None),
    ("phi", {"max_position_embeddings": 24}, None),
    ("gemma3_text", {"max_position_embeddings": 24, "head_dim": 16}, None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "key"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_a_length_beyond_a_table_of_positions_is_refused(
    kind: str, settings: dict[str, Any], key: str | None, tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    """The truth is a forward of the model itself: it fails one token beyond the table, and only then."""
    from transformers import AutoModelForCausalLM

    tiny_config(kind, **settings).save_pretrained(tmp_path)
    config = Config(model=ModelConfig(path=str(tmp_path), init=Init.random), data=DataConfig(max_length=25))
    hf_config = load_config(config.model)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    ids = torch.ones(1, 25, dtype=torch.long)
    model(input_ids=ids[:, :24])
    if key is None:
        model(input_ids=ids)
        check_positions(config, hf_config)
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)
        with pytest.raises(UsageError, match=rf"data\.max_length=25: .* only 24 positions \({key} in"):
            check_positions(config, hf_config)
    config.data.max_length = 24
    check_positions(config, hf_config)
