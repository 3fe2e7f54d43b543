"""One stage of a pipeline, cut out of a Hugging Face causal LM.

The model keeps its shape: a layer that another stage holds is replaced by one that hands its input on and has no
weights. So every layer keeps its index, which names its weights, chooses its window and keeps its state apart, and the
configuration's lists of layers stay right. The layer before the stage's first one hands on the hidden states that came
from the stage before, whatever it is given: what the model does to its embeddings (multipliers, norms, dropout) happens
on the first stage only.

Adapters are added to the whole model before it is cut: their random numbers are then those of a single process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.chunk_model import ChunkCall, ChunkModel, base_model, decoder_of
from chunkflow_cli.execution.split_backward import PutOff, split_linear_layers
from chunkflow_cli.planning.stage_cut import StageLayers


class StageModel(ChunkModel):
    """A stage as a module: hidden states in, hidden states out; the first takes token ids, the last gives the loss."""

    def __init__(self, causal_lm: nn.Module, backend: Backend, stage: StageLayers) -> None:
        """
        Args:
            causal_lm: the whole model, with adapters if any. It is cut in place: what other stages hold is let go.
            backend: of attention.
            stage: which layers it keeps.

        Raises:
            UsageError: the model is not built as a pipeline needs it.
        """
        super().__init__(causal_lm, backend)
        self.stage = stage
        name = type(base_model(causal_lm)).__name__
        whole = {id(parameter): name for name, parameter in causal_lm.named_parameters()}
        self.tied_weight: nn.Parameter | None = _tied_weight(causal_lm) if stage.stages > 1 else None
        """The weight that embedding and head share, on the stages that hold it: their gradients belong together."""
        self._entry = _cut(causal_lm, stage, name)
        if not (stage.is_first or stage.is_last):
            self.tied_weight = None
        self.hf_parameter_names: dict[str, str] = {
            own: whole[id(parameter)] for own, parameter in self.named_parameters()
        }
        """Name of each parameter of this module -> its name in the whole Hugging Face (or peft) model."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UsageError(
                f"parallel.pipeline={stage.stages}: stage {stage.stage} (layers {stage.first} to {stage.stop - 1}) has "
                "nothing to train\n  model.lora.target_modules must name modules in every layer"
            )

    def put_off_products(self) -> PutOff:
        """From now on backwards may be split in two: where the products of their second halves wait."""
        put_off = PutOff()
        split_linear_layers(self, put_off, apart=base_model(self.causal_lm).get_output_embeddings())
        return put_off

    @property
    def hidden_size(self) -> int:
        return int(base_model(self.causal_lm).config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states that stages exchange."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def forward(  # type: ignore[override]
        self, call: ChunkCall, received: Tensor | None = None, *, state_pass: bool = False
    ) -> Tensor | None:
        """
        Args:
            call: one chunk.
            received: (1, tokens, hidden_size) from the stage before; None on the first.
            state_pass: fill the state store only.

        Returns:
            (1, tokens, hidden_size) for the next stage; on the last one the loss, or None for a state pass.
        """
        assert (received is None) == self.stage.is_first, "hidden states come from the stage before, if there is one"
        if self._entry is not None:
            self._entry.received = received
        try:
            if not self.stage.is_last:
                return self.hidden(call, state_pass=state_pass)[None]
            if state_pass:
                self.hidden(call, state_pass=True)
                return None
            return self._loss(call)
        finally:
            if self._entry is not None:
                self._entry.received = None

    def _inputs(self, call: ChunkCall) -> dict[str, Tensor]:
        if self._entry is None:
            return super()._inputs(call)
        assert self._entry.received is not None
        # Only its shape and dtype are looked at: the entry hands on the hidden states themselves.
        return {"inputs_embeds": self._entry.received.detach()}

    def _last_layer_of_state_pass(self) -> int | None:
        """Other stages still need what comes after this one's last keys and values."""
        return super()._last_layer_of_state_pass() if self.stage.is_last else None


