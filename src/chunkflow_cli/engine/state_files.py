"""The files of weights and optimizer states: the same whatever layout of processes wrote them, or reads them.

A parameter is a flat array of numbers here, named as in the whole Hugging Face model, and so is each state that the
optimizer keeps for it. A process writes the parts of these arrays that it holds, as they lie in its memory: nothing is
gathered, so saving takes no memory and no communication. A part may begin and end anywhere. Whoever reads asks for any
range of any array, and gets it from the files that hold it.

Each process writes `state-<rank>-<number>.safetensors`. A tensor in it is one part, and is called
`<kind>:<start>:<parameter>`, where the kind is `weight` (the float32 master weight) or the optimizer's word for its
state (`exp_avg`). The file's metadata name the shape and the numbers (`step`) of each parameter it has parts of.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chunkflow_cli.errors import RunError

WEIGHT = "weight"
MAX_FILE_BYTES = 1 << 30
"""Of the tensors in a file, which are in host memory together while it is written."""


@dataclass(frozen=True)
class Part:
    """A contiguous part of one parameter, flattened, and of its optimizer states."""

    parameter: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Of the part within the flattened parameter."""
    tensors: Mapping[str, Tensor]
    """(numbers,) each: the weight, and the optimizer's states by its names."""
    scalars: Mapping[str, float]
    """The optimizer's states that are one number for the whole parameter."""


def write_parts(folder: Path, rank: int, parts: Iterable[Part], *, optimizer: str) -> None:
    """Write the parts that this process holds, and see them onto the disk.

    Args:
        folder: exists; all processes write into it.
        rank: of this process, for the names of its files.
        parts: of several processes together they make up every parameter, each number once.
        optimizer: whose states they are.

    Raises:
        RunError: the disk is full, or cannot be written to.
    """
    file = _FileInMaking(folder, rank, optimizer)
    for part in parts:
        for kind, tensor in part.tensors.items():
            file.add(part, kind, tensor)
    file.write()


@dataclass
class _FileInMaking:
    folder: Path
    rank: int
    optimizer: str
    number: int = 0
    size: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)

    def add(self, part: Part, kind: str, tensor: Tensor) -> None:
        """Cut where a file would grow too large."""
        at_most = max(1, MAX_FILE_BYTES // tensor.element_size())
        for offset in range(0, tensor.numel(), at_most):
            piece = tensor.detach()[offset : offset + at_most]
            if self.tensors and self.size + piece.nbytes > MAX_FILE_BYTES:
                self.write()
            self.tensors[f"{kind}:{part.start + offset}:{part.parameter}"] = piece.cpu()
            self.described[part.parameter] = {"shape": list(part.shape), "scalars": dict(part.scalars)}
            self.size += piece.nbytes

    def write(self) -> None:
        if not self.tensors:
            return
        path = self.folder / f"state-{self.rank:05d}-{self.number:05d}.safetensors"
        metadata = {"optimizer": self.optimizer, "parameters": json.dumps(self.described)}
        try:
            save_file(self.tensors, path, metadata)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} could not be written: {error}") from error
        self.tensors, self.described, self.size, self.number = {}, {}, 0, self.number + 1


@dataclass(frozen=True)
class _Piece:
    start: int
    stop: int
    file: Path
    key: str


class StateFiles:
    """The parameters and optimizer states in a folder, whoever wrote them.

    Raises:
        RunError: a file is damaged, or the files together do not hold every number of every parameter once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.optimizer: str | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every parameter, by its name."""
        self.scalars: dict[str, dict[str, float]] = {}
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        self._files: dict[Path, Any] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            self._index(path)
        if not self.shapes:
            raise RunError(f"{folder} holds no weights and optimizer states")
        for (parameter, kind), pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            self._check_whole(parameter, kind, pieces)
        self._kinds: dict[str, list[str]] = defaultdict(list)
        for parameter, kind in self._pieces:
            self._kinds[parameter].append(kind)
        without = [parameter for parameter in self.shapes if WEIGHT not in self._kinds[parameter]]
        if without:
            raise RunError(f"{folder} is incomplete: it has no weight of {without[0]}")

    def states(self, parameter: str) -> list[str]:
        """What the optimizer keeps of a parameter for each of its numbers."""
        return sorted(kind for kind in self._kinds[parameter] if kind != WEIGHT)

    def read(self, parameter: str, kind: str, start: int, into: Tensor) -> None:
        """Fill `into` (numbers,) with those from `start` on."""
        stop = start + into.numel()
        for piece in self._pieces[parameter, kind]:
            begin, end = max(start, piece.start), min(stop, piece.stop)
            if begin < end:
                numbers = self._files[piece.file].get_slice(piece.key)[begin - piece.start : end - piece.start]
                into[begin - start : end - start].copy_(numbers)

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")  # mapped into memory: it costs no open file
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} is damaged: {error}") from error
        self._files[path] = file
        metadata = file.metadata()
        self.optimizer = metadata["optimizer"]
        for parameter, described in json.loads(metadata["parameters"]).items():
            self.shapes[parameter] = tuple(described["shape"])
            self.scalars[parameter] = described["scalars"]
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            kind, start, parameter = key.split(":", 2)
            (count,) = file.get_slice(key).get_shape()
            self._pieces[parameter, kind].append(_Piece(int(start), int(start) + count, path, key))

    def _check_whole(self, parameter: str, kind: str, pieces: list[_Piece]) -> None:
        reached = 0
        for piece in pieces:
            if piece.start != reached:
                break
            reached = piece.stop
        else:
            if reached == torch.Size(self.shapes[parameter]).numel():
                return
        raise RunError(
            f"{self.folder} is incomplete: of the {kind} of {parameter} it has {reached:,} numbers in a row, "
            f"of {torch.Size(self.shapes[parameter]).numel():,}"
        )
