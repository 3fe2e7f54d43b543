"""Decompressed streams over data files: plain, gzip or zstd."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from chunkflow_cli.errors import UsageError

BUFFER_BYTES = 1 << 20


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Raise errors of reading `path` within the block as a `UsageError` that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}\n  is it complete? download or write it again") from error


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, io.FileIO]]:
    """Yield the decompressed bytes, and the file itself, whose position says how far reading got."""
    with path.open("rb", buffering=0) as raw:
        stream: io.BufferedReader | gzip.GzipFile
        match path.suffix.lower():
            case ".gz":
                stream = gzip.GzipFile(fileobj=io.BufferedReader(raw, BUFFER_BYTES))
            case ".zst":
                from pyarrow import input_stream  # raises if the file is cut off, where `zstandard.open` silently ends

                stream = io.BufferedReader(input_stream(raw, compression="zstd"), BUFFER_BYTES)
            case _:
                stream = io.BufferedReader(raw, BUFFER_BYTES)
        with stream:
            yield cast("BinaryIO", stream), raw
