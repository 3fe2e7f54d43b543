"""The device that training runs on here, with its speed and its memory."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from chunkflow_cli.errors import UsageError
from chunkflow_cli.planning.devices import DEVICES, DeviceProfile
from chunkflow_cli.processes.host_memory import usable_memory_bytes

MATMUL_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}
"""Part of a GPU's name -> its FLOP/s in dense bfloat16, from the makers' data sheets. The first match counts."""
DATA_SHEETS = {"H200": "h200", "B200": "b200", "H100 80GB HBM3": "h100", "A100-SXM4-80GB": "a100"}
"""Part of a GPU's name -> the data sheet of its memory and links, where NVLink connects a node."""
UNKNOWN_GPU_FLOPS = 100e12
"""FLOP/s assumed of a GPU that is not in the table. The ratios between chunks do not depend on it."""


def training_device() -> torch.device:
    """Return the device of this process: the GPU whose number is its local rank, or the CPU if there is no GPU.

    Raises:
        UsageError: the process does not see a GPU of that number.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:
        number, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= seen:  # DeepSpeed takes that number, too
            raise UsageError(
                f"LOCAL_RANK={number}, but this process sees {seen} GPU{'s' if seen > 1 else ''} "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')})\n"
                "  start as many processes on a machine as it has GPUs, and let each see all of them "
                "(srun --gpu-bind=none)"
            )
        torch.cuda.set_device(number)
    return torch.device("cuda", torch.cuda.current_device())


def known_matmul_flops(device: torch.device) -> float | None:
    """Return the FLOP/s of matrix products by the data sheet; None for a CPU and for a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:  # a part of the GPU that it names
        return None
    return next((flops for part, flops in MATMUL_FLOPS.items() if part in name), None)


def present_device() -> DeviceProfile:
    """Return the profile of the device that training runs on: FLOP/s, and memory in bytes."""
    device = training_device()
    if device.type == "cpu":
        cores = os.cpu_count() or 1
        per_core = DEVICES["cpu"].matmul_flops / 2
        return replace(
            DEVICES["cpu"],
            name=f"this CPU, {cores} cores",
            matmul_flops=cores * per_core,
            memory_bytes=usable_memory_bytes(),
            host_memory_bytes=usable_memory_bytes(),
        )
    flops = known_matmul_flops(device)
    name = torch.cuda.get_device_name(device)
    properties = torch.cuda.get_device_properties(device)
    memory = int(properties.total_memory)
    if flops is None:
        name = f"{name} (speed unknown, taken as {UNKNOWN_GPU_FLOPS / 1e12:.0f} TFLOP/s)"
    sheet = next((DEVICES[sheet] for part, sheet in DATA_SHEETS.items() if flops and part in name), None)
    return replace(
        sheet or DeviceProfile(name, UNKNOWN_GPU_FLOPS, memory),
        name=name,
        matmul_flops=flops or UNKNOWN_GPU_FLOPS,
        memory_bytes=memory,
        multiprocessors=int(properties.multi_processor_count),
        host_memory_bytes=usable_memory_bytes(),
    )
