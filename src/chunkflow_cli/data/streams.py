"""Decompressed streams over data files: plain, gzip or zstd."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

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
                stream = io.BufferedReader(_ZstdReader(raw), BUFFER_BYTES)
            case _:
                stream = io.BufferedReader(raw, BUFFER_BYTES)
        with stream:
            yield cast("BinaryIO", stream), raw


class _ZstdReader(io.RawIOBase):
    """A decompressed zstd file. Raises if the file is cut off, where `zstandard.open` silently ends."""

    def __init__(self, raw: io.FileIO) -> None:
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._inside_frame = False
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._text:
            if not self._compressed:
                self._compressed = self._raw.read(1 << 17)
                if not self._compressed:
                    if self._inside_frame:
                        raise EOFError("the file ends inside a zstd frame")
                    return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                self._text = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise OSError(str(error)) from error
            self._inside_frame = not self._frame.eof
            self._compressed = self._frame.unused_data
        count = min(len(target), len(self._text))
        target[:count] = self._text[:count]
        self._text = self._text[count:]
        return count
