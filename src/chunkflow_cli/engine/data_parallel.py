"""The engine of one process, or of data-parallel ones: every rank holds all layers, and ZeRO may divide them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.engine import internals
from chunkflow_cli.engine.agreement import own_rank, process_count
from chunkflow_cli.engine.base import BaseEngine
from chunkflow_cli.engine.distributed import import_deepspeed, init_process_group, quiet
from chunkflow_cli.engine.gathered_modules import GatheredModule
from chunkflow_cli.engine.optimizers import check_optimizer, make_optimizer
from chunkflow_cli.engine.settings import EngineSettings, check_settings, deepspeed_config
from chunkflow_cli.files import moving

_open_coalescing: list[AbstractContextManager[Any]] = []
"""Contexts that collect gradients and are not finished. When a step fails they are left as they are: a context that is
garbage-collected would reduce its gradients, together with ranks that may be gone."""
WRAPPER = "causal_lm."
"""Prefix of parameter names if the engine runs a module that wraps the Hugging Face model."""


def _divide(module: nn.Module, settings: EngineSettings, config: dict[str, Any]) -> None:
    """Give each rank its part of every weight, one weight after the other.

    `deepspeed.initialize` would first move all of them to each device. And it does not cast weights that are already
    divided, such as those that a model keeps in float32.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype.value)

    def one_after_the_other(recurse: bool = True) -> Iterator[nn.Parameter]:
        # Each is copied first. DeepSpeed writes what rank 0 sends into the weight, and all weights of a file are one
        # mapping: on a CPU every rank would end up with a copy of the whole file.
        for parameter in moving(module.parameters()):
            own_dtype = dtype if parameter.is_floating_point() else parameter.dtype
            parameter.data = parameter.data.to(settings.device, own_dtype, copy=True)
            yield parameter

    handed_over = nn.Module()
    handed_over.parameters = one_after_the_other  # type: ignore[method-assign]
    with quiet():
        import_deepspeed().zero.Init(module=handed_over, config_dict_or_path=config)
    internals.add_bias_within_products()
    internals.hide_moves_from_checkpointing()
    for buffer in module.buffers():
        buffer.data = buffer.data.to(settings.device)


def _gathered_modules(module: nn.Module, settings: EngineSettings) -> list[nn.Module]:
    """Return the modules whose weights are gathered together; none if no other rank could wait for this one."""
    if settings.engine.zero_stage < 3 or process_count() == 1:
        return []
    names = settings.gathered_modules
    return [each for name, each in module.named_modules() if name.removeprefix(WRAPPER) in names]


class Engine(BaseEngine):
    """A training engine around a module that holds the whole model and whose forward returns a scalar loss."""

    is_stage = False

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        """
        Args:
            module: on its device already; with ZeRO-3 on the CPU, for all devices together may be needed to hold it.

        Raises:
            UsageError: see `check_settings`.
        """
        check_settings(settings)
        check_optimizer(settings)
        init_process_group(settings.device)
        hf_names = {name: name.removeprefix(WRAPPER) for name, _ in module.named_parameters()}
        config, optimizer = deepspeed_config(settings), make_optimizer(module, settings, hf_names)
        if settings.engine.zero_stage == 3:
            _divide(module, settings, config)
        gathered = _gathered_modules(module, settings)
        with internals.unknown_to_zero_3(gathered) if gathered else contextlib.nullcontext():
            super().__init__(module, module, optimizer, settings, config, hf_names=hf_names, replicas=process_count())
        for each in gathered:
            GatheredModule(each)
        self.is_divided = self._zero_stage == 3
        self.needs_lockstep = self.is_divided and self._replicas > 1  # it gathers weights in every forward and backward
        self._coalescing: AbstractContextManager[Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._zero_stage == 2 and torch.is_grad_enabled():  # an evaluation has no step, which would end it
            self._coalesce()
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        if self._zero_stage >= 1:
            internals.begin_backward(self._engine.optimizer)
        # DeepSpeed averages over the ranks.
        self._engine.backward(loss * self._replicas, scale_wrt_gas=False)

    def discard_gradients(self) -> None:
        self._reduce()
        super().discard_gradients()

    def whole_weights(self, model: nn.Module, *, trained_only: bool) -> dict[str, Tensor] | None:
        # A weight that ZeRO-3 has divided is gathered alone and kept in host memory. Others are not copied.
        zero = import_deepspeed().zero
        weights: dict[str, Tensor] = {}
        gathered: dict[int, Tensor] = {}  # tied weights are one parameter with several names
        for name, tensor in moving(model.state_dict(keep_vars=True).items()):
            if trained_only and not tensor.requires_grad:
                continue
            if not internals.is_divided(tensor):
                weights[name] = tensor.detach()
                continue
            if id(tensor) not in gathered:
                with zero.GatheredParameters([tensor]):
                    gathered[id(tensor)] = tensor.detach().to("cpu", copy=True) if own_rank() == 0 else torch.empty(0)
            weights[name] = gathered[id(tensor)]
        return weights if own_rank() == 0 else None

    def _coalesce(self) -> None:
        """Collect the gradients of all backwards; ZeRO-2 otherwise keeps those of the last one only."""
        if self._coalescing is None:
            self._coalescing = self._engine.coalesce_grad_reduction()
            _open_coalescing.append(self._coalescing)
            self._coalescing.__enter__()

    def _reduce(self) -> None:
        """End what the backwards of a step have begun, so that all ranks reduce the same gradients."""
        if internals.is_bf16_optimizer(self._engine.optimizer):
            internals.mark_all_gradients_present(self._engine.optimizer)
        elif self._zero_stage < 3:
            self._add_missing_gradients()
        if self._zero_stage == 2:
            self._coalesce()
            assert self._coalescing is not None
            self._coalescing.__exit__(None, None, None)
            _open_coalescing.remove(self._coalescing)
            self._coalescing = None

    def _update(self) -> None:
        self._engine.step()
