"""One stage of a pipeline, cut out of a Hugging Face causal LM.

The model keeps its structure: a layer that another stage holds is replaced by one that returns its input and has no
weights. So every layer keeps its index, which names its weights, selects its window and keeps its state apart, and the
configuration's lists of layers stay right. The layer before the stage's first one returns the hidden states that came
from the stage before, and ignores its own input: what the model does to its embeddings (multipliers, norms, dropout)
then happens on the first stage only.

Adapters are added to the whole model before it is cut, so their random numbers are those of a single process.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.chunk_model import ChunkCall, ChunkModel, base_model, head_of
from chunkflow_cli.execution.split_backward import PutOff, put_off_products
from chunkflow_cli.model.language_part import decoder_of
from chunkflow_cli.model.stage_parts import layers_and_norm
from chunkflow_cli.planning.stage_cut import StageLayers


class StageModel(ChunkModel):
    """One stage as a module: it maps hidden states to hidden states. The first takes ids, the last returns the loss."""

    def __init__(self, causal_lm: nn.Module, backend: Backend, stage: StageLayers) -> None:
        """
        Args:
            causal_lm: the whole model, with its adapters. It is cut in place: layers of other stages are freed.

        Raises:
            UsageError: the model cannot be cut.
        """
        super().__init__(causal_lm, backend)
        self.stage = stage
        whole = {id(parameter): name for name, parameter in causal_lm.named_parameters()}
        self.tied_weight = _tied_weight(causal_lm) if stage.is_first != stage.is_last else None
        """The weight that embedding and head share, on the two stages that hold it: their gradients must be added."""
        self._entry = _cut(causal_lm, stage)
        self.hf_parameter_names = {own: whole[id(parameter)] for own, parameter in self.named_parameters()}
        """Parameter name in this module -> its name in the whole Hugging Face (or peft) model."""

    def put_off_products(self) -> PutOff:
        """Allow backwards to be split in two from now on; return the store of the products of their second halves."""
        return put_off_products(self, apart=head_of(self.causal_lm))

    @property
    def hidden_size(self) -> int:
        return int(base_model(self.causal_lm).config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the hidden states that stages exchange."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def forward(  # type: ignore[override]
        self, call: ChunkCall, received: Tensor | None = None, *, state_pass: bool = False
    ) -> Tensor | None:
        """Forward one chunk through the layers of this stage.

        Args:
            received: (1, tokens, hidden_size) from the stage before; None on the first.
            state_pass: only fill the state store.

        Returns:
            (1, tokens, hidden_size) for the next stage; on the last one the loss, or None for a state pass.
        """
        assert (received is None) == self.stage.is_first, "hidden states come from the stage before, if there is one"
        if self._entry is not None:
            self._entry.received = received
        if self.stage.is_last:
            return super().forward(call, state_pass=state_pass)
        return self.hidden(call, state_pass=state_pass)[None]

    def _inputs(self, call: ChunkCall) -> dict[str, Tensor]:
        if self._entry is None:
            return super()._inputs(call)
        assert self._entry.received is not None
        # The decoder uses only shape and dtype of this: the entry returns the hidden states themselves.
        return {"inputs_embeds": self._entry.received.detach()}

    def _last_layer_of_state_pass(self) -> int | None:
        """Return None on all stages but the last: the next stage needs the output of all layers."""
        return super()._last_layer_of_state_pass() if self.stage.is_last else None


def check_stages(causal_lm: nn.Module, stages: Sequence[StageLayers]) -> None:
    """Check that each stage of a whole model has something to train. Every rank calls it, so all of them refuse.

    Raises:
        UsageError: the model cannot be cut, or a stage has nothing to train.
    """
    base = base_model(causal_lm)
    decoder = decoder_of(base)
    layers, norm = layers_and_norm(base, len(stages))
    for stage in stages:
        parts = [*layers[stage.first : stage.stop]]
        parts += [base.get_input_embeddings()] if stage.is_first else []
        parts += [getattr(decoder, norm), base.get_output_embeddings()] if stage.is_last else []
        if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
            raise UsageError(
                f"parallel.pipeline={stage.stages}: stage {stage.stage} (layers {stage.first} to {stage.stop - 1}) has "
                "nothing to train\n  train something in it (optim.freeze, model.lora.target_modules), or take fewer "
                "stages"
            )


class StageChain(nn.Module):
    """All stages of a model in one process, one after the other. Autograd connects them as messages do otherwise."""

    def __init__(self, stages: Sequence[StageModel]) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self._registered = nn.ModuleList(stages)

    def forward(self, call: ChunkCall, *, state_pass: bool = False) -> Tensor | None:
        hidden: Tensor | None = None
        for stage in self.stages:
            hidden = stage(call, hidden, state_pass=state_pass)
        return hidden

    def gradients(self) -> dict[str, Tensor]:
        """Return gradients by their names in the whole model; those of a weight that two stages hold are added."""
        sums: dict[str, Tensor] = {}
        for stage in self.stages:
            for own, parameter in stage.named_parameters():
                if parameter.grad is not None:
                    name = stage.hf_parameter_names[own]
                    sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
        return sums


class _Elsewhere(nn.Module):
    """Replaces a layer that another stage holds, and returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            # Some models read the kind of a layer from it.
            if name in ("attention_type", "block_type", "layer_idx", "layer_type"):
                setattr(self, name, value)
        self._results = _results(layer)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if self._results is None else (hidden_states, *[None] * (self._results - 1))


