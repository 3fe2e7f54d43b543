"""The engine of one process, or of data-parallel ones.

It knows nothing of chunks. A step is any number of forwards and backwards, then `step()`. DeepSpeed's own counting of
micro-steps is turned off: `gradient_accumulation_steps` stays 1 and the step is where we say it is.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.engine.agreement import all_or_none, own_rank
from chunkflow_cli.engine.distributed import import_deepspeed, init_process_group, quiet
from chunkflow_cli.engine.partitions import check_fits, parts_to_write, publish_weights, read_partitions
from chunkflow_cli.engine.settings import EngineSettings, check_settings, deepspeed_config, make_optimizer
from chunkflow_cli.engine.state_files import StateFiles, write_parts
from chunkflow_cli.engine.whole_weights import whole_weights
from chunkflow_cli.errors import RunError

WRAPPER = "causal_lm."
"""What stands before a parameter's name in the Hugging Face model, where the engine drives a module around that."""


def _divide(module: nn.Module, settings: EngineSettings, config: dict[str, Any]) -> None:
    """Give each rank its part of every weight, one after the other; `initialize` would first move all to each device.

    It does not cast weights that are divided already, such as those that a model keeps in float32.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype.value)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    import_deepspeed().zero.Init(module=module, config_dict_or_path=config)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(settings.device)


class Engine:
    """A DeepSpeed engine around a module whose forward returns a scalar loss.

    The module is on its device already, or with ZeRO-3 on the CPU: a model that only all devices together can hold.

    The loss must already be normalised over the whole step: gradients of all backwards of all ranks are summed.
    """

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        check_settings(settings)
        deepspeed = import_deepspeed()
        init_process_group(settings.device)
        self._stage = settings.engine.zero_stage
        self._clip = settings.optim.grad_clip
        self._optimizer_name = settings.optim.name.value
        config, optimizer = deepspeed_config(settings), make_optimizer(module, settings)
        with quiet():
            if self._stage == 3:
                _divide(module, settings, config)
            self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        self._averaged_over = self._engine.dp_world_size
        self._coalescing: AbstractContextManager[Any] | None = None
        self._norm = 0.0
        if self._stage == 0:
            self._optimizer.register_step_pre_hook(self._measure_and_clip)

    @property
    def needs_joined_retained_chunks(self) -> bool:
        """ZeRO-3 traces one forward for one backward: the retained chunks of a sequence must share a call."""
        return self._stage == 3

    @property
    def needs_lockstep(self) -> bool:
        """ZeRO-3 communicates within forward and backward: all ranks must run the same ones."""
        return self._stage == 3 and bool(self._averaged_over > 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._stage == 2 and torch.is_grad_enabled():  # nothing would end what an evaluation had begun
            self._coalesce()
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        if self._stage >= 1:  # two backwards with no forward between them would lose gradients
            self._engine.optimizer.clear_backward_seen_flag()
        # DeepSpeed averages over the ranks.
        self._engine.backward(loss * self._averaged_over, scale_wrt_gas=False)

    def step(self) -> float:
        """Sum the gradients of all ranks, clip, update the weights and forget the gradients.

        Returns:
            The norm of the summed gradient before clipping, the same on every rank.
        """
        self._make_gradients_whole()
        self._engine.step()
        norm = self._norm if self._stage == 0 else float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise RunError(f"the gradient norm is {norm}: the weights of this step are spoilt and are not saved")
        return norm

    def _fill_missing_gradients(self) -> None:
        """Zeros for weights that no chunk of this rank has used (the head, by a rank without targets).

        Other ranks have used them, and DeepSpeed takes it for granted that all ranks reduce the same ones.
        """
        if hasattr(self._engine.optimizer, "fp32_groups_has_gradients"):
            # BF16_Optimizer sums into buffers of its own, which begin at zero. What this rank has not touched it leaves
            # out of the norm, even if others have.
            for touched in self._engine.optimizer.fp32_groups_has_gradients:
                touched[:] = [True] * len(touched)
            return
        for parameter in self.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _measure_and_clip(self, *_: Any) -> None:
        """DeepSpeed's ZeRO-0 does not tell the norm that it clips by: so this runs between its sum and its update."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self._clip, norm)
        self._norm = float(norm)

    def discard_gradients(self) -> None:
        """Forget what an interrupted step has accumulated, however far this rank has come; all ranks call it."""
        self._make_gradients_whole()
        self._engine.zero_grad()
        if self._stage >= 1:
            self._engine.optimizer.zero_grad()

    def _coalesce(self) -> None:
        """ZeRO-2 otherwise keeps the gradient of the last backward only."""
        if self._coalescing is None:
            self._coalescing = self._engine.coalesce_grad_reduction()
            self._coalescing.__enter__()

    def _make_gradients_whole(self) -> None:
        """End what the backwards of a step have begun, so that all ranks reduce the same gradients."""
        if self._stage < 3:
            self._fill_missing_gradients()
        if self._stage == 2:
            self._coalesce()
            assert self._coalescing is not None
            self._coalescing.__exit__(None, None, None)
            self._coalescing = None

    def set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def whole_weights(self, model: nn.Module, *, trained_only: bool) -> dict[str, Tensor] | None:
        """The state dict of `model`, a part of the engine's module: on the first rank, None on others. All call it."""
        return whole_weights(model, trained_only=trained_only)

    def save(self, folder: Path) -> None:
        """Write what this rank keeps of weights and optimizer states into `folder`, which exists; every rank does."""
        write_parts(folder, own_rank(), parts_to_write(self._engine, self._names()), optimizer=self._optimizer_name)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, exact to the bit, whatever number of ranks and ZeRO stage have saved.

        Raises:
            UsageError: it is the state of another model or optimizer.
            RunError: a file of it is missing or damaged.
        """
        with all_or_none(f"reading {folder}"):
            files, names = StateFiles(folder), self._names()
            check_fits(files, self._engine, names, optimizer=self._optimizer_name)
            read_partitions(self._engine, names, files)
        publish_weights(self._engine)

    def _names(self) -> dict[str, str]:
        """Of the module's parameters in the Hugging Face model."""
        return {name: name.removeprefix(WRAPPER) for name, _ in self.module.named_parameters()}
