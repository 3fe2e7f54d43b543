"""A causal language model that forwards chunks. The engine drives it as its module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.execution.attention.backend import Backend, Packing
from chunkflow_cli.execution.attention.function import ChunkAttentionContext, require_attention_interface
from chunkflow_cli.execution.attention.key_blocks import prepare_attention_to_blocks
from chunkflow_cli.execution.attention.own import cache_inputs, prepare_own_attention
from chunkflow_cli.execution.batch import ChunkBatch
from chunkflow_cli.execution.loss import (
    LogitTransform,
    SharedHeadGradient,
    log_probabilities,
    weighted_cross_entropy,
)
from chunkflow_cli.execution.noise import noisy
from chunkflow_cli.execution.preferences import PreferenceStep
from chunkflow_cli.execution.recurrent import RunningChunk, comes_after_attention, prepare_recurrent_layers
from chunkflow_cli.execution.sequence_parallel import SequenceGroup
from chunkflow_cli.execution.state import StatePiece
from chunkflow_cli.model.adapter_summary import trained_copy
from chunkflow_cli.model.attention_heads import attention_heads
from chunkflow_cli.model.float32_weights import widen_float32_weights
from chunkflow_cli.model.forward_scope import ForwardScope
from chunkflow_cli.model.hf_config import known_ids
from chunkflow_cli.model.language_part import decoder_of, module_before_head, names_in_forward
from chunkflow_cli.model.special_types import attends_to_blocks, computes_own_attention


@dataclass(frozen=True)
class ChunkCall:
    """One chunk of a forward."""

    batch: ChunkBatch
    piece: StatePiece | None
    """The chunk's piece of a long sequence; None in a standalone chunk."""
    head_gradient: SharedHeadGradient | None = None
    """Sum of the head's gradient, shared by chunks that hold activations at the same time; None for a chunk alone."""
    sequence_group: SequenceGroup | None = None
    """The group whose ranks share the chunk's tokens, each with its slice in `batch`; None if this rank has all of
    them. It is the same for all chunks of a sequence, whose state has either the heads of one rank or all heads."""
    preferences: PreferenceStep | None = None
    """The sums of log-probabilities that weigh the chunk's targets; None in supervised training."""
    adds_sums: bool = False
    """True in the forward of the chunk that adds its log-probabilities to these sums."""


