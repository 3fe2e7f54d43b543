"""Determine which weights of a model are trained, and which of them are matrices of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from chunkflow_cli.config.schema import Config, OptimConfig, OptimizerName
from chunkflow_cli.config.weight_names import is_named
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.loading import skeleton
from chunkflow_cli.model.special_types import computes_own_attention

SHOWN = 4
"""Names of weights that an error lists."""


@dataclass(frozen=True)
class TrainedShare:
    """How many of a model's weights are trained."""

    trained: int
    weights: int

    def __str__(self) -> str:
        share = 100 * self.trained / self.weights
        return f"optim.freeze: {share:.2g} % of the weights are trained, {self.trained:,} of {self.weights:,}"


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the weights that `optim.freeze` names, and indexers. `model` is whole, with its adapters.

    Raises:
        UsageError: a name means no weight that is trained, or no weight is left to train.
    """
    for indexer in indexers(model):
        indexer.requires_grad_(False)
    if not _trained(model):
        raise UsageError(
            "model.lora.target_modules names only parts of the indexer, which transformers gives no gradient\n"
            "  name other modules"
        )
    trained = dict(_trained(model))
    for name in names:
        for weight in _named("optim.freeze", name, list(trained)):
            trained[weight].requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("optim.freeze leaves nothing to train\n  name fewer weights")


def indexers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that pick keys (DSA). They get no gradient, and weight decay would shrink them."""
    config = getattr(model, "config", None)
    if config is None or not computes_own_attention(config):
        return []
    return [module for module in model.modules() if type(module).__name__.endswith("Indexer")]


def check_factors(model: nn.Module, factors: Iterable[str]) -> None:
    """Check that each name in `optim.lr_factors` means a weight that is trained.

    Raises:
        UsageError: one does not.
    """
    trained = [weight for weight, parameter in _trained(model) if parameter.requires_grad]
    for name in factors:
        _named("optim.lr_factors", name, trained)


def apply_to(model: nn.Module, optim: OptimConfig) -> TrainedShare:
    """Freeze what `optim.freeze` names, check `optim.lr_factors`, and return the share of weights that are trained.

    Raises:
        UsageError: as `freeze` and `check_factors`.
    """
    freeze(model, optim.freeze)
    check_factors(model, optim.lr_factors)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return TrainedShare(sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts))


def describe_trained_weights(config: Config, hf_config: Any) -> list[str]:
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
    return [*([str(share)] if optim.freeze else []), *([_describe_muon(model, share)] if is_muon else [])]


def _describe_muon(model: Any, share: TrainedShare) -> str:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices = sum(sizes[name] for name in layer_matrices(model))
    if not matrices:
        raise UsageError("optim.name=muon: no matrix of the layers is trained, which is all that Muon trains\n"
                         "  set optim=adamw, or leave some out of optim.freeze")  # fmt: skip
    return f"Muon trains {100 * matrices / share.trained:.3g} % of the trained weights, AdamW the others"


def layer_matrices(model: Any) -> frozenset[str]:
    """Return the names of the trained matrices in a model's layers, which Muon orthogonalises.

    These are the weights of linear layers, routers and stacked experts. Embeddings and the head are tables of tokens,
    filters of convolutions are vectors, and all of these go to AdamW (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon).

    Args:
        model: a Hugging Face or peft model, whole.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    excluded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.Conv1d)) or any(module is table for table in tables)
        for parameter in module.parameters()
    }
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in excluded and _is_matrix(name, parameter)
    )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix or a stack of them; Mamba's (channels, states) and biases are none."""
    is_named_so = parameter.ndim == 3 or (parameter.ndim == 2 and name.endswith(".weight"))
    return is_named_so and min(parameter.shape[-2:]) > 1


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the trained weights, by every name that they have: a tied weight has several."""
    return [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]


def _named(key: str, name: str, weights: Sequence[str]) -> list[str]:
    """Return those of the trained weights that a name in the configuration means.

    Raises:
        UsageError: there are none.
    """
    if found := [weight for weight in weights if is_named(weight, name)]:
        return found
    shown = ", ".join([*weights[:SHOWN], "..."] if len(weights) > SHOWN else weights)
    raise UsageError(
        f"{key}: {name!r} matches no weight that is trained\n  use whole parts of a name, such as layers.0, or a "
        f"regular expression for all of it; the weights are {shown}"
    )
