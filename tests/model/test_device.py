"""The device of a process, and what `plan` takes it to be: GPUs by what torch says of them."""

from __future__ import annotations

import types

import pytest
import torch

from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.device import present_device, training_device
from chunkflow_cli.planning.devices import DEVICES


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Two GPUs; `name` is theirs, `set` the numbers that were made current."""
    state = types.SimpleNamespace(name="NVIDIA H200", set=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", state.set.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.set[-1] if state.set else 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: state.name)
    properties = types.SimpleNamespace(total_memory=40 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return state


def test_a_rank_takes_the_gpu_of_its_number(gpus: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (training_device(), gpus.set) == (torch.device("cuda", 1), [1])
    monkeypatch.setenv("LOCAL_RANK", "2")  # as when SLURM shows each task one GPU only
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(UsageError, match=r"LOCAL_RANK=2, but this process sees 2 GPUs \(CUDA_VISIBLE_DEVICES=2,3\)"):
        training_device()


@pytest.mark.parametrize(
    ("name", "sheet", "flops"),
    [
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H100 PCIe", None, 756e12),
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
        ("NVIDIA T4", None, None),
    ],
)
def test_profiles_of_gpus(gpus: types.SimpleNamespace, name: str, sheet: str | None, flops: float | None) -> None:
    """The data sheet of the name, but the memory that is there; a part of a GPU is as fast as an unknown one."""
    gpus.name = name
    device = present_device()
    assert device.memory_bytes == 40 * 2**30
    assert device.matmul_flops == (flops or 100e12)
    assert device.name == (name if flops else f"{name} (speed unknown, taken as 100 TFLOP/s)")
    links = DEVICES[sheet].node_bytes_per_second if sheet else 50e9
    assert device.node_bytes_per_second == links
