"""Small tensors on their way from the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device, without waiting for what the device computes.

    CUDA copies from memory that the system may move only after all that was queued before. torch keeps pinned memory
    until the copies from it have ended.
    """
    if device.type == "cuda" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
