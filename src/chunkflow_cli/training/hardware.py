"""Measure the device of this process: the memory that it has used, and the rate that MFU is measured against."""

from __future__ import annotations

import math
import resource
import sys
import time

import torch

from chunkflow_cli.engine import Processes
from chunkflow_cli.model.device import known_matmul_flops

FEWEST_PRODUCTS, MOST_PRODUCTS, MEASURING_SECONDS = 3, 12, 0.1
"""How often `peak_flops` multiplies: a slow device three times, a fast one twelve, or until the time is up."""


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: by the allocator of a GPU, or by the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def agreed_peak_flops(processes: Processes, device: torch.device, dtype: torch.dtype) -> float:
    """Return `peak_flops` as the first process measures it while the others wait. Every process calls it."""
    return processes.maximum(peak_flops(device, dtype) if processes.is_first else 0.0)[0]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second that the device can do: by its data sheet, or measured on a large product.

    MFU is the model's operations per second divided by this. A CPU is measured in float32, the fastest data type that
    all CPUs have.
    """
    known = known_matmul_flops(device) if dtype in (torch.bfloat16, torch.float16) else None
    if known is not None:
        return known
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype if device.type == "cuda" else torch.float32)
    fastest, turns, begin = math.inf, 0, time.perf_counter()
    while turns < FEWEST_PRODUCTS or (turns < MOST_PRODUCTS and time.perf_counter() - begin < MEASURING_SECONDS):
        _synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        fastest, turns = min(fastest, time.perf_counter() - start), turns + 1
    return 2 * size**3 / fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
