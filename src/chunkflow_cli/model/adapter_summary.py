"""What of a model its adapters train, and what they leave out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from chunkflow_cli.model.adapter_targets import (
    PARAMETERS_KEY,
    fused_parameters,
    in_any_layer,
)

WORTH_A_WARNING = 0.01
"""Share of weights outside of linear layers above which a warning names their missing adapters."""


@dataclass(frozen=True)
class AdapterSummary:
    """Summary of what the adapters of a model train, and what they leave out."""

    kind: str
    """LoRA | DoRA"""
    trained: int
    """Weights of the adapters, and of the modules that are trained whole."""
    base: int
    """Weights of the model without adapters."""
    where: tuple[str, ...]
    """The adapted layers and parameters, without the numbers of their layers."""
    rank: int
    saved: tuple[str, ...]
    """The modules that are trained whole, without the numbers of their layers."""
    saved_weights: int
    """Number of weights in these modules; shared weights count once."""
    unreached: tuple[str, ...]
    """Fused parameters without an adapter, such as those of experts: no name of a linear layer reaches them."""
    unreached_share: float
    """Share of the model's weights in these parameters, between 0 and 1."""

    def __str__(self) -> str:
        where = ", ".join(self.where)
        share = 100 * self.trained / self.base
        whole = f", and all {self.saved_weights:,} of {', '.join(self.saved)}" if self.saved else ""
        return (
            f"{self.kind} trains {share:.2g} % of the weights: {self.trained - self.saved_weights:,} in adapters of "
            f"rank {self.rank} on {where}{whole}"
        )

    @property
    def warning(self) -> str | None:
        """Warning about fused parameters without an adapter, with the key that adapts them; None if they are few."""
        if self.unreached_share < WORTH_A_WARNING:
            return None
        verb = "has" if len(self.unreached) == 1 else "have"
        return (
            f"{' and '.join(self.unreached)} {verb} no adapter: {100 * self.unreached_share:.0f} % of the weights are "
            f"no linear layers. To adapt them: {PARAMETERS_KEY}=[{','.join(self.unreached)}]"
        )


def summarize(peft_model: Any) -> AdapterSummary:
    """Return what the adapters of a whole model train; on the meta device, too."""
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, layer, parameter in adapted_layers(peft_model):
        if parameter is None:
            modules[name] = layer
        else:
            parameters[f"{name}.{parameter}"] = getattr(layer.get_base_layer(), parameter)
    trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in peft_model.parameters()) - trained
    adapted = {id(parameter) for parameter in parameters.values()}
    bare = {name: parameter for name, parameter in _fused(peft_model).items() if id(parameter) not in adapted}
    saved = dict(saved_modules(peft_model))
    copies = {parameter for module in saved.values() for parameter in module.parameters()}
    return AdapterSummary(
        kind="DoRA" if peft_model.peft_config["default"].use_dora else "LoRA",
        trained=trained,
        base=base,
        where=tuple(sorted({name.rpartition(".")[2] for name in modules})) + tuple(in_any_layer(parameters)),
        rank=peft_model.peft_config["default"].r,
        saved=tuple(in_any_layer(saved)),
        saved_weights=sum(parameter.numel() for parameter in copies),
        unreached=tuple(in_any_layer(bare)),
        unreached_share=sum(parameter.numel() for parameter in bare.values()) / base,
    )


def adapted_layers(peft_model: Any) -> Iterator[tuple[str, Any, str | None]]:
    """Yield each layer that peft has put an adapter on: its name in the Hugging Face model, and the layer itself.

    The third is the name of the parameter that the adapter is on; None if it is on the layer's weight as a whole.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            # Several adapted parameters of a layer are wrapped one around the other.
            yield name.replace(".base_layer", ""), layer, getattr(layer, "parameter_name", None)


def saved_modules(peft_model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module that is trained whole: its name in the Hugging Face model, and the copy that is trained."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, trained_copy(module)


def trained_copy(module: Any) -> Any:
    """Return the copy that is trained instead of a module under `modules_to_save`; any other module itself."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies["default"]


def _fused(peft_model: Any) -> dict[str, nn.Parameter]:
    """Return the fused parameters of a model with adapters by their names without them."""
    model = peft_model.get_base_model()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name.replace(".base_layer", ""): parameters[name] for name in fused_parameters(model)}