class _Entry(_Elsewhere):
    """Replaces the last layer before the stage, and returns the hidden states that came from the stage before."""

    received: Tensor | None = None
    """Set before each forward and handed on in it, so that nothing keeps it alive after its backward."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        received, self.received = self.received, None
        assert received is not None
        return super().forward(received)


def _results(layer: nn.Module) -> int | None:
    """Return the length of the tuple that begins with the layer's hidden states; None if it returns only these.

    It is read from the source: falcon_h1 and bamba return tuples, and annotations are often wrong.
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(layer).forward)))
    returned = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]
    lengths = {len(value.elts) if isinstance(value, ast.Tuple) else None for value in returned}
    return lengths.pop() if len(lengths) == 1 else None


def _cut(causal_lm: nn.Module, stage: StageLayers) -> _Entry | None:
    """Remove the layers of other stages; return the entry of hidden states, or None on the first stage."""
    base = base_model(causal_lm)
    decoder = decoder_of(base)
    layers, norm = layers_and_norm(base, stage.stages)
    entry = None
    for index, layer in enumerate(layers):
        if index == stage.first - 1:
            layers[index] = entry = _Entry(layer)
        elif not stage.first <= index < stage.stop:
            layers[index] = _Elsewhere(layer)
    if not stage.is_first:
        # On the last stage the head keeps a tied weight alive.
        _replace(decoder, decoder.get_input_embeddings())
    if not stage.is_last:
        setattr(decoder, norm, nn.Identity())
        _replace(base, base.get_output_embeddings())
    return entry


def _replace(whole: nn.Module, module: nn.Module) -> None:
    """Replace a module within another one by one that returns its input."""
    for parent in whole.modules():
        for name, child in parent.named_children():
            if child is module:
                setattr(parent, name, nn.Identity())
                return
    raise AssertionError(f"there is no {type(module).__name__} in {type(whole).__name__}")


def _tied_weight(causal_lm: nn.Module) -> nn.Parameter | None:
    """Return the weight that embedding and head share, or None if they share none or it is frozen."""
    base = base_model(causal_lm)
    weight: nn.Parameter | None = getattr(base.get_output_embeddings(), "weight", None)
    shared: nn.Parameter | None = getattr(base.get_input_embeddings(), "weight", None)
    return weight if weight is not None and weight is shared and weight.requires_grad else None
