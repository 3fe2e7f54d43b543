"""State in host memory: the same bits as on the device, and never more than three blocks of it on the device."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunkflow_cli.config.schema import ActivationCheckpointing, Attention, LoraConfig
from chunkflow_cli.execution import state_home
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, random_sequences, use_implementation
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.stages import StageChain, StageModel
from chunkflow_cli.execution.state import SequenceState, StateStore
from chunkflow_cli.execution.state_home import (
    CopyingMover,
    Home,
    InHostMemory,
    LookAhead,
    OnDevice,
    Rows,
    StreamingMover,
    host_home,
)
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.shape import model_shape
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from chunkflow_cli.planning.stage_cut import cut_layers
from support.models import BEYOND, MODELS, SHAPES, recurrent_model

CPU = torch.device("cpu")

SIZE, BLOCK = 13, 20
"""Chunks straddle blocks."""


def model_of(tiny_model: Callable[..., Any], name: str) -> Any:
    known = {**MODELS, **BEYOND, **SHAPES}
    if name not in known:
        return recurrent_model(name)
    model_type, settings = known[name]
    return tiny_model(model_type, **settings)


def run(module: Any, home: Home, lengths: Sequence[int], k: int, size: int = SIZE, *, evaluates: bool = False) -> float:
    """Run a step, and perhaps an evaluation; return the loss."""
    chunks = build_chunks(lengths, size)
    batch = StepBatch(chunks, random_sequences(lengths, 60), np.full(len(lengths), 0.01))
    runner = Runner(DirectEngine(module), RunnerSettings(CPU, state_home=home))
    return (runner.evaluate(batch) if evaluates else runner.run((plan(chunks, k),), batch)).loss


def results(model: Any, home: Home, k: int, stages: int = 1) -> list[Tensor]:
    """Return losses and gradients."""
    backend = choose_backend(Attention.auto, model.config, CPU, torch.float32).backend
    with use_implementation(model, "chunkflow"):
        module: Any = ChunkModel(model, backend)
        if stages > 1:
            layers = cut_layers(int(model.config.num_hidden_layers), stages)
            module = StageChain([StageModel(copy.deepcopy(model), backend, part) for part in layers])
        model.zero_grad(set_to_none=True)
        losses = [run(module, home, (100, 9, 53), k)]
        if stages == 1:
            losses.append(run(module, home, (100, 9, 53), k, evaluates=True))
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        else:
            gradients = module.gradients()
    return [torch.tensor(losses), *(gradient.clone() for _, gradient in sorted(gradients.items()))]


@pytest.mark.parametrize(
    ("name", "k", "checkpointing", "lora", "stages"),
    [
        ("llama", 1, "none", False, 1),
        ("llama", 3, "full", True, 1),
        ("llama", 99, "selective", False, 1),
        ("llama", 2, "none", False, 2),
        ("mistral, middle window", 2, "selective", False, 1),
        ("gemma3", 1, "full", False, 1),
        ("gpt_oss, sinks", 2, "none", False, 1),
        ("gemma2, soft caps", 1, "none", False, 1),
        ("llama4, blocks, temperature", 2, "none", False, 1),
        ("deepseek_v3, narrow values", 1, "none", False, 1),
        ("gemma4, shared keys, head_dim by kind", 2, "full", False, 1),
        ("qwen3_5", 1, "full", False, 1),
        ("nemotron_h", 2, "none", False, 1),
    ],
)
def test_the_same_bits(
    tiny_model: Callable[..., Any], name: str, k: int, checkpointing: str, lora: bool, stages: int
) -> None:
    """Where state is kept changes no bit of losses and gradients."""
    model = model_of(tiny_model, name)
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    if lora:
        model = add_lora(model, LoraConfig(enabled=True, r=4))
    here = results(model, OnDevice(BLOCK), k, stages)
    assert here[0].abs().min() > 0.1
    for mine, other in zip(here, results(model, host_home(CPU, BLOCK), k, stages), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", "full"), ("mistral, middle window", "none")])
def test_copies_on_a_stream(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, checkpointing: str
) -> None:
    """What is computed waits for what arrives, nothing is freed before it has left, and most is on its way before."""
    taken: list[bool] = []
    take = LookAhead.take
    monkeypatch.setattr(
        LookAhead, "take", lambda self, *place: (arrival := take(self, *place), taken.append(arrival is not None))[0]
    )
    model = model_of(tiny_model, name)
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    here = results(model, OnDevice(BLOCK), 2)
    with late_streams():
        late = results(model, InHostMemory(LateMover(CPU), BLOCK), 2)
    for mine, other in zip(here, late, strict=True):
        assert torch.equal(mine, other)
    # The model has two layers: of each pass, the second block at the latest.
    assert taken.count(True) > 0.4 * len(taken)


@pytest.mark.parametrize("broken", ["wait_event", "wait_stream", "_await_leaving"])
def test_copies_on_a_stream_need_every_wait(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Without one of the waits, the emulated streams show it."""
    model = model_of(tiny_model, "llama")
    if broken == "_await_leaving":  # what leaves is freed at once
        monkeypatch.setattr(StreamingMover, broken, lambda self: setattr(self, "_leaving", None))
    else:
        stream = ComputingStream if broken == "wait_event" else LateStream
        monkeypatch.setattr(stream, broken, lambda *_: None)
    with late_streams():
        home = InHostMemory(LateMover(CPU), BLOCK)
        try:
            late = results(model, home, 2)
        except AssertionError as error:
            assert "under way" in str(error) or "in use" in str(error)  # noqa: PT017
            return
    assert late[0].isnan().any()


