"""Gather all weights of a module at once under ZeRO-3, where ranks call what is inside it more or less often.

DeepSpeed gathers the weights of each module on all ranks together, whenever it is called. A module that runs once for
each segment of a chunk, or an expert, is called more often on one rank than on another, which would wait forever. So
DeepSpeed gets to know nothing of such modules. The one around them is called equally often on all ranks: that call
gathers all weights inside, and so does its backward. In between they are freed.

DeepSpeed also expects gradients of the same weights on all ranks in every backward, and in the same order: it sums them
in buckets. What is used here, and when, depends on the data. So the input of the module passes a node for each of its
weights. In backward, these nodes run one after the other when the module is done. Only then is the gradient of a weight
complete, and that of a weight that no token has used is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from chunkflow_cli.engine import internals
from chunkflow_cli.engine.distributed import import_deepspeed


class GatheredModule:
    """The weights of one such module, and those who need them whole."""

    def __init__(self, module: nn.Module) -> None:
        """
        Args:
            module: divided, and unknown to DeepSpeed's hooks (`internals.unknown_to_zero_3`).
        """
        self._weights = tuple(module.parameters())
        self._trained = tuple(weight for weight in self._weights if weight.requires_grad)
        self._users = 0
        self._whole = contextlib.ExitStack()
        self._call: _Call | None = None
        self._is_kept = False
        """A recompute has gathered the weights, and its backward has not ended yet."""
        module.register_forward_pre_hook(self._begin, with_kwargs=True)
        module.register_forward_hook(self._end, always_call=True)  # a recompute ends where it has all it needs

    def gather(self) -> None:
        """Make the weights whole, if they are not: a recompute may run within the backward of its module."""
        self._users += 1
        divided = [weight for weight in self._weights if internals.is_empty(weight)]  # the others are small, and stay
        if self._users == 1 and divided:
            with internals.without_selective_modes():
                self._whole.enter_context(import_deepspeed().zero.GatheredParameters(divided))

    def free(self) -> None:
        """Keep only this rank's part of the weights, unless somebody else needs them."""
        self._users -= 1
        if self._users == 0:
            with internals.without_selective_modes():
                self._whole.close()

    def end_backward(self) -> None:
        """Free what the backward of a call and its recompute have gathered."""
        self.free()
        if self._is_kept:
            self._is_kept = False
            self.free()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.gather()
        self._call = None
        arguments: dict[Any, Any] = {**dict(enumerate(args)), **options}
        name, hidden = next((name, value) for name, value in arguments.items() if _is_float(value))
        if not torch.is_grad_enabled() or not (hidden.requires_grad or self._trained):
            return None
        self._call = _Call(self)
        arguments[name] = self._call.pass_nodes(hidden, self._trained)
        return tuple(arguments.pop(index) for index in range(len(args))), arguments

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._call is None or self._is_kept or not internals.is_in_backward():
            self.free()
        else:
            self._is_kept = True  # what a recompute saves of a frozen weight is the weight itself, which is freed
        for tensor in output if isinstance(output, tuple) else (output,):
            if self._call is not None and _is_float(tensor) and tensor.requires_grad:
                tensor.register_hook(self._call.begin_backward)


class _Call:
    """A call of a module with gradient: gathers the weights before its backward, and frees them after it."""

    def __init__(self, module: GatheredModule) -> None:
        self._module = module
        self._is_in_backward = False

    def pass_nodes(self, hidden: Tensor, weights: Iterable[Tensor]) -> Tensor:
        """Return the input of the module behind the nodes that complete the gradients of its weights."""
        edge = torch.empty((), device=hidden.device, requires_grad=True)  # so that backward comes there in any case
        hidden = _End.apply(hidden, edge, self)
        for weight in weights:
            hidden = _Complete.apply(hidden, weight)
        return hidden

    def begin_backward(self, _: Tensor) -> None:
        """Run before the gradient of any output goes on."""
        if not self._is_in_backward:
            self._is_in_backward = True
            self._module.gather()

    def end_backward(self) -> None:
        """Run when all gradients of the call are complete."""
        if self._is_in_backward:
            self._is_in_backward = False
            self._module.end_backward()


class _End(torch.autograd.Function):
    """Passes a tensor on, and ends the backward of the call."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, edge: Tensor, call: _Call) -> Tensor:
        context.call = call
        return hidden.detach()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        context.call.end_backward()
        return gradient, None, None


class _Complete(torch.autograd.Function):
    """Passes a tensor on, and a gradient of zeros to a weight."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        context.shape, context.dtype = weight.shape, weight.dtype
        return hidden.detach()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.new_zeros((), dtype=context.dtype).expand(context.shape)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
