"""`train.deterministic`: the same numbers from the same run, as far as the libraries below can give them."""

from __future__ import annotations

import os

import torch

from chunkflow_cli.config.schema import Config
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.recurrent_functions import installed_kernels
from chunkflow_cli.planning.model_shape import ModelShape
from chunkflow_cli.processes.notices import warn_once

CUBLAS_VALUES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS sums in one order (its documentation, "Results Reproducibility")."""
NCCL_ALGORITHMS = "^NVLS,NVLSTree"
"""All but the sums within NVSwitch. Rings and trees add in an order that follows from the ranks and the sizes
(Megatron-LM's deterministic mode asks for the same)."""


def ask_for_determinism(is_asked: bool) -> None:
    """Have torch, cuBLAS and NCCL give the same numbers for the same run; before CUDA and NCCL start.

    torch then takes deterministic kernels, those of its flash and memory-efficient attention included (attention_
    backward.cu), and raises an error where it has none. flash-attn is asked in each call (`execution.attention.flash`).

    Args:
        is_asked: `train.deterministic`.

    Raises:
        UsageError: CUBLAS_WORKSPACE_CONFIG is set to what allows several orders.
    """
    torch.use_deterministic_algorithms(is_asked)
    if not is_asked:
        return
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_VALUES[0])
    if workspace not in CUBLAS_VALUES:
        raise UsageError(
            f"train.deterministic=true with CUBLAS_WORKSPACE_CONFIG={workspace} in the environment: cuBLAS may then "
            f"sum in several orders\n  unset it, or set it to {' or '.join(CUBLAS_VALUES)}"
        )
    os.environ.setdefault("NCCL_ALGO", NCCL_ALGORITHMS)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def warn_of_kernels(config: Config, shape: ModelShape, device: torch.device) -> None:
    """Say which kernels do not promise the same sums in every run, if `train.deterministic` asks for them."""
    if not config.train.deterministic or device.type != "cuda" or not shape.is_recurrent:
        return
    if kernels := installed_kernels():
        warn_once(
            f"train.deterministic=true: the recurrent layers run kernels of {', '.join(sorted(kernels))}, which do not "
            "promise the same sums in every run"
        )
