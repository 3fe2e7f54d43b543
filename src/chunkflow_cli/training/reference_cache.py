"""Log-probabilities of a reference model, kept in files with a checksum: nothing else would show a damaged number."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def read_kept(path: Path) -> NDArray[np.float64] | None:
    """Return the kept values; None if there are none, or not those that were written."""
    try:
        content = path.read_bytes()
        if content[:DIGEST_BYTES] != _digest(content[DIGEST_BYTES:]):
            return None
        values: NDArray[np.float64] = np.load(io.BytesIO(content[DIGEST_BYTES:]), allow_pickle=False)
        return values
    except (OSError, ValueError, EOFError):
        return None


def write_kept(path: Path, values: NDArray[np.float64]) -> None:
    """Keep the values for other runs; without room for them, this run has them all the same."""
    temporary, array = path.with_name(f".{path.name}-{os.getpid()}"), io.BytesIO()
    np.save(array, values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(_digest(array.getvalue()) + array.getvalue())
        temporary.replace(path)
    except OSError as error:
        print(
            f"warning: {path} could not be written: {error.strerror}; the next run computes it again", file=sys.stderr
        )
