"""The interface of an engine, the same for every layout of a run."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TrainingEngine(Protocol):
    """The weights that this process trains, their gradients and their optimizer.

    An optimizer step is any number of forwards and backwards, then `step()`. The engine sums the gradients of all
    backwards of all ranks, so the loss must already be normalized over the whole step.
    """

    module: nn.Module
    """The module that `forward` runs: the whole model, or one stage of a pipeline."""
    device: torch.device
    """The device of the module's inputs."""

    is_stage: bool
    """The module is one stage of a pipeline and holds only some of the layers."""
    is_divided: bool
    """ZeRO-3: each rank holds a part of every weight, whole ones exist within a forward or backward only. All chunks of
    a sequence that keep their activations must share one of each."""
    needs_lockstep: bool
    """All ranks must run the same number of forwards and backwards, because they communicate in them."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module. Arguments and result are the module's."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to those of the step."""

    @abstractmethod
    def step(self) -> float:
        """Sum the gradients of all ranks, clip them, update the weights and forget the gradients. All ranks call it.

        Returns:
            The norm of the summed gradients of the whole model before clipping, the same on every rank.

        Raises:
            RunError: the norm is not finite.
        """

    @abstractmethod
    def discard_gradients(self) -> None:
        """Forget the gradients of an interrupted step, however far each rank has come. All ranks call it."""

    @abstractmethod
    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next steps."""

    @abstractmethod
    def whole_weights(self, model: nn.Module, *, trained_only: bool) -> dict[str, Tensor] | None:
        """Return the state dict of the whole Hugging Face (or peft) model on rank 0, None elsewhere. All ranks call it.

        Args:
            model: the model inside the engine's module; of a pipeline, the part that this stage holds.
            trained_only: leave out frozen weights, such as the base under adapters.
        """

    @abstractmethod
    def first_not_finite(self) -> str | None:
        """Return a description of the first weight or optimizer state that is NaN or infinite; None if all are finite.

        Weights are looked at in the data type of the model as well, which may hold smaller numbers than the optimizer.
        The answer is the same on every rank. All ranks call it.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer states into an existing folder. All ranks call it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore to the bit what `save` wrote, on any number of ranks and any layout. All ranks call it.

        Raises:
            UsageError: the folder holds the state of another model or optimizer.
            RunError: a file is missing or damaged.
        """
