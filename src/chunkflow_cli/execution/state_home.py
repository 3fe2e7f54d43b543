"""Where the state of earlier chunks is kept between its uses: on the device, or in host memory.

The state store asks its home for room, hands it what is to be kept, and fetches rows before they are used. On the
device nothing moves. In host memory a `Mover` copies: at once on a CPU, on a stream of its own on CUDA. Both homes hold
blocks of the same sizes, so what is computed from them is the same to the bit.
"""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunkflow_cli.config.schema import OffloadState
from chunkflow_cli.planning.state_memory import STATE_BLOCK_TOKENS

SLAB_BYTES = 2**28
"""Host memory is taken in pieces of this size. torch rounds a pinned allocation up to a power of two, and pinning takes
long, so many buffers share one."""
ALIGNMENT = 512


class Rows(NamedTuple):
    """Rows of a kept tensor, of which the first ones may have been given no values yet: those are zeros."""

    kept: Tensor
    unset: int = 0


class Arrival(ABC):
    """Rows on their way to the device."""

    @abstractmethod
    def wait(self) -> list[Tensor]:
        """Return them, to be used by what is computed from now on. Call it once."""


class LookAhead:
    """Guesses the rows that are needed next, the same as last time, so that their copy starts early.

    A pass is a forward or backward of one chunk. Chunks read the same places in the same order, such as the first
    blocks of layer after layer, so what has followed a place in the pass of one chunk follows it in that of the next.
    """

    def __init__(self) -> None:
        self._follows: dict[Hashable, Hashable] = {}
        self._last: tuple[Hashable, Hashable] | None = None
        self._ahead: tuple[tuple[Hashable, Hashable], Arrival] | None = None

    def take(self, of_pass: Hashable, place: Hashable) -> Arrival | None:
        """Return the rows that are being copied, if they are needed now, at this place of a pass."""
        if self._last is not None and self._last[0] == of_pass:
            self._follows[self._last[1]] = place
        self._last = of_pass, place
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] == self._last:
            return None if ahead is None else ahead[1]
        ahead[1].wait()  # its memory may be used again only when the copy has ended
        return None

    def guess(self, of_pass: Hashable) -> Any:
        """Return the place that is needed next in this pass; None if that is not known, or on its way."""
        if self._ahead is not None or self._last is None or self._last[0] != of_pass:
            return None
        return self._follows.get(self._last[1])

    def put(self, of_pass: Hashable, place: Hashable, arrival: Arrival) -> None:
        """Remember a copy that has started."""
        self._ahead = (of_pass, place), arrival

    def forget(self) -> None:
        """Discard a copy that has started."""
        if self._ahead is not None:
            self._ahead[1].wait()
        self._ahead = self._last = None


class Home(ABC):
    """Keeps tensors of the state store. Room is given back when nothing refers to a tensor any more."""

    look_ahead: LookAhead | None = None
    """What is on its way before it is asked for; None if nothing has to move."""

    def __init__(self, block_tokens: int | None = None) -> None:
        """
        Args:
            block_tokens: rows of a block; by default, what suits the device. Attention to the past takes a block at a
                time.
        """
        self._block_tokens = block_tokens

    def block_tokens(self, device: torch.device) -> int:
        """Return the most rows of a block."""
        return self._block_tokens or STATE_BLOCK_TOKENS["cuda" if device.type == "cuda" else "cpu"]

    @abstractmethod
    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor without values, in which something of a tensor of this device is kept."""

    @abstractmethod
    def put(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Give kept rows (first of a pair) the values of a tensor on the device."""

    @abstractmethod
    def fetch(self, rows: Sequence[Rows], device: torch.device) -> Arrival:
        """Begin to bring rows to the device. What is written to them there is kept only after `put`."""

    def settle(self) -> None:  # noqa: B027 - nothing moves on the device
        """Release the device memory of copies that are under way."""


