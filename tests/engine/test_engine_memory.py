"""The bytes that DeepSpeed keeps on a device and on its host, counted on its own path, against `plan`'s formulas."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from chunkflow_cli.config.schema import Dtype, EngineConfig, Offload, OptimConfig
from chunkflow_cli.engine import Engine, EngineSettings, close_process_group, data_parallel
from chunkflow_cli.execution import loss
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.cpu import CpuBackend
from chunkflow_cli.execution.chunk_model import ChunkModel
from chunkflow_cli.execution.parity import DirectEngine, random_sequences
from chunkflow_cli.execution.runner import Runner
from chunkflow_cli.execution.step import RunnerSettings, StepBatch
from chunkflow_cli.model.shape import model_shape
from chunkflow_cli.planning.chunks import build_chunks
from chunkflow_cli.planning.memory_parts import memory_parts
from chunkflow_cli.planning.memory_settings import Buffers, MemorySettings
from chunkflow_cli.planning.schedule import plan
from support.two_memories import DEVICE, HOST, TwoMemories, as_accelerator

BUFFERS = Buffers(reduce=40_000, gathered=250_000, sub_group=500_000)
"""As DeepSpeed's own, divided by a thousand or so: the model here has a thousandth of the weights of a real one."""
LENGTH, SIZE = 96, 48


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A process group whose collectives do nothing, of which this process is rank 0."""

    def open_group(ranks: int) -> None:
        torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())

    close_process_group()
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield open_group
    close_process_group()


def engine_config(stage: int, offload: str) -> EngineConfig:
    zero: dict[str, Any] = {"reduce_bucket_size": BUFFERS.reduce}
    if stage == 3:
        zero |= {"stage3_max_live_parameters": BUFFERS.gathered, "stage3_max_reuse_distance": BUFFERS.gathered,
                 "stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 200,
                 "sub_group_size": BUFFERS.sub_group}  # fmt: skip
    return EngineConfig(zero_stage=stage, offload=Offload(offload), deepspeed={"zero_optimization": zero})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stage", "offload", "dtype", "ranks"),
    [
        (1, "none", "bfloat16", 4),
        (1, "optimizer", "bfloat16", 1),
        (1, "optimizer", "bfloat16", 4),
        (3, "none", "bfloat16", 4),
        (3, "none, together", "bfloat16", 4),
        (3, "optimizer", "bfloat16", 1),
        (3, "parameters", "bfloat16", 1),
        (0, "none", "float32", 1),
        (2, "none", "float32", 4),
        (2, "optimizer", "float32", 1),
        (3, "parameters", "float32", 4),
    ],
)
def test_counted_on_deepspeeds_own_path(
    stage: int, offload: str, dtype: str, ranks: int,
    process_group: Callable[[int], None], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two steps of a sample of two chunks, in the second of which the optimizer has its states."""
    offload, _, together = offload.partition(", ")
    process_group(ranks)
    memories = TwoMemories()
    as_accelerator(memories, monkeypatch)
    monkeypatch.setattr(data_parallel, "check_settings", lambda settings: None)  # it refuses offload without a GPU
    monkeypatch.setattr(loss, "matrix_dtype", lambda tensor: tensor.dtype)  # a GPU multiplies in bfloat16
    attention.register()
    model = tiny_model(
        "llama", dtype=getattr(torch, dtype), hidden_size=128, intermediate_size=344, num_hidden_layers=5
    )
    shape = model_shape(model)
    gathered = {name: each for name, each in model.named_modules() if together and name.endswith(".mlp")}
    if together:
        mlp = next(iter(gathered.values()))
        shape = replace(shape, gathered_together=sum(weight.numel() for weight in mlp.parameters()))
    model.set_attn_implementation(attention.NAME)
    chunks = build_chunks([LENGTH], SIZE)
    batch = StepBatch(chunks, random_sequences([LENGTH], 96, seed=1), np.full(1, 1 / LENGTH))
    expected_norm = norm_without_engine(copy.deepcopy(model), batch)
    with memories.counting():
        module = ChunkModel(model, CpuBackend())
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = tensor.data.to(DEVICE)
        config = engine_config(stage, offload)
        of_engine = EngineSettings(config, OptimConfig(), Dtype(dtype), DEVICE, gathered_modules=frozenset(gathered))
        engine = Engine(module, of_engine)
        runner = Runner(engine, RunnerSettings(DEVICE, weight_dtype=torch.float32))
        norms = []
        for _ in range(2):
            memories.most.clear()
            runner.run((plan(chunks, 1),), batch)
            norms.append(engine.step())
    settings = MemorySettings(getattr(torch, dtype).itemsize, 2, stage, ranks, offload, "none", SIZE, "cpu", BUFFERS)
    parts = memory_parts(shape, settings, live=SIZE, stored=SIZE)
    most = memories.most[DEVICE]  # the gradients of a module come together when its activations are gone
    assert parts.device_total == pytest.approx(most, rel=0.1) or (together and most < parts.device_total < 1.15 * most)
    assert parts.host == pytest.approx(memories.most[HOST], rel=0.1, abs=4096)
    if ranks == 1:  # collectives that do nothing add nothing
        assert norms[0] == pytest.approx(expected_norm, rel=0.01), "gradients of all chunks are summed"
    del engine, runner, module
    gc.collect()


def norm_without_engine(model: Any, batch: StepBatch) -> float:
    module = ChunkModel(model, CpuBackend())
    Runner(DirectEngine(module), RunnerSettings(torch.device("cpu"), weight_dtype=torch.float32)).run(
        (plan(batch.chunks, 1),), batch
    )
    return float(torch.nn.utils.get_total_norm([p.grad.float() for p in module.parameters()]))
