"""Whole steps on a CUDA device that does not exist, with tensors that have shapes, data types and devices, but no numbers.

    LD_PRELOAD=fake_cuda.so python -m support.fake_cuda NAME:DTYPE:STATE:CHECKPOINTING ...

Every branch for CUDA is taken but the kernels themselves, and an operator that mixes devices is an error. For each step,
a line of JSON says which calls would have waited for the device.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.schema import ActivationCheckpointing, Attention
from chunkflow_cli.execution import state_home
from chunkflow_cli.execution.attention.choice import choose_backend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, random_sequences, use_implementation
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.activation_checkpointing import enable_activation_checkpointing
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.schedule import plan
from support.models import BEYOND, MODELS, RECURRENT, SHAPES, TINY, recurrent_model

CUDA, BLOCK = torch.device("cuda", 0), 20
LENGTHS, SIZE = (60, 9, 1, 17), 26
COUNTS = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::bincount", "aten::equal"}
"""Operators whose result, or its shape, the process must know."""
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Notes each call for which the process waits until the device has computed all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            self.found.append(f"item in {caller()}")
            return 1.0 if args[0].is_floating_point() else 1
        if func.name() in COUNTS:
            self.found.append(f"{func.name()} in {caller()}")
        if func in (aten._to_copy.default, aten.copy_.default):
            is_copy = func is aten.copy_.default
            source, target = (args[1], args[0].device) if is_copy else (args[0], kwargs.get("device") or args[0].device)
            is_late = kwargs.get("non_blocking") or (is_copy and len(args) > 2 and args[2])
            if source.device.type != torch.device(target).type and not is_late:
                self.found.append(f"copy in {caller()}")
        # Their functions for the meta device lack an argument, and know bfloat16 only; the kernels take these calls.
        if func is aten._efficient_attention_backward.default:
            return (*map(torch.empty_like, args[1:4]), args[0].new_empty(()))
        if func is aten._grouped_mm.default and args[0].dtype is torch.float32:
            (first, second), offsets = args[:2], kwargs["offs"] if "offs" in kwargs else args[2]
            groups = [len(offsets)] if first.ndim == second.ndim == 2 else []
            return first.new_empty(*groups, first.shape[-2], second.shape[-1])
        return func(*args, **kwargs)


def caller() -> str:
    frames = [f for f in traceback.extract_stack() if "chunkflow_cli" in f.filename or "transformers" in f.filename]
    return f"{os.path.basename(frames[-1].filename)} {frames[-1].name}" if frames else "torch"


def pretend() -> None:
    """Replace what torch's CPU build lacks of `torch.cuda`."""

    class Stream:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def wait_stream(self, other: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...
        def record_event(self) -> None: ...

    state = torch.zeros(16, dtype=torch.uint8)
    own: Any = SimpleNamespace(
        get_device_capability=lambda device=None: (9, 0), current_device=lambda: 0, Stream=Stream,
        current_stream=lambda device=None: Stream(), stream=lambda stream: stream,
        get_rng_state=lambda device=None: state, set_rng_state=lambda state, device=None: None,
    )  # fmt: skip
    for name, value in vars(own).items():
        setattr(torch.cuda, name, value)
    Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign,assignment,misc]
    state_home._spans = lambda tensors: []  # they have no addresses


def step(name: str, dtype: torch.dtype, state: str, checkpointing: str) -> list[str]:
    """Run a step; return what waits for the device."""
    known = {**MODELS, **BEYOND, **SHAPES}
    if name in RECURRENT:
        model = recurrent_model(name)
    else:
        model_type, settings = known[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **settings}))
    model.config.use_cache = False
    model.train().to(dtype)
    enable_activation_checkpointing(model, ActivationCheckpointing(checkpointing))
    mode, waits = FakeTensorMode(allow_non_fake_inputs=True), Waits()
    with mode, torch.no_grad():
        for module in model.modules():
            for own, tensor in [*module._parameters.items()]:
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    module._parameters[own] = torch.nn.Parameter(empty)
            for own, tensor in [*module._buffers.items()]:
                if tensor is not None:
                    module._buffers[own] = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
    backend = choose_backend(Attention.auto, model.config, CUDA, dtype).backend
    home: Any = state_home.OnDevice(BLOCK)
    if state == "host":
        home = state_home.host_home(CUDA, BLOCK)
        home._buffers.pinned = False
    chunks = build_chunks(LENGTHS, SIZE)
    batch = StepBatch(chunks, random_sequences(LENGTHS, 60), np.full(len(LENGTHS), 0.01))
    with use_implementation(model, "chunkflow"), mode, waits:
        runner = Runner(DirectEngine(ChunkModel(model, backend)), RunnerSettings(CUDA, state_home=home))
        runner.run((plan(chunks, 2),), batch)
    assert all(p.grad is not None and p.grad.device == CUDA for p in model.parameters() if p.requires_grad)
    return waits.found


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    pretend()
    for case in sys.argv[1:]:
        name, dtype, state, checkpointing = case.split(":")
        print(json.dumps([case, step(name, getattr(torch, dtype), state, checkpointing)]), flush=True)
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the device would end the process otherwise
