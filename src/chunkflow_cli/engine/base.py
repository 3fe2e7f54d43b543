"""Base class of the engines of both layouts: DeepSpeed's engine, the optimizer, clipping, saving and loading."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chunkflow_cli.engine import internals
from chunkflow_cli.engine.agreement import all_or_none, gather, own_rank
from chunkflow_cli.engine.distributed import import_deepspeed, quiet
from chunkflow_cli.engine.interface import TrainingEngine
from chunkflow_cli.engine.optimizer_states import place_whole_parameters, read_whole_states, whole_states
from chunkflow_cli.engine.optimizers import FACTOR
from chunkflow_cli.engine.partitions import check_fits, equal_share, kept_partitions, parts_to_write, read_partitions
from chunkflow_cli.engine.settings import EngineSettings
from chunkflow_cli.engine.state_files import WEIGHT, StateFiles, write_parts
from chunkflow_cli.engine.whole_parameters import WholeParameters
from chunkflow_cli.errors import RunError


class BaseEngine(TrainingEngine):
    """A training engine on top of DeepSpeed.

    DeepSpeed does not count micro-steps: `gradient_accumulation_steps` stays 1, and a step ends where `step` is called.
    """

    def __init__(
        self,
        module: nn.Module,
        driven: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: EngineSettings,
        config: dict[str, Any],
        *,
        hf_names: Mapping[str, str],
        replicas: int,
        replica_group: Any = None,
    ) -> None:
        """
        Args:
            module: what `forward` runs.
            driven: the module that DeepSpeed is given: `module`, or DeepSpeed's own around it.
            config: DeepSpeed's configuration, made from `settings`.
            hf_names: name of each parameter of `module` -> its name in the whole Hugging Face model.
            replicas: number of ranks that hold the same layers.
            replica_group: these ranks; None if they are all ranks.
        """
        self.module = module
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        with quiet():
            self._engine, *_ = import_deepspeed().initialize(model=driven, optimizer=optimizer, config=config)
        self.device = self._engine.device
        self._optimizer = optimizer
        self._optimizer_name = settings.optim.name.value
        self._zero_stage = settings.engine.zero_stage
        self._replicas = replicas
        self._hf_names = hf_names
        self._trained = {hf_names[name]: p for name, p in module.named_parameters() if p.requires_grad}
        self._clip = settings.optim.grad_clip
        self._norm = 0.0
        if isinstance(optimizer, WholeParameters):
            place_whole_parameters(optimizer, self._engine, self._trained, group_of, replica_group)
        if self._zero_stage == 0:
            optimizer.register_step_pre_hook(self._measure_and_clip)

    def step(self) -> float:
        self._reduce()
        self._update()
        norm = self._norm if self._zero_stage == 0 else float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise RunError(f"the gradient norm is {norm}: the weights after this step are corrupt and are not saved")
        return norm

    @abstractmethod
    def _reduce(self) -> None:
        """Make the gradients of all backwards ready for `_update`."""

    @abstractmethod
    def _update(self) -> None:
        """Step the optimizer and forget the gradients."""

    def _gradient_norm(self) -> float:
        """Return the norm of the whole model's gradients; only without ZeRO, where they are whole on every rank."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None]))

    def _measure_and_clip(self, *_: Any) -> None:
        """Measure and clip the gradient, between DeepSpeed's sum of the gradients and its update.

        Without ZeRO, DeepSpeed does not return the norm by which it clips, and in a pipeline that norm is wrong: a tied
        weight counts twice, and the norms of different stages are averaged.
        """
        self._norm = self._gradient_norm()
        if self._clip > 0:
            norm = torch.tensor(self._norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._clip, norm)

    def _add_missing_gradients(self) -> None:
        """Give zeros to weights that no chunk of this rank has used, such as the head on a rank without targets.

        Other ranks may have used them, and DeepSpeed assumes that all ranks reduce the same gradients.
        """
        for parameter in self._trained.values():
            internals.add_missing_gradient(self._engine.optimizer, parameter)

    def discard_gradients(self) -> None:
        self._engine.zero_grad()
        if self._zero_stage >= 1:
            self._engine.optimizer.zero_grad()

    def set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group[FACTOR]

    def first_not_finite(self) -> str | None:
        found = None
        kept = kept_partitions(self._engine, self._trained)
        for part in itertools.chain(parts_to_write(kept, self._optimizer), whole_states(self._optimizer)):
            for kind, tensor in part.tensors.items():
                dtype = self._trained[part.parameter].dtype if kind == WEIGHT else tensor.dtype
                if found is None and not _is_finite(tensor, dtype):
                    found = f"the {kind.replace('_', ' ')} of {part.parameter}"
        return next((answer for answer in gather(found) if answer is not None), None)

    def save(self, folder: Path) -> None:
        elsewhere = self._saved_elsewhere()
        kept = [part for part in kept_partitions(self._engine, self._trained) if part.parameter not in elsewhere]
        if self._zero_stage == 0:
            kept = equal_share(kept, own_rank() % self._replicas, self._replicas)
        parts = itertools.chain(parts_to_write(kept, self._optimizer), whole_states(self._optimizer))
        write_parts(folder, own_rank(), parts, optimizer=self._optimizer_name)

    def load(self, folder: Path) -> None:
        with all_or_none(f"reading {folder}"):
            files = StateFiles(folder)
            check_fits(files, self._trained, optimizer=self._optimizer_name, has_all=not self.is_stage)
            read_partitions(kept_partitions(self._engine, self._trained), self._optimizer, files)
            read_whole_states(self._optimizer, files)
        internals.publish_weights(self._engine)

    def _saved_elsewhere(self) -> frozenset[str]:
        """Return the names of the parameters that another stage holds too, and saves."""
        return frozenset()


def _is_finite(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether all numbers of a tensor are finite, and stay so in a data type. Takes no memory of its size."""
    return bool(torch.stack(torch.aminmax(tensor)).to(dtype).isfinite().all())
