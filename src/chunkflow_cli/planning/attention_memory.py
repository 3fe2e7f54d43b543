"""Predict what attention takes for a moment on a GPU, while one layer of a chunk goes backward.

Read in FlashAttention 2.8 (`mha_varlen_bwd` of `csrc/flash_attn/flash_api.cpp`; torch has a copy in
`aten/src/ATen/native/transformers/cuda/flash_attn`), and in our own calls (`execution/attention`). FlashAttention-3 is
not called. Its backward (`hopper/flash_api.cpp`) would sum gradients of shared key heads in float32, not expand them.
"""

from __future__ import annotations

from chunkflow_cli.planning.attention_layers import AttentionLayers
from chunkflow_cli.planning.memory_settings import MemorySettings
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.planning.state_memory import STATE_BLOCK_TOKENS, most_seen

FLASH_ROWS = 128
"""Queries that the flash backward makes room for behind those of each segment: it works in blocks of so many."""
LARGEST_FLASH_HEAD_DIM = 256
"""Wider heads go through torch's memory-efficient kernels, as float32 does."""


def attention_workspace_bytes(
    shape: ModelShape, settings: MemorySettings, tokens: float, past: float, sharers: float = 1
) -> int:
    """Return the most bytes that the backward of an attention layer takes, its results included.

    A chunk's own tokens come first. Then comes the past, a block at a time, next to the gradients of the own keys and
    values and the float32 sum of those of the queries. The chunk is taken to be one segment: another one is
    `FLASH_ROWS` queries more. CPUs are not counted.

    Args:
        tokens: those of the chunk on this rank.
        past: tokens of its sequence in earlier chunks.
        sharers: ranks that share the chunk, and in attention its heads.
    """
    if settings.device_type == "cpu":
        return 0
    return int(max((_of_layer(part, settings, tokens, past, sharers) for part in shape.attention), default=0))


def _of_layer(part: AttentionLayers, settings: MemorySettings, tokens: float, past: float, sharers: float) -> float:
    b, dim, queries = settings.element_bytes, part.widest, tokens * sharers
    heads, kv_heads = part.heads / sharers, max(1.0, part.kv_heads / sharers)
    is_flash = b == 2 and dim <= LARGEST_FLASH_HEAD_DIM
    if is_flash:
        splits = splits_of_query_gradients(settings.multiprocessors, heads)
        own = flash_backward_bytes(queries, queries, heads, kv_heads, dim, splits)
    else:
        own = efficient_backward_bytes(queries, queries, heads, kv_heads, dim, b, is_causal=True)
    seen = most_seen(part)
    keys = min(past, STATE_BLOCK_TOKENS[settings.device_type], past if seen is None else seen)
    if keys == 0:
        return own
    if is_flash:
        of_block = flash_backward_bytes(queries, keys, heads, kv_heads, dim, splits)
    else:
        of_block = efficient_backward_bytes(queries, keys, heads, kv_heads, dim, b, is_causal=False)
    held = queries * dim * (4 * heads + 2 * b * kv_heads)
    return max(own, held + of_block)


def splits_of_query_gradients(multiprocessors: int, heads: float) -> int:
    """Return into how many sums the flash backward splits the gradients of queries: one, or a few if deterministic.

    Args:
        multiprocessors: those of the GPU if the sums must have one order (`train.deterministic`), else 0.
    """
    return max(1, -int(-multiprocessors // heads))


def flash_backward_bytes(
    queries: float, keys: float, heads: float, kv_heads: float, head_dim: int, splits: int = 1
) -> float:
    """Return the bytes that FlashAttention 2 takes in a backward in bfloat16.

    - `dq_accum`, `softmax_d`: float32 sums of the gradients of queries, with heads padded to 32 channels (64 above
      128), and a number for each query and head.
    - `dk_expanded`, `dv_expanded`: if query heads share a key head, the gradients of keys and values for each of them.
    - The gradients.
    """
    padded = -(-head_dim // 32) * 32 if head_dim <= 128 else -(-head_dim // 64) * 64
    sums = 4 * heads * (queries + FLASH_ROWS) * (splits * padded + 1)
    expanded = 2 * 2 * keys * heads * head_dim if kv_heads != heads else 0
    return sums + expanded + 2 * head_dim * (queries * heads + 2 * keys * kv_heads)


def efficient_backward_bytes(
    queries: float, keys: float, heads: float, kv_heads: float, head_dim: int, element_bytes: int, *, is_causal: bool
) -> float:
    """Return the bytes that a backward through torch's memory-efficient kernel takes, which knows no shared key heads.

    For a causal chunk, keys and values are repeated for each query head, and their gradients summed. For the past, the
    queries that share a key head become rows of it: queries, output and its gradient are copied, and the gradient back.
    In bfloat16, the kernel sums the gradients of queries in float32 (kernel_backward.h, `workspace_elements_gq`), and
    those of keys a block at a time.
    """
    a_query, a_key = queries * heads * head_dim, keys * kv_heads * head_dim
    is_grouped = heads != kv_heads
    of_keys = keys * heads * head_dim if is_causal else a_key
    elements = a_query + 2 * of_keys
    if is_grouped:
        elements += 2 * of_keys + 2 * a_key if is_causal else 4 * a_query
    in_float32 = 0.0 if element_bytes == 4 else 4 * a_query
    return element_bytes * elements + in_float32 + 4 * queries * heads
