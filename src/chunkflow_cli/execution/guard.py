"""The guard: proof at the start of `train` that an architecture trains exactly in chunks.

It compares chunked and whole-sequence training on a small random model of the same architecture, made so that nothing
hides: windows shorter than the test sequences, large initial weights, one layer of each kind, every multiplier of the
configuration.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from chunkflow_cli.config.schema import ActivationCheckpointing, Attention
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.kernel_check import check_backend, head_dims_of
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import (
    TOLERANCES,
    Parity,
    compare,
    random_sequences,
    remove_dropout,
    use_float64_experts,
)
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.loading import random_model

ROUNDING_SUSPECTED = 1e-3
"""A float32 difference below this is checked again in float64."""

GUARD_LENGTHS = (150, 21, 40)
GUARD_CHUNK_SIZE = 48
GUARD_WINDOW = 37
GUARD_VOCABULARY = 512
GUARD_PROJECTION_STD = 1.6
"""Spread of a projection of a normalised input: weights are drawn with this over sqrt(hidden_size), 0.2 at 64. Scores
are far from zero then, so a missing soft cap or multiplier shows, but not so large that rounding drowns everything."""


def guard(
    hf_config: Any,
    *,
    requested: Attention,
    device: torch.device,
    dtype: torch.dtype,
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    is_pipeline: bool = False,
) -> Parity:
    """Prove on a small float32 model of the same architecture that chunks change nothing.

    Args:
        requested: `model.attention` of the run, whose device, dtype and other settings are given, too.
        is_pipeline: cut the small model into two pipeline stages, too.

    Raises:
        UsageError: the gradients differ, or the architecture cannot run in chunks.
    """
    name = getattr(hf_config.get_text_config(), "model_type", type(hf_config).__name__)
    check_backend(choose_backend(requested, hf_config, device, dtype).backend, device, dtype, head_dims_of(hf_config))
    small = small_config(hf_config)
    attention_ = requested if requested in (Attention.reference, Attention.cpu) else Attention.auto
    backend = choose_backend(attention_, small, device, torch.float32).backend
    stages = 2 if is_pipeline else 1
    how = "in chunks through the stages of a pipeline" if is_pipeline else "in chunks"
    try:
        parity = _compare_small(small, backend, device, torch.float32, activation_checkpointing, stages)
        if TOLERANCES[torch.float32] < parity.grad_rel_error < ROUNDING_SUSPECTED:
            # Saturated scores can lift float32's own rounding this high; in float64 only a real difference remains.
            parity = _compare_small(small, ReferenceBackend(), device, torch.float64, activation_checkpointing, stages)
    except (UsageError, TypeError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"models of type {name!r} cannot be trained {how}: a small one fails with\n  {reason}"
        ) from error
    if not parity.passed:
        raise UsageError(
            f"models of type {name!r} cannot be trained exactly {how}: on a small random one the gradient differs by "
            f"{parity.grad_rel_error:.1e}\n  from whole-sequence training ({parity.tolerance:.0e} is allowed), most in "
            f"{parity.grad_max_rel_error_parameter}.\n  Its layers mix tokens by more than attention (recurrent ones, "
            "for example), or the logits are changed in a way that is not supported yet."
        )
    return parity


def _compare_small(
    config: Any,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    checkpointing: ActivationCheckpointing,
    stages: int,
) -> Parity:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = _small_model(config, device, dtype)
        enable_activation_checkpointing(model, checkpointing)
        sequences = random_sequences(GUARD_LENGTHS, GUARD_VOCABULARY)
        # transformers computes norms in float32 for every dtype, which leaves 1e-8 in float64.
        tolerance = 1e-6 if dtype is torch.float64 else None
        return compare(model, backend, sequences, chunk_size=GUARD_CHUNK_SIZE, k=2, tolerance=tolerance, stages=stages)


def small_config(hf_config: Any) -> Any:
    """Return a configuration of the same architecture that trains in a second and hides nothing.

    Kept: head_dim, the ratio of query to key heads, every multiplier and flag. Changed: few layers, one or more of
    each kind; a small vocabulary; windows and attention chunks shorter than the test sequences; initial weights large
    enough for scores to matter; no dropout, because two forwards could not agree under it.
    """
    small = copy.deepcopy(hf_config)
    config = small.get_text_config()
    _keep_one_layer_of_each_kind(config)
    config.vocab_size = GUARD_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None):
            setattr(config, name, min(int(getattr(config, name)), GUARD_WINDOW))
    remove_dropout(config)
    _narrow(config)
    if hasattr(config, "initializer_range"):
        config.initializer_range = max(float(config.initializer_range), GUARD_PROJECTION_STD / config.hidden_size**0.5)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small


def _keep_one_layer_of_each_kind(config: Any) -> None:
    layers = int(config.num_hidden_layers)
    per_layer = [n for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == layers and layers > 1]
    kinds: dict[tuple[Any, ...], int] = {}
    for index in range(layers):
        kinds.setdefault(tuple(repr(getattr(config, name)[index]) for name in per_layer), index)
    keep = sorted(kinds.values())[:6]
    while len(keep) < min(2, layers):  # state and gradient must pass through more than one layer
        keep.append(keep[-1])
    for name in per_layer:
        values = getattr(config, name)
        setattr(config, name, [values[index] for index in keep])
    config.num_hidden_layers = len(keep)


def _narrow(config: Any) -> None:
    """Reduce heads and the width of feed-forward layers: the parts of a layer stay, and its width does not matter."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    hidden = int(config.hidden_size)
    if heads and hidden > 512 and heads % kv_heads == 0 and hidden % heads == 0:
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
        few_kv = min(kv_heads, 2)
        config.num_attention_heads = few_kv * (heads // kv_heads)
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = few_kv
        config.hidden_size = config.num_attention_heads * (hidden // heads)
        if hasattr(config, "head_dim"):
            config.head_dim = head_dim
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 256))
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(getattr(config, name, None), int):
            chosen = int(getattr(config, "num_experts_per_tok", 1) or 1)
            setattr(config, name, min(getattr(config, name), max(4, chosen)))


def _small_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        model = random_model(config, dtype=dtype)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, AssertionError) as error:
        # One line, because `guard` shows only the first.
        remedy = "if `chunkflow verify` passes on the model itself, train with train.guard=false"
        raise UsageError(f"{error!r}, so the guard cannot build it; {remedy}") from error
    use_float64_experts(model, dtype)
    model.config.use_cache = False
    return model.to(device).train()
