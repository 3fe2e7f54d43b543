"""Proof that a model trains exactly in chunks: loss and gradients against whole-sequence training of the same model.

`chunkflow verify` runs it on the configured model, the guard (`guard.py`) on a small model of the same architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkflow_cli.config.objective import Objective
from chunkflow_cli.config.schema import Task
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.acceleration import Acceleration
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.chunk_model import ChunkModel, base_model
from chunkflow_cli.execution.precision import accumulation_dtype, float32_products
from chunkflow_cli.execution.preference_loss import judge
from chunkflow_cli.execution.preferences import Known, PreferenceStep, Sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.stages import StageChain, StageModel
from chunkflow_cli.execution.state_home import Home, OnDevice
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.language_part import text_only
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
    head.

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
        sequences, prompts = _with_prompts(sequences)
        is_shared = share_prompts and stages == 1 and not ChunkModel(model, backend).recurrent_layers
        chunks = build_pair_chunks(
            lengths, chunk_size, fill_tails=fill_tails, pair_weight=pair_weight,
            prompts=prompts if is_shared else None, trunk_is_chosen=objective.task is Task.orpo,
        )  # fmt: skip
    with _arithmetic_of(dtype):
        tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
        home = state_home or OnDevice()
        return _compare(model, backend, sequences, tolerance, k, stages, home, acceleration, chunks, objective)


def _compare(
    model: Any,
    backend: Backend,
    sequences: Sequence[TokenizedSample],
    tolerance: float,
    k: int,
    stages: int,
    state_home: Home,
    acceleration: Acceleration | None,
    chunks: Chunks,
    objective: Objective | None,
) -> Parity:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    dtype = next(iter(parameters.values())).dtype
    weight = 1.0 / sum(int((s.targets != IGNORED).sum()) for s in sequences)
    prepared = None if objective is None else _random_preferences(objective, sequences)

    model.zero_grad(set_to_none=True)
    with use_implementation(model, whole_implementation(base_model(model))):
        if prepared is None:
            loss_whole = sum(_whole_loss(model, sequence, weight, device) for sequence in sequences)
        else:
            loss_whole, known = _whole_preference_loss(model, *prepared, device)
            prepared = (*prepared[:2], known)
    whole = {name: _gradient(parameter) for name, parameter in parameters.items()}

    model.zero_grad(set_to_none=True)
    if acceleration is not None:
        acceleration.use_kernels(model)
    with use_implementation(model, attention.NAME):
        module = ChunkModel(model, backend) if stages == 1 else _chain(model, backend, stages)
        if acceleration is not None:
            for part in module.stages if isinstance(module, StageChain) else (module,):
                acceleration.compile(part.causal_lm)
        settings = RunnerSettings(device, accumulation_dtype(dtype), state_home=state_home)
        runner = Runner(DirectEngine(module), settings)
        if prepared is None:
            batch = StepBatch(chunks, sequences, np.full(len(sequences), weight))
            schedule = plan(chunks, k)
        else:
            batch = _preference_batch(chunks, *prepared, device)
            tasks = preference_tasks(chunks, k, 2 if prepared[0].has_pairs else 1)
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


def _with_prompts(sequences: Sequence[TokenizedSample]) -> tuple[list[TokenizedSample], NDArray[np.int64]]:
    """Give both sequences of each pair the same beginning, half of the shorter one; return its number of tokens."""
    made, prompts = [], []
    for first, second in zip(sequences[0::2], sequences[1::2], strict=True):
        asked = max(1, min(len(first.input_ids), len(second.input_ids)) // 2)
        for each in (first, second):
            ids, targets = each.input_ids.copy(), each.targets.copy()
            ids[:asked], targets[: asked - 1] = first.input_ids[:asked], IGNORED
            targets[asked - 1] = ids[asked]
            made.append(TokenizedSample(ids, targets))
        prompts.append(asked)
    return made, np.array(prompts, np.int64)


def _random_preferences(
    objective: Objective, sequences: Sequence[TokenizedSample]
) -> tuple[Objective, Sequences, Known]:
    """Return the sequences as preferences, with drawn differences to the log-probabilities of a reference model."""
    made = Sequences.of(list(sequences), objective)
    rng = np.random.default_rng(0)
    is_desirable = None if objective.has_pairs else np.arange(len(sequences)) % 2 == 0
    known = Known(
        counts=made.counts,
        reference=rng.uniform(-3, 3, len(made.counts)) if objective.needs_reference else None,
        is_desirable=is_desirable,
        samples=len(sequences) // (2 if objective.has_pairs else 1),
        desirable=0 if is_desirable is None else int(is_desirable.sum()),
        imitated_tokens=made.imitated_tokens if objective.nll_weight else 0,
        divergence=0.1,
    )
    return objective, made, known


def _preference_batch(
    chunks: Chunks, objective: Objective, sequences: Sequences, known: Known, device: torch.device
) -> StepBatch:
    """Return the batch of a step of preferences that one process runs alone."""
    step = PreferenceStep(objective, known, sequences, device)
    return StepBatch(chunks, sequences.samples, step.imitated_weights, preferences=step)


def _whole_preference_loss(
    model: Any, objective: Objective, sequences: Sequences, known: Known, device: torch.device
) -> tuple[float, Known]:
    """Go backward through the loss of whole sequences by autograd; return it, and what is known with a reference.

    The reference is as far from the model as `known.reference` says: far off, the loss would have no gradient.
    """
    sums, imitated = [], torch.zeros((), dtype=torch.float64, device=device)
    for index, (sequence, start) in enumerate(zip(sequences.samples, sequences.starts, strict=True)):
        ids = torch.as_tensor(sequence.input_ids, dtype=torch.int64, device=device)[None]
        targets = torch.as_tensor(sequence.targets, dtype=torch.int64, device=device)
        logits = model(input_ids=ids, use_cache=False, **text_only(model, ids)).logits[0]
        logits = logits.to(accumulation_dtype(logits.dtype))
        entropy = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").double()
        sums.append(-entropy[start:].sum())
        if index % 2 == 0:
            imitated = imitated + entropy.sum()

    def tensor(values: Any) -> Tensor | None:
        return None if values is None else torch.as_tensor(values, device=device)

    found = torch.stack(sums)
    if known.reference is not None:
        known = replace(known, reference=found.detach().cpu().numpy() + known.reference)
    counts, reference = torch.as_tensor(known.counts, device=device), tensor(known.reference)
    divergence = torch.tensor(known.divergence, dtype=torch.float64, device=device)
    judged = judge(objective, found, counts, reference, tensor(known.is_desirable), divergence)
    loss = judged.losses.sum() / known.samples
    if known.imitated_tokens:
        loss = loss + objective.nll_weight * imitated / known.imitated_tokens
    loss.backward()
    return float(loss.detach()), known


def _chain(model: Any, backend: Backend, stages: int) -> StageChain:
    cut = cut_layers(int(model.config.get_text_config().num_hidden_layers), stages)
    return StageChain([StageModel(copy.deepcopy(model), backend, layers) for layers in cut])


def whole_implementation(model: Any) -> str:
    """Return transformers' own attention for the whole-sequence side: eager where sdpa leaves something out."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not softcap else "eager"


