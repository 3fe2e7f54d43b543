"""Count the bytes of an accelerator and of its host in a process that has only a CPU.

Every tensor lives in the CPU's memory, and each storage is told to be the device's or the host's: by the device that
the call names which made it, otherwise by the tensors that it was computed from. `cpu:0` is the device and `cpu` the
host, so code that asks a tensor for its device, compares devices or moves a tensor takes the way that it takes with a
GPU. An operator that mixes the two, which CUDA would refuse, is an error here.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunkflow_cli.engine import import_deepspeed

DEVICE, HOST = torch.device("cpu:0"), torch.device("cpu")
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory}


class TwoMemories:
    """Counts bytes while `counting` is open."""

    def __init__(self) -> None:
        self.held = Counter[torch.device]()
        """Bytes that exist now, by memory."""
        self.most = Counter[torch.device]()
        """Most bytes that existed at once, by memory."""
        self._places: dict[int, tuple[torch.device, weakref.ref[Any]]] = {}
        self.target: torch.device | None = None
        """The memory that the call which is running names for its result."""
        self.is_pinning = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the block makes and frees."""
        with _Devices(self), _Storages(self):
            yield

    def where(self, tensor: Tensor) -> torch.device:
        """Return the memory that a tensor is in: the host's, unless it was made on the device."""
        place = self._places.get(tensor.untyped_storage()._cdata)
        return HOST if place is None else place[0]

    def add(self, tensor: Tensor, device: torch.device) -> None:
        """Count a tensor, if its storage is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._places and self._places[key][1]() is storage:
            return
        if self.is_pinning:  # torch rounds these up to a power of two (CachingHostAllocator.h)
            size = 1 << (size - 1).bit_length()
        self._places[key] = device, weakref.ref(storage, functools.partial(self._free, key, device, size))
        self.held[device] += size
        self.most[device] = max(self.most[device], self.held[device])

    def _free(self, key: int, device: torch.device, size: int, _: Any) -> None:
        self.held[device] -= size
        self._places.pop(key, None)


class _Devices(TorchFunctionMode):
    """Answers `tensor.device`, and carries out moves between the two memories."""

    def __init__(self, memories: TwoMemories) -> None:
        super().__init__()
        self.memories = memories

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return self.memories.where(args[0])
        if func is Tensor.backward:  # torch turns the mode off in the call, and so in hooks
            with self:
                return Variable._execution_engine.run_backward(
                    (args[0],), (torch.ones_like(args[0]),), False, False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
        if func not in _MOVES:
            if kwargs.get("device") is None:
                return func(*args, **kwargs)
            self.memories.target = torch.device(kwargs["device"])
            try:
                return func(*args, **kwargs)
            finally:
                self.memories.target = None
        tensor = args[0]
        target = self._target(func, args[1:], kwargs)
        if target is None:
            return func(*args, **kwargs)
        dtype = next((a for a in (*args[1:], kwargs.get("dtype")) if isinstance(a, torch.dtype)), tensor.dtype)
        if target == self.memories.where(tensor) and func is not Tensor.pin_memory and not kwargs.get("copy"):
            return tensor.to(dtype)
        self.memories.target, self.memories.is_pinning = target, func is Tensor.pin_memory
        try:
            return torch.ops.aten._to_copy(tensor, dtype=dtype)
        finally:
            self.memories.target, self.memories.is_pinning = None, False

    def _target(self, func: Any, args: Any, kwargs: Any) -> torch.device | None:
        if func in (Tensor.cpu, Tensor.pin_memory):
            return HOST
        if func is Tensor.cuda:
            return DEVICE
        for value in (*args, kwargs.get("device"), kwargs.get("other")):
            if isinstance(value, Tensor):
                return self.memories.where(value)
            if isinstance(value, torch.device | str):
                return torch.device(getattr(value, "value", value))  # DeepSpeed has an enumeration of strings
        return None


class _Storages(TorchDispatchMode):
    """Tells each new storage where it is."""

    def __init__(self, memories: TwoMemories) -> None:
        super().__init__()
        self.memories = memories

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        memories = self.memories
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = memories.target or (None if given else kwargs.get("device"))
        if device is None:
            places = {memories.where(tensor) for tensor in given if tensor.dim() > 0}
            if len(places) > 1 and func is not torch.ops.aten.copy_.default:
                raise RuntimeError(f"{func} mixes tensors of the device and of the host")
            scalars = {memories.where(tensor) for tensor in given}  # these, CUDA takes from the host
            device = next(iter(places), DEVICE if DEVICE in scalars else HOST)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                memories.add(leaf, device)
        return result


def as_accelerator(memories: TwoMemories, monkeypatch: Any) -> None:
    """Let DeepSpeed believe that its accelerator is the device of `memories`, and that host memory can be pinned."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    for name in ("current_device_name", "device_name"):
        monkeypatch.setattr(accelerator, name, lambda *_: str(DEVICE))
    monkeypatch.setattr(accelerator, "_name", str(DEVICE))
    monkeypatch.setattr(accelerator, "on_accelerator", lambda tensor: memories.where(tensor) == DEVICE)
    monkeypatch.setattr(accelerator, "pin_memory", lambda tensor, **_: tensor.pin_memory())
    for name, dtype in (("FloatTensor", torch.float32), ("ByteTensor", torch.uint8)):
        made = functools.partial(torch.tensor, dtype=dtype, device=DEVICE)
        monkeypatch.setattr(type(accelerator), name, property(lambda _, made=made: made))
