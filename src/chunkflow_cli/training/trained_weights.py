"""Check before a run which weights it trains, and print that at its start."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from chunkflow_cli.config.schema import Config, OptimizerName
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.loading import skeleton
from chunkflow_cli.model.trained_weights import TrainedShare, apply_to, layer_matrices


def check_trained_weights(config: Config, hf_config: Any) -> list[str]:
    """Check the names of weights in `optim` on the model without its weights, and return what to say of them.

    Raises:
        UsageError: a name means no trained weight, nothing is left to train, or Muon has no matrix.
    """
    optim = config.optim
    is_muon = optim.name is OptimizerName.muon
    if not (optim.freeze or optim.lr_factors or is_muon):
        return []
    model = skeleton(config.model, hf_config)
    share = apply_to(model, optim)
    return [*([str(share)] if optim.freeze else []), *([_of_muon(model, share)] if is_muon else [])]


def announce_trained_weights(config: Config, hf_config: Any, console: Console) -> None:
    """Print what is frozen and what Muon trains. The first process calls it."""
    for line in check_trained_weights(config, hf_config):
        console.print(line, soft_wrap=True)


def _of_muon(model: Any, share: TrainedShare) -> str:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices = sum(sizes[name] for name in layer_matrices(model))
    if not matrices:
        raise UsageError("optim.name=muon: no matrix of the layers is trained, which is all that Muon trains\n"
                         "  set optim=adamw, or leave some out of optim.freeze")  # fmt: skip
    return f"Muon trains {100 * matrices / share.trained:.3g} % of the trained weights, AdamW the others"
