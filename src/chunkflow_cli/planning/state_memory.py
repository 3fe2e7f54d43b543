"""Predict what the state store takes: on the device, or in host memory with blocks of it on the device.

The sizes are those of `execution.state`, to the byte (tests/execution/test_measured_memory.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.model_shape import ModelShape

STATE_BLOCK_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of a block of the state store: attention takes the past a block at a time."""
BLOCKS_ON_DEVICE = 3
"""Blocks of one layer that are on the device at once, if state is in host memory: one that is used, one that arrives,
and one that leaves."""

PAGE_LOCK_BYTES_PER_SECOND = 3e9
"""Host memory that CUDA page-locks in a second; not measured here. Others report 33 GiB in 8 s (ik_llama.cpp, pull
request 1517) and 32 MB in 12 ms (dask-cuda, issue 106)."""


def page_lock_seconds(host_bytes: int) -> float:
    """Predict the seconds in which a process page-locks host memory for copies from and to a GPU, once in a run."""
    return host_bytes / PAGE_LOCK_BYTES_PER_SECOND


def bytes_of_token(part: AttentionLayers, element_bytes: int) -> float:
    """Return the bytes of a token's keys and values in these layers, with float32 gradients (float64 in float64)."""
    return part.kv_elements_per_token * (element_bytes + max(4, element_bytes) * part.has_gradients)


def most_seen(part: AttentionLayers) -> int | None:
    """Return how many positions before a chunk it sees at most, in a window or in its block; None if it sees all."""
    seen = [size - 1 for size in (part.window, part.block) if size is not None]
    return min(seen, default=None)


def kept_share(part: AttentionLayers, chunk_size: int | None) -> float:
    """Return the share of a chunk's keys that the store keeps at most: windows and blocks hide the first ones from
    later chunks.

    Args:
        chunk_size: None keeps all of them.
    """
    seen = most_seen(part)
    return 1.0 if seen is None or chunk_size is None else min(1.0, seen / chunk_size)


def state_bytes_per_token(shape: ModelShape, element_bytes: int, chunk_size: int | None = None) -> float:
    """Return the bytes of a token's keys and values, and of their float32 (float64 in float64) gradients.

    It is a mean over a chunk. Under a window shorter than a chunk only the next chunk sees them, so that gradients
    exist of one chunk at a time (`gradients_of_windows`).

    Args:
        chunk_size: tokens of a chunk, of which a window hides the first from later chunks. None keeps all.
    """
    total = 0.0
    for part in shape.attention:
        if part.owns_keys:
            share = kept_share(part, chunk_size)
            stored = part.kv_elements_per_token * element_bytes
            total += bytes_of_token(part, element_bytes) if share == 1 else share * stored
    return total


def gradients_of_windows(shape: ModelShape, element_bytes: int, chunk_size: int) -> int:
    """Return the bytes of gradients of layers with a window, or blocks, shorter than a chunk."""
    parts = [part for part in shape.attention if part.owns_keys and kept_share(part, chunk_size) < 1]
    return round(sum(part.kv_elements_per_token * (most_seen(part) or 0) * max(4, element_bytes) for part in parts))


def host_bytes(
    shape: ModelShape, stored: Any, edges: Any, *, element_bytes: int, chunk_size: int, device_type: str
) -> Any:
    """Return the bytes that all layers take in host memory, where keys and values fill blocks of one size.

    Args:
        stored: tokens of which state is kept; a number or an array.
        edges: chunk edges, likewise.
    """
    block, kept = STATE_BLOCK_TOKENS[device_type], np.asarray(stored, dtype=np.float64)
    whole = [part for part in shape.attention if part.owns_keys and kept_share(part, chunk_size) == 1]
    begun = (np.ceil(kept / block) * block - kept) * sum(bytes_of_token(part, element_bytes) for part in whole)
    of_tokens = kept * state_bytes_per_token(shape, element_bytes, chunk_size)
    of_windows = (kept > 0) * gradients_of_windows(shape, element_bytes, chunk_size)
    return of_tokens + begun + of_windows + np.asarray(edges) * shape.recurrent.bytes_between(chunk_size)


def bytes_of_blocks(shape: ModelShape, element_bytes: int, device_type: str, stored: float) -> int:
    """Return the bytes on the device of state that is kept in host memory.

    Args:
        stored: tokens of which state is kept; fewer than three blocks are never more than that.
    """
    largest = max((bytes_of_token(part, element_bytes) / part.layers for part in shape.attention), default=0.0)
    tokens = min(stored, BLOCKS_ON_DEVICE * STATE_BLOCK_TOKENS[device_type])
    return int(tokens * largest)