class StageChain(nn.Module):
    """All stages of a model in one process, one after the other: autograd goes through them as messages would."""

    def __init__(self, stages: Sequence[StageModel]) -> None:
        super().__init__()
        self._stages = tuple(stages)
        self._registered = nn.ModuleList(stages)

    def forward(self, call: ChunkCall, *, state_pass: bool = False) -> Tensor | None:
        hidden: Tensor | None = None
        for stage in self._stages:
            hidden = stage(call, hidden, state_pass=state_pass)
        return hidden

    def gradients(self) -> dict[str, Tensor]:
        """Under the names of the whole model; those of a weight that two stages hold are added."""
        sums: dict[str, Tensor] = {}
        for stage in self._stages:
            for own, parameter in stage.named_parameters():
                if parameter.grad is not None:
                    name = stage.hf_parameter_names[own]
                    sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
        return sums


class _Elsewhere(nn.Module):
    """Stands for a layer that another stage holds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            # What kind of attention a layer has is read off it by some models.
            if name in ("attention_type", "layer_idx", "layer_type"):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Entry(_Elsewhere):
    """The last layer before the stage: hands on what came from the stage before."""

    received: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        assert self.received is not None
        return self.received


def _cut(causal_lm: nn.Module, stage: StageLayers, name: str) -> _Entry | None:
    """Take out of the model what other stages hold; returns where hidden states enter, if not through ids."""
    base = base_model(causal_lm)
    decoder = decoder_of(base)
    layers, norm = _layers_and_norm(base, decoder, name, stage.stages)
    assert len(layers) == base.config.get_text_config().num_hidden_layers
    entry = None
    for index, layer in enumerate(layers):
        if stage.first <= index < stage.stop:
            continue
        if index == stage.first - 1:
            layers[index] = entry = _Entry(layer)
        else:
            layers[index] = _Elsewhere(layer)
    if not stage.is_first:
        # Tied weights stay alive through the head, where the last stage needs them.
        _replace(decoder, decoder.get_input_embeddings())
    if not stage.is_last:
        setattr(decoder, norm, nn.Identity())
        _replace(base, base.get_output_embeddings())
    return entry


def _layers_and_norm(base: Any, decoder: Any, name: str, stages: int) -> tuple[nn.ModuleList, str]:
    """The layers, and the name of the final norm.

    Raises:
        UsageError: the decoder holds weights besides embedding, layers and final norm, and a stage would not know when
            to use them.
    """
    layers = getattr(decoder, "layers", None)
    embedding = base.get_input_embeddings()
    others = {
        child: module
        for child, module in decoder.named_children()
        if module is not layers and module is not embedding and any(True for _ in module.parameters())
    }
    has_head = base.get_output_embeddings() is not None
    if isinstance(layers, nn.ModuleList) and has_head and len(others) == 1 and "norm" in next(iter(others)):
        return layers, next(iter(others))
    reason = ", ".join(sorted(others)) or "layers"
    raise UsageError(
        f"parallel.pipeline={stages}: {name} cannot be cut into stages: it is not an embedding, a list of layers, a "
        f"norm and a head ({reason})\n  take parallel.pipeline=1"
    )


def _replace(parent: nn.Module, module: nn.Module) -> None:
    """Take a direct child out of its parent."""
    for name, child in parent.named_children():
        if child is module:
            setattr(parent, name, nn.Identity())
            return
    raise AssertionError(f"{type(module).__name__} is no direct part of {type(parent).__name__}")


def _tied_weight(causal_lm: nn.Module) -> nn.Parameter | None:
    """The weight that embedding and head share, if it is trained."""
    base = base_model(causal_lm)
    weight: nn.Parameter | None = getattr(base.get_output_embeddings(), "weight", None)
    shared: nn.Parameter | None = getattr(base.get_input_embeddings(), "weight", None)
    return weight if weight is not None and weight is shared and weight.requires_grad else None
