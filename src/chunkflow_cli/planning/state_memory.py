"""Predict what the state store takes: on the device, or in host memory with blocks of it on the device.

The sizes are those of `execution.state`, to the byte (tests/execution/test_measured_memory.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.costs import ModelShape

STATE_BLOCK_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of a block of the state store: attention takes the past a block at a time."""
BLOCKS_ON_DEVICE = 3
"""Blocks of one layer that are on the device at once, if state is in host memory: one that is used, one that arrives,
and one that leaves."""


def bytes_per_element(element_bytes: int) -> int:
    """Return the bytes of a number of keys or values with its float32 gradient (float64 in float64)."""
    return element_bytes + max(4, element_bytes)


def kept_share(part: AttentionLayers, chunk_size: int | None) -> float:
    """Return the share of a chunk's keys that the store keeps: a window hides all but the last ones from later chunks.

    Args:
        chunk_size: None keeps all of them, as do layers that attend within blocks, which keep a part.
    """
    if part.window is None or chunk_size is None:
        return 1.0
    return min(1.0, (part.window - 1) / chunk_size)


def stored_elements_per_token(shape: ModelShape, chunk_size: int | None) -> float:
    """Return the numbers in the stored keys and values of one token, over all layers; a mean over a chunk."""
    return sum(part.kv_elements_per_token * kept_share(part, chunk_size) for part in shape.attention if part.owns_keys)


def host_bytes(
    shape: ModelShape, stored: Any, edges: Any, *, element_bytes: int, chunk_size: int, device_type: str
) -> Any:
    """Return the bytes that all layers take in host memory, where keys and values fill blocks of one size.

    Args:
        stored: tokens of which state is kept; a number or an array.
        edges: chunk edges, likewise.
    """
    block = STATE_BLOCK_TOKENS[device_type]
    filled = np.ceil(np.asarray(stored, dtype=np.float64) / block) * block
    elements = np.zeros_like(filled)
    for part in shape.attention:
        if part.owns_keys:
            share = kept_share(part, chunk_size)
            elements += part.kv_elements_per_token * (filled if share == 1.0 else share * np.asarray(stored))
    return elements * bytes_per_element(element_bytes) + np.asarray(edges) * shape.recurrent.edge_bytes


def bytes_of_blocks(shape: ModelShape, element_bytes: int, device_type: str, stored: float) -> int:
    """Return the bytes on the device of state that is kept in host memory.

    Args:
        stored: tokens of which state is kept; fewer than three blocks are never more than that.
    """
    largest = max((part.kv_elements_per_token // part.layers for part in shape.attention), default=0)
    tokens = min(stored, BLOCKS_ON_DEVICE * STATE_BLOCK_TOKENS[device_type])
    return int(tokens * largest * bytes_per_element(element_bytes))
