"""Chunked against whole-sequence training on the same model: the proof that a model trains exactly in chunks.

`chunkflow verify` runs it on the configured model. The guard runs it at the start of `train` on a small random model
of the same architecture, made so that nothing hides: windows shorter than the test sequences, large initial weights,
one layer of each kind, every multiplier of the configuration.
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

from chunkflow_cli.config.schema import ActivationCheckpointing, Attention
from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.backend import AttentionRule, Backend, Packing
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.runner import Runner, StepBatch
from chunkflow_cli.execution.stages import StageChain, StageModel
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.stage_cut import cut_layers

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}
"""Largest relative error of the gradient that passes. Wrong attention shows as 1e-2 and more; the guard's settings
lift even a missing soft cap to 5e-2."""

ROUNDING_SUSPECTED = 1e-3
"""A float32 difference below this is looked at again in float64."""

GUARD_LENGTHS = (150, 21, 40)
GUARD_CHUNK_SIZE = 48
GUARD_WINDOW = 37
GUARD_VOCABULARY = 512
GUARD_PROJECTION_STD = 1.6
"""Spread of a projection of a normalised input: weights are drawn with this over sqrt(hidden_size), 0.2 at 64. Scores
are far from zero then, so a missing soft cap or multiplier shows, but not so large that rounding drowns everything."""


@dataclass(frozen=True)
class Parity:
    loss_whole: float
    loss_chunked: float
    grad_rel_error: float
    """Norm of the difference of all gradients over the norm of the whole-sequence gradients."""
    grad_max_rel_error_parameter: str
    """The parameter whose own gradient differs most, relative to its norm."""
    grad_max_rel_error: float
    tolerance: float

    @property
    def loss_rel_error(self) -> float:
        return abs(self.loss_chunked - self.loss_whole) / max(abs(self.loss_whole), 1e-30)

    @property
    def passed(self) -> bool:
        return bool(self.grad_rel_error <= self.tolerance and self.loss_rel_error <= self.tolerance)


class DirectEngine:
    """The engine that a proof needs: none. Gradients gather in the parameters themselves."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def random_sequences(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[TokenizedSample]:
    """Sequences of random tokens, about half of them targets; what follows a piece without targets still counts."""
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
) -> Parity:
    """Loss and gradients of a Hugging Face (or peft) model over the sequences, whole and in chunks.

    The whole-sequence side is transformers' own forward, one sequence a batch, with its own attention, masks and head.

    Args:
        stages: that the chunked side is cut into, as those of a pipeline; each works on a copy of the model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    dtype = next(iter(parameters.values())).dtype
    weight = 1.0 / sum(int((s.targets != IGNORED).sum()) for s in sequences)

    model.zero_grad(set_to_none=True)
    with _implementation(model, whole_implementation(model.config.get_text_config())):
        loss_whole = sum(_whole_loss(model, sequence, weight, device) for sequence in sequences)
    whole = {name: _gradient(parameter) for name, parameter in parameters.items()}

    model.zero_grad(set_to_none=True)
    chunks = build_chunks(
        [len(s.input_ids) for s in sequences], chunk_size, fill_tails=fill_tails, pair_weight=pair_weight
    )
    batch = StepBatch(chunks, sequences, np.full(len(sequences), weight))
    with _implementation(model, attention.NAME):
        module = ChunkModel(model, backend) if stages == 1 else _chain(model, backend, stages)
        runner = Runner(DirectEngine(module), device, weight_dtype=torch.promote_types(dtype, torch.float32))
        loss_chunked = runner.run(plan(chunks, k), batch).loss
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
        tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
    )


def _chain(model: Any, backend: Backend, stages: int) -> StageChain:
    cut = cut_layers(int(model.config.get_text_config().num_hidden_layers), stages)
    return StageChain([StageModel(copy.deepcopy(model), backend, layers) for layers in cut])


def whole_implementation(config: Any) -> str:
    """transformers' own attention for the whole-sequence side: its eager one where sdpa leaves something out."""
    has_sinks = getattr(config, "model_type", "") == "gpt_oss"
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if has_sinks or softcap else "sdpa"


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
        hf_config: of the model.
        requested: `model.attention`.
        device: of the run.
        dtype: of the run.
        activation_checkpointing: of the run.
        is_pipeline: cut the small model into two stages, too.

    Raises:
        UsageError: the gradients differ, or the architecture cannot run in chunks at all.
    """
    name = getattr(hf_config.get_text_config(), "model_type", type(hf_config).__name__)
    check_backend(choose_backend(requested, hf_config, device, dtype).backend, device, dtype)
    small = small_config(hf_config)
    attention_ = requested if requested in (Attention.reference, Attention.cpu) else Attention.auto
    backend = choose_backend(attention_, small, device, torch.float32).backend
    stages = 2 if is_pipeline else 1
    how = "in chunks through the stages of a pipeline" if is_pipeline else "in chunks"
    try:
        parity = _compare_small(small, backend, device, torch.float32, activation_checkpointing, stages)
        if TOLERANCES[torch.float32] < parity.grad_rel_error < ROUNDING_SUSPECTED:
            # Saturated scores can lift float32's own rounding this high; in float64 only a real difference stays.
            parity = _compare_small(small, ReferenceBackend(), device, torch.float64, activation_checkpointing, stages)
    except (UsageError, TypeError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"models of the kind {name!r} cannot be trained {how}: a small one fails with\n  {reason}"
        ) from error
    if not parity.passed:
        raise UsageError(
            f"models of the kind {name!r} cannot be trained exactly {how}: on a small random one the gradient "
            f"differs by {parity.grad_rel_error:.1e}\n  from whole-sequence training ({parity.tolerance:.0e} is "
            f"allowed), most in {parity.grad_max_rel_error_parameter}.\n  Such a model does more than attention across "
            "tokens (recurrent layers, say), or changes its logits in a way that is not supported yet."
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
        # Norms that transformers computes in float32 whatever the dtype leave 1e-8 in float64.
        tolerance = 1e-6 if dtype is torch.float64 else None
        return compare(model, backend, sequences, chunk_size=GUARD_CHUNK_SIZE, k=2, tolerance=tolerance, stages=stages)


def use_float64_experts(model: Any, dtype: torch.dtype) -> None:
    """The grouped product of experts has no float64: take transformers' plain one."""
    if dtype is torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def small_config(hf_config: Any) -> Any:
    """A configuration of the same architecture that trains in a second and hides nothing.

    Kept: head_dim, the ratio of query to key heads, every multiplier and flag. Changed: few layers, one or more of
    each kind; a small vocabulary; windows and attention chunks shorter than the test sequences; initial weights large
    enough for scores to matter; no dropout, for two forwards could not agree under it.
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


def remove_dropout(config: Any) -> None:
    """Set every dropout rate of a configuration to zero: under dropout no two forwards agree."""
    for name in list(vars(config)):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)


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
    """Fewer heads and narrower feed-forward layers: what a layer is made of stays, how wide it is does not matter."""
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
            setattr(
                config, name, min(getattr(config, name), max(4, int(getattr(config, "num_experts_per_tok", 1) or 1)))
            )


def _small_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise UsageError(
            "the parity guard cannot build a small model of this architecture: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
            "  check the model yourself with `chunkflow verify`, then train with train.guard=false"
        ) from error
    use_float64_experts(model, dtype)
    model.config.use_cache = False
    return model.to(device).train()


def check_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """A kernel in the run's own dtype against plain matrix products in float32: own, past and windowed, both ways.

    Raises:
        UsageError: this kernel computes something else on this device.
    """
    if isinstance(backend, ReferenceBackend):
        return
    generator = torch.Generator().manual_seed(0)
    reference = ReferenceBackend()
    tolerance = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4  # kernels take fast exponentials

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, 64, generator=generator).to(dtype).to(device)

    for window in (None, 50):
        if window is not None and backend.name == "torch_flash" and dtype is torch.float32:
            continue  # refused by name where a model asks for it
        rule = AttentionRule(scale=0.125, window=window)
        queries, grad = draw(4, 49), draw(4, 49)  # 49 = window - 1: the most that see any of the past
        for past in (False, True):
            keys, values = (draw(2, 49 if past and window else 70 if past else 49) for _ in range(2))
            packing = Packing((0, 30, 49), device)
            results = []
            for one, cast in ((backend, dtype), (reference, torch.float32)):
                q, k, v, g = (tensor.to(cast) for tensor in (queries, keys, values, grad))
                if past:
                    out, lse = one.past_forward(q, k, v, rule)
                    grads = one.past_backward(g, q, k, v, out, lse, rule)
                else:
                    out, lse = one.own_forward(q, k, v, packing, rule)
                    grads = one.own_backward(g, q, k, v, out, lse, packing, rule)
                results.append([out.float(), lse.float(), *(tensor.float() for tensor in grads)])
            for mine, truth in zip(*results, strict=True):
                error = float((mine - truth).norm() / truth.norm())
                if not error <= tolerance:
                    raise UsageError(
                        f"model.attention={backend.name} computes wrongly on this device: {error:.1e} off in {dtype}"
                        f"{', with a window' if window else ''}\n  take another model.attention; reference always works"
                    )


def _whole_loss(model: Any, sequence: TokenizedSample, weight: float, device: torch.device) -> float:
    ids = torch.as_tensor(sequence.input_ids, dtype=torch.int64, device=device)[None]
    targets = torch.as_tensor(sequence.targets, dtype=torch.int64, device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") * weight
    loss.backward()
    return float(loss.detach())


def _gradient(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


@contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    """Run the model with this attention, and give it back its own."""
    attention.register()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
