"""The files of weights and optimizer states: the same whatever layout of processes writes or reads them.

A parameter is a flat array of numbers here, named as in the whole Hugging Face model, and so is each state that the
optimizer keeps for it. A process writes the parts of these arrays that it holds, as they are in its memory. Nothing is
gathered, so saving takes no extra memory and no communication. A part may begin and end anywhere. A reader asks for any
range of any array, and gets it from the files that hold it.

Each process writes `state-<rank>-<number>.safetensors`. A tensor in it is one part, and is called
`<kind>:<start>:<parameter>`, where the kind is `weight` (the float32 master weight) or the optimizer's name for its
state (`exp_avg`). The file's metadata hold the shape and the scalar states (`step`) of each parameter in the file, and
the shapes of states that are not a number for each number of the parameter (the row factors of Adafactor).
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chunkflow_cli.errors import RunError
from chunkflow_cli.files import moving

WEIGHT = "weight"
"""The kind of a master weight."""
MAX_FILE_BYTES = 1 << 30
"""Bytes of tensors in a file at most. They are in host memory together while it is written."""


@dataclass(frozen=True)
class Part:
    """A contiguous part of one parameter, flattened, and of its optimizer states."""

    parameter: str
    """Name in the whole Hugging Face model."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """Index of the part's first number in the flattened parameter."""
    tensors: Mapping[str, Tensor]
    """Kind -> (numbers,): the weight, and the optimizer's states by its names."""
    scalars: Mapping[str, float]
    """The optimizer's states that are one number for the whole parameter."""
    state_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Kind -> shape of a state that is whole here, and may have another number of numbers than the parameter."""


def write_parts(folder: Path, rank: int, parts: Iterable[Part], *, optimizer: str) -> None:
    """Write the parts that this process holds, and wait until they are on the disk.

    All processes write into the same folder. Their parts together hold every number of every parameter once, and the
    states of the optimizer that `optimizer` names.

    Raises:
        RunError: the disk is full, or cannot be written to.
    """
    for number, pieces in enumerate(moving(_pieces_of_files(parts))):
        path = folder / f"state-{rank:05d}-{number:05d}.safetensors"
        tensors = {f"{kind}:{start}:{part.parameter}": numbers.cpu() for part, kind, start, numbers in pieces}
        described: dict[str, dict[str, Any]] = {}
        for part, *_ in pieces:
            of_part = described.setdefault(part.parameter, {"shape": part.shape, "scalars": {}, "state_shapes": {}})
            of_part["scalars"] |= part.scalars
            of_part["state_shapes"] |= part.state_shapes
        try:
            save_file(tensors, path, {"optimizer": optimizer, "parameters": json.dumps(described)})
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} could not be written: {error}") from error


def _pieces_of_files(parts: Iterable[Part]) -> Iterator[list[tuple[Part, str, int, Tensor]]]:
    """Yield what each file holds: part, kind, start and numbers. A tensor larger than a file is cut."""
    pieces: list[tuple[Part, str, int, Tensor]] = []
    size = 0
    for part in parts:
        for kind, tensor in part.tensors.items():
            start = part.start
            for numbers in tensor.detach().split(max(1, MAX_FILE_BYTES // tensor.element_size())):
                if pieces and size + numbers.nbytes > MAX_FILE_BYTES:
                    yield pieces
                    pieces, size = [], 0
                pieces.append((part, kind, start, numbers))
                start += len(numbers)
                size += numbers.nbytes
    if pieces:
        yield pieces


@dataclass(frozen=True)
class _Piece:
    """A range of one array, and the tensor that holds it."""

    start: int
    stop: int
    file: Path
    key: str


class StateFiles:
    """The parameters and optimizer states in a folder, whatever layout wrote them.

    Raises:
        RunError: a file is damaged, or the files together do not hold every number of every parameter once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.optimizer: str | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Parameter -> its shape."""
        self.scalars: dict[str, dict[str, float]] = {}
        """Parameter -> the optimizer's states that are one number for all of it."""
        self.state_shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        """Parameter -> kind -> shape of a state that is not a number for each of its numbers."""
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
        """Return the kinds of states that the optimizer keeps for each number of a parameter."""
        return sorted(kind for kind in self._kinds[parameter] if kind != WEIGHT)

    def read(self, parameter: str, kind: str, start: int, into: Tensor) -> None:
        """Fill `into` (numbers,) with the numbers of a flattened parameter, or of a state of it, from `start` on."""
        stop = start + into.numel()
        for piece in self._pieces[parameter, kind]:
            begin, end = max(start, piece.start), min(stop, piece.stop)
            if begin < end:
                numbers = self._files[piece.file].get_slice(piece.key)[begin - piece.start : end - piece.start]
                into[begin - start : end - start].copy_(numbers)

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")  # memory-mapped: keeps no file open
            metadata = file.metadata()
            optimizer, parameters = metadata["optimizer"], json.loads(metadata["parameters"])
            for parameter, described in parameters.items():
                self.shapes[parameter] = tuple(described["shape"])
                self.scalars.setdefault(parameter, {}).update(described["scalars"])
                shapes = {kind: tuple(shape) for kind, shape in described.get("state_shapes", {}).items()}
                self.state_shapes.setdefault(parameter, {}).update(shapes)
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, start, parameter = key.split(":", 2)
                (count,) = file.get_slice(key).get_shape()
                self._pieces[parameter, kind].append(_Piece(int(start), int(start) + count, path, key))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path} is damaged, or not a file of a checkpoint: {error}") from error
        self._files[path] = file
        self.optimizer = optimizer

    def _check_whole(self, parameter: str, kind: str, pieces: list[_Piece]) -> None:
        if parameter not in self.shapes:
            raise RunError(f"{pieces[0].file} is damaged: it holds the {kind} of {parameter}, and not its shape")
        numbers, reached = math.prod(self.state_shapes[parameter].get(kind, self.shapes[parameter])), 0
        for piece in pieces:
            if piece.start != reached:
                break
            reached = piece.stop
        else:
            if reached == numbers:
                return
        raise RunError(
            f"{self.folder} is incomplete: it has {reached:,} numbers in a row of the {kind} of {parameter}, "
            f"which has {numbers:,}"
        )
