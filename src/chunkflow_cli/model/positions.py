"""Learned positions: a table that ends, unlike rotary embeddings, which can be computed for any position."""

from __future__ import annotations

from typing import Any

from torch import nn

from chunkflow_cli.config.schema import Config, ModelConfig
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import position_limit, position_limit_key
from chunkflow_cli.model.loading import on_meta_device

MOST_OFFSET = 8
"""Rows that a table may have besides one for each position: OPT and BART begin at row 2."""


def check_positions(config: Config, hf_config: Any) -> None:
    """Check that positions up to `data.max_length` exist, if the model looks them up in a table.

    Raises:
        UsageError: the table is shorter.
    """
    max_length = config.data.max_length
    limit = None if max_length is None else learned_limit(config.model, hf_config, max_length)
    if limit is None:
        return
    raise UsageError(
        f"data.max_length={max_length}: the model has learned only {limit} positions "
        f"({position_limit_key(hf_config)} in its config.json)\n"
        f"  set data.max_length={limit}, and data.overlong=truncate or drop for longer samples"
    )


def learned_limit(config: ModelConfig, hf_config: Any, length: int) -> int | None:
    """Return the number of learned positions, if `length` tokens are more than that; None if they are no problem."""
    limit = position_limit(hf_config)
    if limit is None or length <= limit:
        return None
    return limit if position_table(on_meta_device(config, hf_config), limit) is not None else None


def position_table(model: Any, limit: int) -> str | None:
    """Return the name of the table that the model looks positions up in; None if it computes them.

    A table is an embedding other than that of the tokens, or a buffer, with a row for each of the `limit` positions.
    mpt makes one of biases in each forward.
    """
    if model.config.get_text_config().model_type == "mpt":
        return "alibi"
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module is not tokens
        if is_table and 0 <= module.num_embeddings - limit <= MOST_OFFSET:
            return str(name)
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and buffer.shape[0] == limit:
            return str(name)
    return None