class OnDevice(Home):
    """State stays on the device; what is fetched is the kept tensor itself."""

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def put(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for kept, value in pairs:
            if kept.data_ptr() != value.data_ptr():
                kept.copy_(value)

    def fetch(self, rows: Sequence[Rows], device: torch.device) -> Arrival:
        for kept, unset in rows:
            kept[:unset].zero_()
        return Here([kept for kept, _ in rows])


@dataclass(frozen=True)
class Here(Arrival):
    """Rows that are on the device."""

    rows: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.rows


class Mover(ABC):
    """Copies between host and device, in the order of its calls."""

    pins = False
    """Whether it needs host memory that the system may not move."""

    @abstractmethod
    def to_device(self, rows: Sequence[Rows], device: torch.device) -> Arrival:
        """Begin to copy rows to new tensors on the device."""

    @abstractmethod
    def to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy tensors of the device (second of a pair) to host memory."""

    def settle(self) -> None:  # noqa: B027 - copies that are made at once leave nothing behind
        """Let go of tensors whose copies are under way."""


class CopyingMover(Mover):
    """Copies at once: for a CPU, where host and device are the same memory."""

    def to_device(self, rows: Sequence[Rows], device: torch.device) -> Arrival:
        arrived = _empty_like(rows, device)
        _copy_rows(arrived, rows)
        return Here(arrived)

    def to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for kept, value in pairs:
            kept.copy_(value)


class _Leaving(NamedTuple):
    """Tensors of the device that are copied to host memory."""

    event: Any
    """The end of the copies."""
    tensors: list[Tensor]
    spans: list[tuple[int, int]]
    """First addresses of where they go, and those behind the last."""


class StreamingMover(Mover):
    """Copies on two CUDA streams, one for each direction of the link, next to what is computed.

    Device tensors are allocated and freed by the computing stream. A copying stream waits for that stream before it
    touches them, because their memory may still be in use there by what had it before. The computing stream waits for a
    copy before it uses what arrives, or frees what leaves. These waits are on the device; the process never waits. So
    no tensor needs `record_stream`, whose memory is given back late (torch.Tensor.record_stream, first warning).

    Host memory needs one wait more: what is read may just be written. All but the last that left has been waited for by
    the computing stream, so only rows of that one are looked for. And what is written has been read: the computing
    stream has waited for all that arrived.
    """

    pins = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving: _Leaving | None = None

    def to_device(self, rows: Sequence[Rows], device: torch.device) -> Arrival:
        arriving = _empty_like(rows, device)
        if self._leaving is not None and _overlap(_spans(kept for kept, _ in rows), self._leaving.spans):
            self._in.wait_event(self._leaving.event)
        return _OnItsWay(arriving, self._copy(self._in, arriving, rows), device)

    def to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._await_leaving()
        targets, tensors = [kept for kept, _ in pairs], [value.contiguous() for _, value in pairs]
        event = self._copy(self._out, targets, [Rows(tensor) for tensor in tensors])
        self._leaving = _Leaving(event, tensors, _spans(targets))

    def settle(self) -> None:
        self._await_leaving()
        torch.cuda.current_stream(self._device).wait_stream(self._in)  # a step that failed has waited for nothing

    def _await_leaving(self) -> None:
        if self._leaving is not None:
            torch.cuda.current_stream(self._device).wait_event(self._leaving.event)
            self._leaving = None

    def _copy(self, stream: Any, targets: Sequence[Tensor], rows: Sequence[Rows]) -> Any:
        """Copy on a stream; return the event of its end."""
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            _copy_rows(targets, rows)
            return stream.record_event()


def _spans(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return the addresses of contiguous tensors, from the first up to the one behind the last."""
    return [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]


def _overlap(some: Iterable[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    return any(first < end and start < last for start, end in some for first, last in others)


class _OnItsWay(Arrival):
    """Rows that a stream copies."""

    def __init__(self, rows: list[Tensor], event: Any, device: torch.device) -> None:
        self._rows, self._event, self._device = rows, event, device

    def wait(self) -> list[Tensor]:
        torch.cuda.current_stream(self._device).wait_event(self._event)
        return self._rows


def _empty_like(rows: Iterable[Rows], device: torch.device) -> list[Tensor]:
    return [torch.empty(kept.shape, dtype=kept.dtype, device=device) for kept, _ in rows]


def _copy_rows(targets: Iterable[Tensor], rows: Iterable[Rows]) -> None:
    for target, (source, unset) in zip(targets, rows, strict=True):
        target[:unset].zero_()
        target[unset:].copy_(source[unset:], non_blocking=True)


class InHostMemory(Home):
    """State is kept in host memory, in buffers that are used again.

    The most that was kept at once stays allocated, as `plan` counts it.
    """

    look_ahead: LookAhead

    def __init__(self, mover: Mover, block_tokens: int | None = None) -> None:
        super().__init__(block_tokens)
        self.look_ahead = LookAhead()
        self._mover = mover
        self._buffers = _HostBuffers(pinned=mover.pins)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that buffers have been cut from so far."""
        return self._buffers.used_bytes

    @property
    def page_lock_seconds(self) -> float:
        """Seconds that taking memory from the host has cost so far, which is to be page-locked for a GPU."""
        return self._buffers.seconds

    def holds(self, storage: torch.UntypedStorage) -> bool:
        """Return whether this is host memory of the home."""
        return storage.data_ptr() in self._buffers.addresses

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._buffers.take(shape, dtype)

    def put(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._mover.to_host(pairs)

    def fetch(self, rows: Sequence[Rows], device: torch.device) -> Arrival:
        return self._mover.to_device(rows, device)

    def settle(self) -> None:
        self.look_ahead.forget()
        self._mover.settle()


@dataclass
class _HostBuffers:
    """Buffers cut from slabs of host memory. One that is given back serves the next request of the same size."""

    pinned: bool
    used_bytes: int = 0
    seconds: float = 0.0
    """Spent on taking slabs."""
    addresses: set[int] = field(default_factory=set)
    """Of the slabs."""
    _slab: Tensor | None = None
    _offset: int = 0
    _free: defaultdict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = prod(shape) * dtype.itemsize
        free = self._free[count]
        raw = free.pop() if free else self._cut(count)
        tensor = raw.view(dtype).view(tuple(shape))
        weakref.finalize(tensor, free.append, raw).atexit = False
        return tensor

    def _cut(self, count: int) -> Tensor:
        room = -(-count // ALIGNMENT) * ALIGNMENT
        if self._slab is None or self._offset + room > len(self._slab):
            size = max(SLAB_BYTES, 1 << (room - 1).bit_length())
            began = time.perf_counter()
            self._slab, self._offset = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned), 0
            self.seconds += time.perf_counter() - began
            self.addresses.add(self._slab.data_ptr())
        raw = self._slab[self._offset : self._offset + count]
        self._offset += room
        self.used_bytes += room
        return raw


def state_home(kind: OffloadState, device: torch.device, block_tokens: int | None = None) -> Home:
    """Return the home of a run's state, as `chunk.offload_state` names it."""
    return OnDevice(block_tokens) if kind is OffloadState.none else host_home(device, block_tokens)


def host_home(device: torch.device, block_tokens: int | None = None) -> InHostMemory:
    """Return a home in host memory for the state of a device."""
    return InHostMemory(StreamingMover(device) if device.type == "cuda" else CopyingMover(), block_tokens)
