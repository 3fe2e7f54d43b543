"""Settings that models which compute attention themselves do not have are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.model.layouts import check_layouts
from chunkflow_cli.model.own_attention import check_own_attention
from chunkflow_cli.training.setup import planned_topology


@pytest.mark.parametrize(("word", "message"), [
    ("parallel.sequence=2", r"^parallel.sequence=2: models of type 'gptj' compute .* tokens on one device\n  use parallel"),
    ("parallel.pipeline=2", r"^parallel.pipeline=2: models of type 'gptj' compute .* layers on one device\n  use parallel"),
    ("model.compile=true", r"^model.compile=true: models of type 'gptj' .* from a cache"),
    ("model.activation_checkpointing=selective", r"selective: models of type 'gptj' (.|\n)*activation_checkpointing=full$"),
    ("model.attention=cpu", r"^model.attention=cpu: the model computes its attention itself\n  possible here: reference$"),
])  # fmt: skip
def test_what_is_refused(tiny_config: Callable[..., Any], word: str, message: str) -> None:
    config = load(["recipe=tiny_random", word]).config

    def check(hf_config: Any) -> None:
        check_layouts(config, hf_config, [planned_topology(config)])
        check_own_attention(config.model, hf_config)
        choose_backend(config.model.attention, hf_config, torch.device("cpu"), torch.float32)

    check(tiny_config("llama"))
    with pytest.raises(UsageError, match=message):
        check(tiny_config("gptj"))
