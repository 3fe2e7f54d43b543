"""The optimizers that `optim.name` names, made for the trained weights of a module."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from chunkflow_cli.config.schema import Offload, OptimConfig, OptimizerName
from chunkflow_cli.config.weight_names import factor_of
from chunkflow_cli.engine.settings import EngineSettings
from chunkflow_cli.engine.whole_parameters import WholeParameters
from chunkflow_cli.errors import UsageError

EIGHT_BIT = frozenset({OptimizerName.adamw_8bit, OptimizerName.paged_adamw_8bit})
FACTOR, WHOLE = "lr_factor", "whole"
"""Entries of a group of parameters: the factor of its learning rate, and whether its parameters are stepped whole."""


def check_optimizer(settings: EngineSettings) -> None:
    """Refuse an optimizer that this machine or the engine's settings cannot run.

    Raises:
        UsageError: names the key and what to set instead.
    """
    name, offload = settings.optim.name, settings.engine.offload
    if name in EIGHT_BIT and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"optim.name={name.value} needs bitsandbytes\n  pip install 'chunkflow-cli[quant]'")
    if name is OptimizerName.paged_adamw_8bit and settings.device.type == "cpu":
        raise UsageError(
            f"optim.name={name.value} pages between a GPU and the host, and this machine has no GPU\n"
            "  set optim=adamw_8bit"
        )
    if offload is not Offload.none and name not in (OptimizerName.adamw, OptimizerName.sgd):
        raise UsageError(
            f"engine.offload={offload.value} with optim.name={name.value}: only AdamW and SGD run on the host\n"
            "  set engine.offload=none, or optim=adamw"
        )


def make_optimizer(
    module: nn.Module, settings: EngineSettings, hf_names: Mapping[str, str] | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of the trained parameters of `module`.

    Weight decay applies to matrices, and not to norms and biases, as in the Hugging Face trainer.

    Args:
        hf_names: name of each parameter of `module` -> its name in the whole Hugging Face model; by default, the same.
    """
    optim = settings.optim
    groups = _groups(module, settings, hf_names)
    betas = (optim.betas[0], optim.betas[1])
    if optim.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    if optim.name in EIGHT_BIT:
        bitsandbytes = importlib.import_module("bitsandbytes")
        # Every tensor in 8 bits, however small: which tensors are small depends on the layout of the ranks.
        kind = bitsandbytes.optim.AdamW8bit
        if optim.name is OptimizerName.paged_adamw_8bit:
            kind = bitsandbytes.optim.PagedAdamW8bit
        return kind(groups, lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=0.0, min_8bit_size=1)  # type: ignore[no-any-return]
    # Also on the host: DeepSpeed's would be compiled first, which needs a compiler and the right CUDA toolkit.
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    if optim.name in (OptimizerName.muon, OptimizerName.adafactor):
        return WholeParameters(groups, _of_whole(optim), rest=adamw)
    return adamw


def _groups(module: nn.Module, settings: EngineSettings, hf_names: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Return the trained parameters in groups that share weight decay, factor of the rate and way to be stepped."""
    optim = settings.optim
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    whole = frozenset(_stepped_whole((hf_names[name] if hf_names else name for name, _ in trained), settings))
    # Matrices first, as they have always been: DeepSpeed numbers its partitions by group.
    for name, parameter in sorted(trained, key=lambda item: item[1].ndim < 2):
        hf_name = hf_names[name] if hf_names else name
        factor, is_matrix = factor_of(hf_name, optim.lr_factors), parameter.ndim >= 2
        group = groups.setdefault(
            (is_matrix, hf_name in whole, factor),
            {
                "params": [],
                "weight_decay": optim.weight_decay if is_matrix else 0.0,
                "lr": optim.lr * factor,
                FACTOR: factor,
                WHOLE: hf_name in whole,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _stepped_whole(names: Iterable[str], settings: EngineSettings) -> Iterable[str]:
    """Return those of the parameters' Hugging Face names whose update depends on the whole parameter."""
    if settings.optim.name is OptimizerName.adafactor:
        return names
    if settings.optim.name is OptimizerName.muon:
        return (name for name in names if name in settings.matrices)
    return ()


def _of_whole(optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that steps whole parameters; what it is made with is replaced at every step."""
    idle = [torch.zeros(1, 1)]
    if optim.name is OptimizerName.adafactor:
        return torch.optim.Adafactor(idle, lr=optim.lr)
    # Scaled so that a step is as large as AdamW's, and one rate serves both (Liu et al. 2025, arXiv 2502.16982).
    return torch.optim.Muon(idle, lr=optim.lr, momentum=optim.momentum, adjust_lr_fn="match_rms_adamw")