def use_float64_experts(model: Any, dtype: torch.dtype) -> None:
    """Switch a float64 model with experts to transformers' plain product: the grouped one has no float64."""
    if dtype is not torch.float64:
        return
    for part in model.modules():  # the decoder of a multimodal model may have experts where the model's class has none
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation("eager")


def remove_dropout(config: Any) -> None:
    """Set every rate of dropout or noise of a configuration to zero, because under them no two forwards agree."""
    for name, value in vars(config).copy().items():
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter", "router_noise")):
            setattr(config, name, 0.0)


def _whole_loss(model: Any, sequence: TokenizedSample, weight: float, device: torch.device) -> float:
    ids = torch.as_tensor(sequence.input_ids, dtype=torch.int64, device=device)[None]
    targets = torch.as_tensor(sequence.targets, dtype=torch.int64, device=device)
    logits = model(input_ids=ids, use_cache=False, **text_only(model, ids)).logits[0]
    logits = logits.to(accumulation_dtype(logits.dtype))
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") * weight
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
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextmanager
def _arithmetic_of(dtype: torch.dtype) -> Iterator[None]:
    """Make a model compute in its own dtype within the block, if that is float32 or float64."""
    with ExitStack() as stack:
        if dtype is torch.float64:
            stack.enter_context(float64_throughout())
        if dtype in (torch.float32, torch.float64):
            stack.enter_context(without_kernel_packages())
            stack.enter_context(float32_products())
        yield


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let `torch.float32` and `Tensor.float` mean float64 within the block.

    Norms, routers and the scans of recurrent layers compute in float32 whatever the model's dtype is.
    """
    before = torch.float32, torch.float, Tensor.float
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32, torch.float, Tensor.float = before  # type: ignore[misc, method-assign]


@contextmanager
def without_kernel_packages() -> Iterator[None]:
    """Let transformers run recurrent layers by its own functions within the block, not by a package's kernels.

    Kernels such as those of flash-linear-attention take no float32, let alone float64.
    """
    from transformers.integrations import hub_kernels

    before = hub_kernels.is_torchdynamo_exporting  # an export takes transformers' own functions, too
    hub_kernels.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        hub_kernels.is_torchdynamo_exporting = before
