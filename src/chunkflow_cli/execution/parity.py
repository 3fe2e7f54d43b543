"""Proof that a model trains exactly in chunks: loss and gradients against whole-sequence training of the same model.

`chunkflow verify` runs it on the configured model, the guard (`guard.py`) on a small model of the same architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import Task
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.acceleration import Acceleration
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.chunk_model import ChunkModel, base_model
from chunkflow_cli.execution.precision import accumulation_dtype, arithmetic_of
from chunkflow_cli.execution.preference_parity import (
    Preferences,
    preference_batch,
    random_preferences,
    whole_preference_loss,
    with_prompts,
)
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.stages import StageChain, StageModel
from chunkflow_cli.execution.state_home import Home, OnDevice
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.execution.whole_sequence import cross_entropies
from chunkflow_cli.model.activation_checkpointing import without_activation_checkpointing
from chunkflow_cli.model.attention_heads import attention_heads
from chunkflow_cli.model.mixers import forget_states
from chunkflow_cli.model.special_types import computes_own_attention
from chunkflow_cli.planning.chunks import Chunks, build_chunks
from chunkflow_cli.planning.preferences import build_pair_chunks, preference_tasks
from chunkflow_cli.planning.schedule import plan, plan_tasks
from chunkflow_cli.planning.stage_cut import cut_layers

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}
"""Largest relative error of the gradient that passes. Wrong attention shows as 1e-2 and more; the guard's settings
lift even a missing soft cap to 1e-2."""


@dataclass(frozen=True)
class Parity:
    """The difference between chunked and whole-sequence training."""

    loss_whole: float
    loss_chunked: float
    grad_rel_error: float
    """Norm of the difference of all gradients over the norm of the whole-sequence gradients."""
    grad_max_rel_error_parameter: str
    """The parameter whose own gradient differs most, relative to its norm."""
    grad_max_rel_error: float
    tolerance: float
    is_float64: bool = False

    @property
    def loss_rel_error(self) -> float:
        return abs(self.loss_chunked - self.loss_whole) / max(abs(self.loss_whole), 1e-30)

    @property
    def passed(self) -> bool:
        return bool(self.grad_rel_error <= self.tolerance and self.loss_rel_error <= self.tolerance)


class DirectEngine:
    """Runs a module without an engine: gradients accumulate in the parameters themselves."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def random_sequences(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[TokenizedSample]:
    """Return sequences of random tokens, about half of them targets; each begins with a piece without targets."""
    rng = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        ids = rng.integers(0, vocab_size, length, dtype=np.int32)
        targets = np.append(ids[1:], IGNORED).astype(np.int32)
        targets[: length // 4] = IGNORED  # a prompt: whole chunks of it have no target of their own
        targets[:-1][rng.random(length - 1) < 0.3] = IGNORED
        sequences.append(TokenizedSample(ids, targets))
    return sequences


@dataclass(frozen=True)
class InChunks:
    """How the chunked side of a comparison runs."""

    backend: Backend
    """Its attention."""
    chunk_size: int
    k: int
    """Chunks of a long sequence that keep their activations."""
    fill_tails: bool = True
    pair_weight: float = 0.0
    """Cuts long sequences as in `build_chunks`, like the two above."""
    stages: int = 1
    """Stages of a pipeline, each with a copy of the model."""
    state_home: Home = field(default_factory=OnDevice)
    """Where state is kept."""
    acceleration: Acceleration = field(default_factory=Acceleration)
    """How layers run. The model stays changed by it."""
    objective: Objective | None = None
    """Learn preferences of the sequences, two of which are a pair (under `kto`, one is an answer), against the loss of
    `preference_loss` over whole sequences; None imitates them."""
    share_prompts: bool = True
    """Run what both sequences of a pair begin with once, where the model can."""


def compare(model: Any, sequences: Sequence[TokenizedSample], how: InChunks) -> Parity:
    """Compare loss and gradients of a Hugging Face (or peft) model over the sequences, whole and in chunks.

    The whole-sequence side is transformers' own forward, one sequence per batch, with its own attention, masks and
    head, and without activation checkpointing.

    Args:
        model: left as it was, without gradients.
    """
    preferences, prompts = None, None
    if how.objective is not None:
        if how.objective.has_pairs:
            sequences, prompts = with_prompts(sequences)
        preferences = random_preferences(how.objective, sequences)
    dtype, chunks = _first_trained(model).dtype, _cut(model, sequences, how, prompts)
    with arithmetic_of(dtype):
        whole, preferences = _train_whole(model, sequences, preferences)
        chunked = _train_in_chunks(model, sequences, chunks, preferences, how)
    model.zero_grad(set_to_none=True)
    return _difference(whole, chunked, dtype)


def _cut(model: Any, sequences: Sequence[TokenizedSample], how: InChunks, prompts: NDArray[np.int64] | None) -> Chunks:
    """Return the chunks of the sequences; `prompts` are the tokens with which both of a pair begin, (pairs,)."""
    lengths = np.array([len(s.input_ids) for s in sequences], np.int64)
    if prompts is None or how.objective is None:
        return build_chunks(lengths, how.chunk_size, fill_tails=how.fill_tails, pair_weight=how.pair_weight)
    is_shared = how.share_prompts and how.stages == 1 and not ChunkModel(model, how.backend).recurrent_layers
    return build_pair_chunks(
        lengths, how.chunk_size, fill_tails=how.fill_tails, pair_weight=how.pair_weight,
        prompts=prompts if is_shared else None, trunk_is_chosen=how.objective.task is Task.orpo,
    )  # fmt: skip


def _difference(whole: _Outcome, chunked: _Outcome, dtype: torch.dtype) -> Parity:
    errors = {name: float((chunked.gradients[name] - gradient).norm()) for name, gradient in whole.gradients.items()}
    norms = {name: float(gradient.norm()) for name, gradient in whole.gradients.items()}
    total = float(np.linalg.norm(list(norms.values())))
    # A parameter with next to no gradient has no meaningful relative error of its own.
    relative = {name: error / max(norms[name], 1e-6 * total) for name, error in errors.items()}
    worst = max(relative, key=lambda name: relative[name])
    return Parity(
        loss_whole=whole.loss,
        loss_chunked=chunked.loss,
        grad_rel_error=float(np.linalg.norm(list(errors.values()))) / total,
        grad_max_rel_error_parameter=worst,
        grad_max_rel_error=relative[worst],
        tolerance=TOLERANCES[dtype],
        is_float64=dtype is torch.float64,
    )


@dataclass(frozen=True)
class _Outcome:
    """What one side of the comparison comes to."""

    loss: float
    gradients: dict[str, Tensor]


def _train_whole(
    model: Any, sequences: Sequence[TokenizedSample], preferences: Preferences | None
) -> tuple[_Outcome, Preferences | None]:
    """Return loss and gradients of whole sequences, and the preferences with what the chunked side has to know."""
    device = _first_trained(model).device
    model.zero_grad(set_to_none=True)
    with use_implementation(model, whole_implementation(base_model(model))), without_activation_checkpointing(model):
        if preferences is None:
            weight = _weight(sequences)
            loss = sum(_whole_loss(model, sequence, weight, device) for sequence in sequences)
        else:
            loss, known = whole_preference_loss(model, *preferences, device)
            preferences = (*preferences[:2], known)
    forget_states(model)
    return _Outcome(loss, _gradients(model)), preferences


def _train_in_chunks(
    model: Any, sequences: Sequence[TokenizedSample], chunks: Chunks, preferences: Preferences | None, how: InChunks
) -> _Outcome:
    first = _first_trained(model)
    model.zero_grad(set_to_none=True)
    how.acceleration.use_kernels(model)
    with use_implementation(model, attention.NAME):
        module = ChunkModel(model, how.backend) if how.stages == 1 else _chain(model, how.backend, how.stages)
        for part in module.stages if isinstance(module, StageChain) else (module,):
            how.acceleration.compile(part.causal_lm)
        settings = RunnerSettings(first.device, accumulation_dtype(first.dtype), state_home=how.state_home)
        runner = Runner(DirectEngine(module), settings)
        if preferences is None:
            batch = StepBatch(chunks, sequences, np.full(len(sequences), _weight(sequences)))
            schedule = plan(chunks, how.k)
        else:
            batch = preference_batch(chunks, *preferences, first.device)
            tasks = preference_tasks(chunks, how.k, 2 if preferences[0].has_pairs else 1)
            schedule = plan_tasks(tasks, join_retained=True)
        loss = runner.run((schedule,), batch).loss
    if isinstance(module, StageChain):
        found = module.gradients()
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.grad = found[name]
    return _Outcome(loss, _gradients(model))


def _first_trained(model: Any) -> nn.Parameter:
    """Return a trained parameter, whose device and data type are those of the model."""
    parameter: nn.Parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    return parameter


def _weight(sequences: Sequence[TokenizedSample]) -> float:
    """Return the weight of each target."""
    return 1.0 / sum(int((s.targets != IGNORED).sum()) for s in sequences)


def _chain(model: Any, backend: Backend, stages: int) -> StageChain:
    cut = cut_layers(int(model.config.get_text_config().num_hidden_layers), stages)
    return StageChain([StageModel(copy.deepcopy(model), backend, layers) for layers in cut])


def whole_implementation(model: Any) -> str:
    """Return transformers' own attention for the whole-sequence side: eager where sdpa leaves something out."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not softcap else "eager"


def _whole_loss(model: Any, sequence: TokenizedSample, weight: float, device: torch.device) -> float:
    loss = cross_entropies(model, sequence, device).sum() * weight
    loss.backward()
    return float(loss.detach())


def _gradients(model: Any) -> dict[str, Tensor]:
    """Return a copy of the gradient of each trained parameter, zeros if it has none."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
            gradients[name] = gradient.to(accumulation_dtype(gradient.dtype))
    return gradients


@contextmanager
def use_implementation(model: Any, name: str) -> Iterator[None]:
    """Run the model with this attention within the block, and with its own after it."""
    attention.register()
    base = base_model(model)
    if not attention_heads(base.config):
        yield
        return
    if name == attention.NAME and computes_own_attention(base.config):
        name = whole_implementation(base)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
