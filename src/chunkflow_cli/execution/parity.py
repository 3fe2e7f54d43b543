"""Proof that a model trains exactly in chunks: loss and gradients against whole-sequence training of the same model.

`chunkflow verify` runs it on the configured model, the guard (`guard.py`) on a small model of the same architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
from chunkflow_cli.model.own_attention import computes_own_attention
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


def compare(
    model: Any,
    backend: Backend,
    sequences: Sequence[TokenizedSample],
    *,
    chunk_size: int,
    k: int,
    fill_tails: bool = True,
    pair_weight: float = 0.0,
    tolerance: float | None = None,
    stages: int = 1,
    state_home: Home | None = None,
    acceleration: Acceleration | None = None,
    objective: Objective | None = None,
    share_prompts: bool = True,
) -> Parity:
    """Compare loss and gradients of a Hugging Face (or peft) model over the sequences, whole and in chunks.

    The whole-sequence side is transformers' own forward, one sequence per batch, with its own attention, masks and
    head, and without activation checkpointing.

    Args:
        model: left as it was, without gradients.
        backend: attention of the chunked side.
        sequences: the data; `chunk_size`, `fill_tails` and `pair_weight` cut it as in `build_chunks`.
        k: chunks of a long sequence that keep their activations.
        tolerance: largest relative error that passes; by default that of the model's dtype.
        stages: number of pipeline stages that the chunked side is cut into; each works on a copy of the model.
        state_home: where the chunked side keeps its state; by default, on the device.
        acceleration: how the chunked side runs its layers. The model stays changed by it.
        objective: learn preferences of the sequences, two of which are a pair (under `kto`, one is an answer), against
            the loss of `preference_loss` over whole sequences; None imitates them.
        share_prompts: run what both sequences of a pair begin with once, where the model can.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    lengths = np.array([len(s.input_ids) for s in sequences], np.int64)
    if objective is None or not objective.has_pairs:
        chunks = build_chunks(lengths, chunk_size, fill_tails=fill_tails, pair_weight=pair_weight)
    else:
        sequences, prompts = with_prompts(sequences)
        is_shared = share_prompts and stages == 1 and not ChunkModel(model, backend).recurrent_layers
        chunks = build_pair_chunks(
            lengths, chunk_size, fill_tails=fill_tails, pair_weight=pair_weight,
            prompts=prompts if is_shared else None, trunk_is_chosen=objective.task is Task.orpo,
        )  # fmt: skip
    run = _ChunkedRun(backend, chunks, k, stages, state_home or OnDevice(), acceleration, objective)
    with arithmetic_of(dtype):
        return _compare(model, sequences, run, TOLERANCES[dtype] if tolerance is None else tolerance)


@dataclass(frozen=True)
class _ChunkedRun:
    """How the chunked side runs: `compare`'s arguments."""

    backend: Backend
    chunks: Chunks
    k: int
    stages: int
    state_home: Home
    acceleration: Acceleration | None
    objective: Objective | None


def _compare(model: Any, sequences: Sequence[TokenizedSample], run: _ChunkedRun, tolerance: float) -> Parity:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    dtype = next(iter(parameters.values())).dtype
    weight = 1.0 / sum(int((s.targets != IGNORED).sum()) for s in sequences)
    prepared = None if run.objective is None else random_preferences(run.objective, sequences)

    model.zero_grad(set_to_none=True)
    with use_implementation(model, whole_implementation(base_model(model))), without_activation_checkpointing(model):
        if prepared is None:
            loss_whole = sum(_whole_loss(model, sequence, weight, device) for sequence in sequences)
        else:
            loss_whole, known = whole_preference_loss(model, *prepared, device)
            prepared = (*prepared[:2], known)
    whole = {name: _gradient(parameter) for name, parameter in parameters.items()}

    model.zero_grad(set_to_none=True)
    if run.acceleration is not None:
        run.acceleration.use_kernels(model)
    with use_implementation(model, attention.NAME):
        module = ChunkModel(model, run.backend) if run.stages == 1 else _chain(model, run.backend, run.stages)
        if run.acceleration is not None:
            for part in module.stages if isinstance(module, StageChain) else (module,):
                run.acceleration.compile(part.causal_lm)
        settings = RunnerSettings(device, accumulation_dtype(dtype), state_home=run.state_home)
        runner = Runner(DirectEngine(module), settings)
        if prepared is None:
            batch = StepBatch(run.chunks, sequences, np.full(len(sequences), weight))
            schedule = plan(run.chunks, run.k)
        else:
            batch = preference_batch(run.chunks, *prepared, device)
            tasks = preference_tasks(run.chunks, run.k, 2 if prepared[0].has_pairs else 1)
            schedule = plan_tasks(tasks, join_retained=True)
        loss_chunked = runner.run((schedule,), batch).loss
    if isinstance(module, StageChain):
        for name, gradient in module.gradients().items():
            parameters[name].grad = gradient
    chunked = {name: _gradient(parameter) for name, parameter in parameters.items()}
    model.zero_grad(set_to_none=True)

    errors = {name: float((chunked[name] - whole[name]).norm()) for name in parameters}
    norms = {name: float(whole[name].norm()) for name in parameters}
    total = float(np.linalg.norm(list(norms.values())))
    # A parameter with next to no gradient has no meaningful relative error of its own.
    relative = {name: error / max(norms[name], 1e-6 * total) for name, error in errors.items()}
    worst = max(relative, key=lambda name: relative[name])
    return Parity(
        loss_whole=loss_whole,
        loss_chunked=loss_chunked,
        grad_rel_error=float(np.linalg.norm(list(errors.values()))) / total,
        grad_max_rel_error_parameter=worst,
        grad_max_rel_error=relative[worst],
        tolerance=tolerance,
        is_float64=dtype is torch.float64,
    )


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


def _gradient(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
    return gradient.to(accumulation_dtype(gradient.dtype))


@contextmanager
def use_implementation(model: Any, name: str) -> Iterator[None]:
    """Run the model with this attention within the block, and with its own after it."""
    attention.register()
    base = base_model(model)
    if name == attention.NAME and computes_own_attention(base.config):
        name = whole_implementation(base)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