@pytest.mark.parametrize("is_shared", [False, True])
def test_host_memory_is_read_and_used_again_after_it_was_written(is_shared: bool) -> None:
    """The two streams wait for each other where they meet in host memory, and so does the process itself."""
    ones = torch.ones(BLOCK, 1, 4)
    with late_streams():
        home = InHostMemory(LateMover(CPU), BLOCK)
        state = SequenceState(2 * BLOCK, home, is_shared=is_shared)
        state.write(0, 0, {"keys": ones})
        freed = home.room(ones.shape, torch.float32, CPU)
        home.put([(freed, ones * torch.nan)])  # still under way when the gradients get this memory
        if is_shared:
            del freed
            (block,) = state.past(0, BLOCK, with_gradients=True)
            assert not block._gradients["keys"].any()
        else:
            freed.zero_()
            assert home.fetch([Rows(freed[1:3])], CPU).wait()[0].isnan().all()


def test_nothing_of_a_failed_step_reaches_the_next() -> None:
    """A step that ends early leaves rows on their way. The next sequence may get the same place in memory."""
    with late_streams():
        home = InHostMemory(LateMover(CPU), BLOCK)
        kept = home.room((BLOCK, 1, 4), torch.float32, CPU).zero_()
        arrival = home.fetch([Rows(kept)], CPU)
        home.look_ahead.put((id(kept), 1), 0, arrival)
        StateStore(home)
        assert home.look_ahead._ahead is None
        assert not arrival._rows[0].any()  # type: ignore[attr-defined]


# The stream of CUDA, as its documentation describes it.


class LateStream:
    """A stream that does nothing before another one waits for it, and then no more than it must."""

    def __init__(self, device: torch.device) -> None:
        self.queue: list[tuple[Any, tuple[Any, ...], list[weakref.ref[Tensor]]]] = []
        self.done = 0
        self.has_waited = False

    def wait_stream(self, other: ComputingStream) -> None:
        self.has_waited = True

    def wait_event(self, event: tuple[LateStream, int]) -> None:
        self.queue.append((event[0].run, (event[1],), []))

    def record_event(self) -> tuple[LateStream, int]:
        self.has_waited = False
        return self, len(self.queue)

    def run(self, stop: int) -> None:
        for operation, args, on_device in self.queue[self.done : stop]:
            assert all(tensor() is not None for tensor in on_device), "freed while its copy was under way"
            operation(*args)
        self.done = max(self.done, stop)


class ComputingStream:
    """The stream that computes, at once."""

    def wait_event(self, event: tuple[LateStream, int]) -> None:
        event[0].run(event[1])

    def wait_stream(self, other: LateStream) -> None:
        other.run(len(other.queue))


