"""Settings that decide what takes memory on a rank, besides the model's shape."""

from __future__ import annotations

from dataclasses import dataclass, field

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of an element of weights and activations, by `model.dtype`."""


@dataclass(frozen=True)
class Buffers:
    """Numbers of elements in DeepSpeed's buffers: the values of its keys, and a constant."""

    reduce: int = 50_000_000
    """`reduce_bucket_size`: gradients that are summed over ranks together."""
    gathered: int = 1_000_000_000
    """`stage3_max_live_parameters`: weights that ZeRO-3 gathers ahead of their use. It ends one weight above."""
    sub_group: int = 1_000_000_000
    """`sub_group_size`: weights that ZeRO-3 steps together."""
    whole: int = 500_000_000
    """Most gradients that ZeRO-0 and `BF16_Optimizer` copy together to sum them (`MEMORY_OPT_ALLREDUCE_SIZE`)."""


@dataclass(frozen=True)
class MemorySettings:
    """Settings that a rank's memory depends on, besides the model's shape."""

    element_bytes: int
    """Bytes of an element of weights and activations: 2 or 4 (8 in float64)."""
    optimizer_states: float
    """What the optimizer keeps per weight, in float32 numbers: 2 for AdamW (`optimizer_states.state_numbers`)."""
    zero_stage: int
    data_parallel: int
    """Ranks that ZeRO divides optimizer states, gradients and weights among."""
    offload: str
    """none | optimizer | parameters"""
    checkpointing: str
    """none | full | selective"""
    chunk_size: int
    """Most tokens of a chunk on one rank."""
    device_type: str
    """cpu | cuda"""
    buffers: Buffers = field(default_factory=Buffers)
    """Sizes of DeepSpeed's buffers."""
    offload_state: str = "none"
    """none | host"""
    multiprocessors: int = 0
    """Those of the GPU if `train.deterministic` makes flash attention sum in one order, else 0."""