class ChunkModel(nn.Module):
    """Wraps a Hugging Face causal LM. `forward` returns the summed, weighted loss of its chunks.

    Raises:
        UsageError: the model computes its attention itself, where chunks cannot reach it.
    """

    def __init__(self, causal_lm: nn.Module, backend: Backend) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.backend = backend
        base = base_model(causal_lm)
        widen_float32_weights(base)
        self.computes_own_attention = computes_own_attention(base.config)
        leaving_edges: tuple[str, ...] = ()
        if attends_to_blocks(base.config):
            leaving_edges = prepare_attention_to_blocks(base)
        elif self.computes_own_attention:
            prepare_own_attention(base)
        elif attention_heads(base.config):
            require_attention_interface(decoder_of(base))
        last = int(base.config.get_text_config().num_hidden_layers) - 1
        self.transform = logit_transform(base)
        self.recurrent_layers = (*prepare_recurrent_layers(base), *leaving_edges)
        """Module names of the layers that pass a recurrent state from chunk to chunk."""
        self._last_layer = None if comes_after_attention(base, last) else last

    def forward(self, *calls: ChunkCall, state_pass: bool = False, first_pass: bool = False) -> Tensor | None:
        """Return the loss of the chunks, run in this order; None for a state pass, which only fills the state store.

        A first pass fills the store as well, and the sums of log-probabilities. With preferences, the loss only has the
        right gradient: the weights of its targets follow from the sums, which these chunks may be the last to add to.
        For a chunk that is spread over a group, the loss is this rank's share: the sum over the targets of its slice.
        """
        if state_pass:
            for call in calls:
                self.hidden(call, state_pass=True)
            return None
        if all(call.preferences is None for call in calls):
            losses = [self._loss(call, self.hidden(call)) for call in calls]
        else:
            hidden = [self.hidden(call, is_kept=first_pass) for call in calls]
            for call, states in zip(calls, hidden, strict=True):
                self._add_sums(call, states)
            if not torch.is_grad_enabled():
                return hidden[0].new_zeros(())
            for call in calls:  # ranks that share tokens add up their sums here, also those without a target
                assert call.preferences is not None
                call.preferences.weights()
            losses = [self._loss(call, states) for call, states in zip(calls, hidden, strict=True)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def hidden(self, call: ChunkCall, *, state_pass: bool = False, is_kept: bool = False) -> Tensor:
        """Return the hidden states that the head gets, (tokens, hidden_size).

        Args:
            is_kept: without gradient, keep all state for another forward of the chunk.
        """
        packing = Packing(call.batch.boundaries, call.batch.input_ids.device)
        last_layer = self._last_layer_of_state_pass() if state_pass else None
        context = ChunkAttentionContext(packing, self.backend, call.piece, last_layer, call.sequence_group)
        base = base_model(self.causal_lm)
        decoder = decoder_of(base)
        chunk = RunningChunk(context, is_evaluated=not (state_pass or is_kept or torch.is_grad_enabled()))
        inputs = self._inputs(call) | (cache_inputs(decoder, context) if self.computes_own_attention else {})
        with ForwardScope(chunk), noisy(base.get_input_embeddings(), call.batch.noise):
            out = decoder(**inputs, position_ids=call.batch.position_ids, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        before_head = module_before_head(base)
        return hidden if before_head is None else before_head(hidden)

    def _inputs(self, call: ChunkCall) -> dict[str, Any]:
        """Return the decoder's input."""
        return {"input_ids": call.batch.input_ids}

    def _last_layer_of_state_pass(self) -> int | None:
        """Return the layer after whose keys and values a state pass may stop; None if a later state depends on them."""
        return self._last_layer

    def _add_sums(self, call: ChunkCall, hidden: Tensor) -> None:
        batch = call.batch
        if call.preferences is None or not call.adds_sums:
            return
        assert batch.target_places is not None
        head = head_of(self.causal_lm)
        found = log_probabilities(hidden[batch.target_positions], head, batch.targets, self.transform)
        call.preferences.add(batch.target_places, found)

    def _loss(self, call: ChunkCall, hidden: Tensor) -> Tensor:
        head = head_of(self.causal_lm)
        if call.batch.target_tokens == 0:
            # Later chunks give gradient to its keys and values: the chunk must still go backward.
            nothing = hidden.sum() * 0
            if hidden.requires_grad or not torch.is_grad_enabled():
                return nothing
            return sum(
                (p.sum() * 0 for p in head.parameters() if p.requires_grad), nothing
            )  # the head alone is trained
        weights = call.batch.target_weights
        if call.preferences is not None and call.batch.target_places is not None:
            weights = weights + call.preferences.weights()[call.batch.target_places].to(weights.dtype)
        return weighted_cross_entropy(
            hidden[call.batch.target_positions],
            head,
            call.batch.targets,
            weights,
            self.transform,
            shared=call.head_gradient,
            losses=call.batch.target_losses,
        )


def base_model(causal_lm: nn.Module) -> Any:
    """Return the Hugging Face model itself, unwrapped from a peft model."""
    unwrap = getattr(causal_lm, "get_base_model", None)
    return causal_lm if unwrap is None else unwrap()


def head_of(causal_lm: nn.Module) -> Any:
    """Return the module that turns hidden states into logits: the trained copy if adapters come with one."""
    return trained_copy(base_model(causal_lm).get_output_embeddings())


def logit_transform(model: Any) -> LogitTransform:
    """Return the change that a Hugging Face model makes to its logits, read from its configuration.

    Models that do something else differ from their own whole-sequence training, and the parity guard refuses them.
    """
    config = model.config.get_text_config()
    # The class around the head may leave out what its configuration names (mpt), or another class does (Cohere2Vision).
    names = names_in_forward(model)

    def setting(name: str) -> float | None:
        value = getattr(config, name, None) if name in names else None
        return None if value is None else float(value)

    scale = 1.0
    for name in ("logits_scaling", "logits_mup_width_multiplier"):  # granite and inkling divide
        if (divisor := setting(name)) is not None:
            scale = 1.0 / divisor
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # cohere, falcon_h1, muse_glimmer
        if (factor := setting(name)) is not None:
            scale = factor
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # gemma2, recurrent_gemma, xlstm
    softcap = next((cap for name in caps if (cap := setting(name)) is not None), None)
    if softcap is None and "logit_softcap" in names:  # a module of inkling2
        softcap = float(config.final_logit_softcapping)
    return LogitTransform(scale, softcap, known_ids(config) if "unpadded_vocab_size" in names else None)