class Queueing(TorchDispatchMode):
    """Queues operations on a stream instead of running them."""

    arrivals: list[weakref.ref[Tensor]] = []  # noqa: RUF012

    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        assert func.name() in ("aten::copy_", "aten::zero_")
        assert self.stream.has_waited, "memory may still be in use by what is computed"
        places = {arg.untyped_storage().data_ptr() for arg in args if torch.is_tensor(arg)}
        self.arrivals[:] = [ref for ref in self.arrivals if ref() is not None]
        used = [ref for ref in self.arrivals if _address(ref) in places]
        self.stream.queue.append((func, tuple(map(_alias, args)), used))
        return args[0]


class LateMover(StreamingMover):
    """The mover of CUDA, with host memory that cannot be pinned here."""

    pins = False


def _alias(argument: Any) -> Any:
    """Return the same memory without a reference to the tensor."""
    if not torch.is_tensor(argument):
        return argument
    place = argument.untyped_storage(), argument.storage_offset(), argument.shape, argument.stride()
    return torch.empty(0, dtype=argument.dtype).set_(*place)


def _address(ref: weakref.ref[Tensor]) -> int:
    tensor = ref()
    return 0 if tensor is None else tensor.untyped_storage().data_ptr()


@contextmanager
def late_streams() -> Iterator[None]:
    """Let CUDA's streams be late ones. What is on its way is not a number until it has arrived."""
    empty = state_home._empty_like

    def not_a_number(rows: Sequence[Rows], device: torch.device) -> list[Tensor]:
        tensors = [tensor.fill_(torch.nan) for tensor in empty(rows, device)]
        Queueing.arrivals.extend(map(weakref.ref, tensors))
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", LateStream)
        patch.setattr(torch.cuda, "current_stream", lambda device: ComputingStream())
        patch.setattr(torch.cuda, "stream", Queueing)
        patch.setattr(state_home, "_empty_like", not_a_number)
        yield


# What is on the device.


class OnDeviceBytes(TorchDispatchMode):
    """Counts the living bytes of all tensors but those of the home's host memory."""

    def __init__(self, home: Home) -> None:
        super().__init__()
        self.home = home
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: Any) -> None:
        if storage._cdata in self.living and not self.living[storage._cdata][0].expired():
            return
        if isinstance(self.home, InHostMemory) and self.home.holds(storage):
            return
        self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.total += storage.nbytes()
        if self.total > self.peak:
            self.living = {key: each for key, each in self.living.items() if not each[0].expired()}
            self.total = sum(size for _, size in self.living.values())
        self.peak, self.largest = max(self.peak, self.total), max(self.largest, storage.nbytes())


class CountingMover(CopyingMover):
    """Counts the bytes of state that are on the device at once."""

    def __init__(self) -> None:
        self.there: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def to_device(self, rows: Sequence[Rows], device: torch.device) -> Any:
        arrival = super().to_device(rows, device)
        self.there += map(weakref.ref, arrival.wait())
        self.there = [ref for ref in self.there if ref() is not None]
        self.peak = max(self.peak, sum(ref().nbytes for ref in self.there))  # type: ignore[union-attr]
        return arrival


@pytest.mark.parametrize(("name", "many"), [("llama", 64), ("qwen3_5", 32)])
def test_the_past_is_never_whole_on_the_device(tiny_model: Callable[..., Any], name: str, many: int) -> None:
    """With many chunks there is as much on the device as with 16, and of state three blocks of one layer."""
    model, size, block = model_of(tiny_model, name), 8, 16
    shape = model_shape(model)
    (attention,) = shape.attention
    a_token = attention.kv_elements_per_token // attention.layers * 4  # keys and values of one layer
    kept: dict[tuple[str, int], OnDeviceBytes] = {}
    for place, chunks in (("device", 4), ("device", 16), ("host", 16), ("host", many)):
        mover = CountingMover()
        home = InHostMemory(mover, block) if place == "host" else OnDevice(block)
        with use_implementation(model, "chunkflow"), OnDeviceBytes(home) as counted:
            model.zero_grad(set_to_none=True)
            run(ChunkModel(model, CpuBackend()), home, (chunks * size,), 1, size)
        kept[place, chunks] = counted
        most = 3 * block * 2 * a_token  # keys and values, and float32 gradients
        assert mover.peak <= most + shape.recurrent.edge_bytes
    a_chunk = size * a_token
    assert kept["device", 16].peak - kept["device", 4].peak > 12 * 2 * a_chunk, "this test would not notice"
    assert kept["host", many].peak - kept["host", 16].peak < a_chunk
    assert kept["host", many].largest == kept["host", 16].largest
