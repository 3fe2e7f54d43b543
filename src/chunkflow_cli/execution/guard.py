"""The guard: proof at the start of `train` that an architecture trains exactly in chunks.

It compares chunked and whole-sequence training on a small random model of the same architecture, made so that nothing
hides: windows shorter than the test sequences, large initial weights, one layer of each kind, every multiplier of the
configuration. It computes in float32, and repeats in float64 what rounding may have caused. The run's attention kernel
is checked separately, in the run's dtype (`kernel_check.py`). Kernels of packages for recurrent layers are not checked
here: `chunkflow verify verify.dtype=bfloat16` runs them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from chunkflow_cli.config.schema import ActivationCheckpointing, Attention, OffloadState
from chunkflow_cli.errors import ChunkflowError, RunError, UsageError, first_line, is_out_of_memory
from chunkflow_cli.execution.acceleration import Acceleration
from chunkflow_cli.execution.attention.backend import Backend
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.kernel_check import check_backend, head_dims_of
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import TOLERANCES, InChunks, Parity, compare, random_sequences
from chunkflow_cli.execution.precision import in_any_order, use_float64_parts
from chunkflow_cli.execution.small_copy import CannotBuildError, build_small, small_config
from chunkflow_cli.execution.small_sizes import VOCABULARY
from chunkflow_cli.execution.state_home import Home, state_home
from chunkflow_cli.execution.why_not import why_not
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.hf_config import known_ids

ROUNDING_SUSPECTED = 1e-2
"""A float32 difference below this is checked again in float64: wrong attention shows as 1e-2 and more. Rounding alone
moves the gradient of `dpo` by 2e-3 on SmolLM2, since those of two answers nearly cancel (benchmarks/LOG.md)."""
ROUNDING_OF_KERNELS = 4
"""Factor by which other kernels may round more than the model's own operations."""

GUARD_LENGTHS = (145, 21, 1, 2, 40)
"""Lengths of the test sequences: one whose last piece is a single token, and some shorter than a convolution."""
GUARD_CHUNK_SIZE = 48
PLAIN = Acceleration()
"""Layers as transformers has them."""


def guard(
    hf_config: Any,
    *,
    requested: Attention,
    device: torch.device,
    dtype: torch.dtype,
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    is_pipeline: bool = False,
    offload_state: OffloadState = OffloadState.none,
    acceleration: Acceleration = PLAIN,
) -> Parity:
    """Prove on a small float32 model of the same architecture that chunks change nothing.

    Args:
        requested: `model.attention` of the run, whose device, dtype and other settings are given, too.
        is_pipeline: cut the small model into two pipeline stages, too.
        offload_state: where the small model keeps its state.
        acceleration: how its layers run in chunks; whole, they run as transformers has them.

    Raises:
        UsageError: the gradients differ, or the architecture cannot run in chunks.
    """
    name = hf_config.model_type
    stages, home = 2 if is_pipeline else 1, state_home(offload_state, device, block_tokens=GUARD_CHUNK_SIZE - 1)
    how = "in chunks through the stages of a pipeline" if is_pipeline else "in chunks"
    with _explained(hf_config, name, how):
        small = small_config(hf_config)
    check_backend(choose_backend(requested, hf_config, device, dtype).backend, device, dtype, head_dims_of(hf_config))
    in_float32 = requested if requested in (Attention.reference, Attention.cpu) else Attention.auto
    backend = choose_backend(in_float32, small, device, torch.float32).backend
    with _explained(hf_config, name, how), in_any_order():
        run = _SmallRun(small, device, activation_checkpointing, stages, home)
        parity = run.compare(backend, torch.float32, acceleration)
        if TOLERANCES[torch.float32] < parity.grad_rel_error < ROUNDING_SUSPECTED:
            # Saturated scores can lift float32's own rounding this high; in float64 only a real difference remains.
            # Kernels and compiled code round as well, and not more: they compute in float32 only.
            is_rounding = (
                not acceleration
                or parity.grad_rel_error < ROUNDING_OF_KERNELS * run.compare(backend, torch.float32).grad_rel_error
            )
            if is_rounding:
                parity = run.compare(ReferenceBackend(), torch.float64)
    if not parity.passed:
        raise UsageError(
            f"models of type {name!r} cannot be trained exactly {how}: on a small random one the gradient differs by "
            f"{parity.grad_rel_error:.1e}\n  from whole-sequence training ({parity.tolerance:.0e} is allowed), most in "
            f"{parity.grad_max_rel_error_parameter}" + (f"\n  {reason}" if (reason := why_not(hf_config)) else "")
        )
    return parity


@contextmanager
def _explained(hf_config: Any, name: str, how: str) -> Iterator[None]:
    """Explain what goes wrong with a small copy within the block.

    Raises:
        UsageError: it cannot be built, needs a package, or fails in chunks.
        RunError: it does not fit in memory.
    """
    itself = "compare the model itself with `chunkflow verify`; if that passes, train with train.guard=false"
    try:
        yield
    except ImportError as error:
        remedy = f"pip install {error.name}" if error.name else " ".join(str(error).split())[:200]
        raise UsageError(f"models of type {name!r} need a package that is not installed\n  {remedy}") from error
    except CannotBuildError as error:
        if reason := why_not(hf_config):
            raise UsageError(f"models of type {name!r} cannot be trained exactly {how}\n  {reason}") from error
        raise UsageError(
            f"train.guard: no small copy of a model of type {name!r} can be built, so it is not proved that the model "
            f"trains exactly {how}\n  {error}\n  {itself}"
        ) from error
    except (ChunkflowError, TypeError, AttributeError, LookupError, RuntimeError, ValueError, AssertionError,
            MemoryError) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise RunError(
                "out of memory: before it begins, `train` trains a small copy of the model in chunks (train.guard)\n"
                f"  free some memory, or {itself}"
            ) from error
        if re.match(r"[a-z_.]+=", str(error)):
            raise  # it names a key of the run that can be set otherwise
        fails = f"a small one fails with {type(error).__name__}: {first_line(error)}"
        reason = why_not(hf_config) or (str(error) if isinstance(error, ChunkflowError) else fails)
        raise UsageError(f"models of type {name!r} cannot be trained {how}\n  {reason}") from error


@dataclass(frozen=True)
class _SmallRun:
    """A small model that is trained whole and in chunks."""

    config: Any
    device: torch.device
    checkpointing: ActivationCheckpointing
    stages: int
    state_home: Home

    def compare(self, backend: Backend, dtype: torch.dtype, acceleration: Acceleration = PLAIN) -> Parity:
        """Compare the two.

        Raises:
            CannotBuildError: with random weights, the loss is not finite.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            model = build_small(self.config, self.device, dtype)
            use_float64_parts(model, dtype)
            enable_activation_checkpointing(model, self.checkpointing)
            vocabulary = min(VOCABULARY, known_ids(self.config))
            parity = compare(
                model,
                random_sequences(GUARD_LENGTHS, vocabulary),
                InChunks(
                    backend,
                    chunk_size=GUARD_CHUNK_SIZE,
                    k=2,
                    stages=self.stages,
                    state_home=self.state_home,
                    acceleration=acceleration,
                ),
            )
            if parity.is_float64:
                # Some models compute parts in float32 whatever their dtype, which leaves 1e-8.
                parity = replace(parity, tolerance=1e-6)
            if not math.isfinite(parity.loss_whole):
                raise CannotBuildError("with random weights its loss is not a finite number")
            return parity
