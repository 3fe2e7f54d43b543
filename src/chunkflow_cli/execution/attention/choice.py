"""The choice of an attention backend for a run, with its reason."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from chunkflow_cli.config.schema import Attention
from chunkflow_cli.errors import UsageError, first_line
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.attention.flash import LARGEST_FLASH_HEAD_DIM, FlashAttnBackend, TorchFlashBackend
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.model.attention_heads import attention_heads
from chunkflow_cli.model.special_types import computes_own_attention

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (FlashAttnBackend, TorchFlashBackend, CpuBackend, ReferenceBackend)
}
"""All backends by name, the fastest first."""

NO_GPU = "it needs a CUDA GPU"
OWN = "the model computes its attention itself"
FLASH_CAPABILITY = (8, 0)
"""Compute capability (Ampere) from which the flash kernels run, and GPUs compute in bfloat16."""


@dataclass(frozen=True)
class BackendChoice:
    """A backend that can run the model."""

    backend: Backend
    reason: str
    """One sentence for the user."""


def choose_backend(requested: Attention, hf_config: Any, device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """Return the fastest backend that supports the model on the device, or the requested one.

    Raises:
        UsageError: the requested one cannot run here, or cannot run this model.
    """
    objections = {name: _objection(name, hf_config, device, dtype) for name in BACKENDS}
    if requested is not Attention.auto:
        objection = objections[requested.value]
        if objection is not None:
            possible = ", ".join(name for name, against in objections.items() if against is None)
            raise UsageError(f"model.attention={requested.value}: {objection}\n  possible here: {possible}")
        return BackendChoice(BACKENDS[requested.value](), "as configured")
    name = next(name for name, objection in objections.items() if objection is None)
    faster = {other: objections[other] for other in takewhile(lambda other: other != name, objections)}
    if OWN in faster.values():
        return BackendChoice(BACKENDS[name](), OWN)
    against = [f"{other}: {objection}" for other, objection in faster.items() if objection != NO_GPU]
    against = ["no GPU" for objection in [*faster.values()][:1] if objection == NO_GPU] + against
    return BackendChoice(BACKENDS[name](), "; ".join(against) or "the fastest there is")


def _objection(name: str, hf_config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why this backend cannot run this model here, or None if it can."""
    if name == "reference":
        return None
    if computes_own_attention(hf_config):
        return OWN
    softcap = getattr(hf_config.get_text_config(), "attn_logit_softcapping", None) is not None
    if name == "cpu":
        if device.type != "cpu":
            return "it runs on the CPU only"
        return "it does not support soft-capped scores" if softcap else None
    if device.type != "cuda":
        return NO_GPU
    if dtype is not torch.float32 and (capability := torch.cuda.get_device_capability(device)) < FLASH_CAPABILITY:
        has = ".".join(map(str, capability))
        return (
            f"its {str(dtype).removeprefix('torch.')} kernels need compute capability 8.0 or newer; this GPU has {has}"
        )
    layers = attention_heads(hf_config)
    if odd := sorted({layer.widest for layer in layers if layer.widest % 8}):
        return f"it supports head_dim in steps of 8, and the model's is {odd[0]}"
    if name == "torch_flash":
        if softcap:
            return "it does not support soft-capped scores"
        windowed = [layer.widest for layer in layers if layer.window is not None]
        if dtype is torch.float32:
            return "it does not support sliding windows in float32" if windowed else None
        if max(windowed, default=0) > LARGEST_FLASH_HEAD_DIM:
            return f"it supports sliding windows only up to head_dim {LARGEST_FLASH_HEAD_DIM}"
    elif (widest := max((layer.widest for layer in layers), default=0)) > LARGEST_FLASH_HEAD_DIM:
        return f"it supports head_dim up to {LARGEST_FLASH_HEAD_DIM}, and the model has layers of {widest}"
    elif importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install 'chunkflow-cli[flash]')"
    elif (broken := _why_not_imported()) is not None:
        return f"the package flash-attn cannot be imported ({broken}): install one that was built for this PyTorch"
    return None if dtype in (torch.bfloat16, torch.float16) else f"it does not support {dtype}"


def _why_not_imported() -> str | None:
    """Return why flash-attn cannot be imported: often, it was compiled for another version of torch."""
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:
        return first_line(error)
    return None
