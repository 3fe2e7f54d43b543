"""Weights that the ranks of a node share in memory, although loading has changed them.

A weight that is taken from its file as it is stays mapped, so all ranks of a node share its pages. One that is
converted (another data type, experts that are stacked, quantized files) is memory of the rank alone. Then one rank
loads the model and writes the weights as they have become to a nameless file, and all ranks map that one. What is
mapped can be written to: the pages that a rank changes become its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.console import human_bytes
from chunkflow_cli.files import moving
from chunkflow_cli.processes.notices import warn_once

ALIGNMENT = 64
"""Bytes at whose multiples tensors begin."""
OWN_SHARE = 0.05
"""Share of the weights that each rank may hold on its own; sharing it is not worth a file."""


@dataclass(frozen=True)
class SharedWeights:
    """A file with the weights of a model, as other ranks of the node can open it."""

    path: str
    bytes: int
    tensors: dict[str, tuple[int, tuple[int, ...], torch.dtype]]
    """Name in the model's state dict -> its first byte, shape and data type."""
    descriptor: int
    """Of the rank that wrote the file, open until all ranks have mapped it."""

    def map(self) -> dict[str, Tensor]:
        """Return the tensors in pages that other ranks share until they are written to.

        They are no views of one tensor to autograd (`.data`): a write to one, such as peft's at adapted experts, would
        otherwise count as a change of all of them, whose gradients it then refuses.
        """
        mapped = torch.from_file(self.path, shared=False, size=self.bytes, dtype=torch.uint8)
        return {
            name: mapped[start : start + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape).data
            for name, (start, shape, dtype) in self.tensors.items()
        }


def own_bytes(model: Any) -> int:
    """Return the bytes of the parameters that are not mapped from a file."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        if inode != "0":
            spans.append(tuple(int(end, 16) for end in span.split("-")))
    return sum(
        weight.nbytes
        for weight in model.parameters()
        if not any(start <= weight.data_ptr() < stop for start, stop in spans)
    )


def share(model: Any) -> SharedWeights | None:
    """Move the weights of a loaded model to a file that other ranks can map; None if they share their pages already.

    The file has no name: it is gone when its descriptor is closed and nothing maps it. It is in the folder for
    temporary files (TMPDIR). Without room there, it is not made, which is said once.
    """
    total = sum(weight.nbytes for weight in model.parameters())
    if own_bytes(model) <= OWN_SHARE * total:
        return None
    folder = tempfile.gettempdir()
    if shutil.disk_usage(folder).free < 1.05 * total:
        warn_once(
            f"each rank loads {human_bytes(total)} of its own: {folder} has no room for a file that they could share "
            "(TMPDIR names another folder)"
        )
        return None
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    places: dict[int, tuple[int, tuple[int, ...], torch.dtype]] = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        for tensor in moving(state.values()):
            if id(tensor) in places:  # tied
                continue
            file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            places[id(tensor)] = file.tell(), tuple(tensor.shape), tensor.dtype
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        descriptor = os.dup(file.fileno())
        shared = SharedWeights(
            f"/proc/{os.getpid()}/fd/{descriptor}", file.tell(), {name: places[id(state[name])] for name in state},
            descriptor,
        )  # fmt: skip
    mapped = shared.map()
    for name, tensor in state.items():
        tensor.data = mapped[name]
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed: a third of stacked experts
        libc.malloc_trim(0)
    return shared
