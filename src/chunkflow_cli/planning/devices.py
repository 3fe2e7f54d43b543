"""Speeds and memory of devices, from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class DeviceProfile:
    """A device as its data sheet describes it. Bandwidths count one direction."""

    name: str
    matmul_flops: float
    """Dense bfloat16 operations per second."""
    memory_bytes: int
    matmul_efficiency: float = 0.6
    """Share of `matmul_flops` that linear layers reach at a few thousand tokens; assumed, not measured."""
    attention_efficiency: float = 0.45
    """Share of `matmul_flops` that fused attention reaches; assumed, not measured."""
    layer_launch_seconds: float = 60e-6
    """Least seconds of a layer's forward, even with few tokens: about fifteen kernel launches."""
    scan_efficiency: float = 0.2
    """Share of `matmul_flops` that scans of recurrent layers reach with their kernels; assumed, not measured."""
    memory_bytes_per_second: float = 2e12
    link_bytes_per_second: float = 25e9
    """Bandwidth to a device of another node: this device's share of the network, because pipelines may span nodes."""
    link_latency_seconds: float = 20e-6
    node_bytes_per_second: float = 50e9
    """Bandwidth to a device of the same node: half of NVLink's rate in the data sheet, which counts both directions.
    It sets the cost of exchanges within a sequence-parallel group."""
    host_bytes_per_second: float = 25e9
    """Bandwidth to the host's memory: PCIe 4, or half of PCIe 5."""
    devices_of_node: int = 8
    """Devices that `node_bytes_per_second` connects."""
    multiprocessors: int = 132
    """Of Hopper's GPUs, where the device is not known."""
    host_memory_bytes: int | None = None
    """Memory of the node that the device is in, where it is known."""


DEVICES = {
    # From the makers' data sheets; memory as the driver reports it.
    "a100": DeviceProfile(
        "A100 80GB", 312e12, int(79.1 * GIB), memory_bytes_per_second=2.0e12, node_bytes_per_second=300e9,
        multiprocessors=108,
    ),
    "h100": DeviceProfile(
        "H100 SXM", 989e12, int(79.2 * GIB), memory_bytes_per_second=3.35e12, link_bytes_per_second=50e9,
        node_bytes_per_second=450e9,
    ),
    "h200": DeviceProfile(
        "H200", 989e12, int(139.8 * GIB), memory_bytes_per_second=4.8e12, link_bytes_per_second=50e9,
        node_bytes_per_second=450e9,
    ),
    "b200": DeviceProfile(
        "B200", 2250e12, int(179.0 * GIB), memory_bytes_per_second=8e12, link_bytes_per_second=50e9,
        node_bytes_per_second=900e9, multiprocessors=148,
    ),
    # Two cores with AVX-512, measured with float32 products (benchmarks/LOG.md): bfloat16 models use them there too.
    # Scans run in torch: 5 to 6 GFLOP/s per core, measured on layers of Qwen3.5 and Granite 4.
    "cpu": DeviceProfile(
        "CPU, two cores", 300e9, 16 * GIB, 0.7, 0.35, 200e-6, scan_efficiency=0.04, memory_bytes_per_second=10e9,
        node_bytes_per_second=2e9,
    ),
}  # fmt: skip
