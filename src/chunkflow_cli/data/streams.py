"""Decompressed streams over data files: plain, gzip, zstd, bzip2 or xz; and a hash of the bytes that were read."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from chunkflow_cli.data.names import printable
from chunkflow_cli.errors import UsageError
from chunkflow_cli.files import bytes_moved

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER_BYTES = 1 << 20
XZ_MEMORY = 1 << 29
"""Most memory to decompress with, in bytes; `xz -9` needs 65 MiB."""


class HashedFile(io.FileIO):
    """A file that is read from its start to its end, and the hash of what was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._digest = hashlib.blake2b(digest_size=20)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into a buffer, and hash what was read."""
        count = super().readinto(buffer)
        assert count is not None  # a data file never blocks
        self._digest.update(memoryview(buffer)[:count])
        bytes_moved()
        return count

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes; the rest of the file without a size."""
        if size is None or size < 0:
            return self.readall()
        block = bytearray(size)
        return bytes(memoryview(block)[: self.readinto(block)])

    def readall(self) -> bytes:
        """Return the rest of the file."""
        blocks = []
        while block := self.read(BUFFER_BYTES):
            blocks.append(block)
        return b"".join(blocks)

    def finish(self) -> str:
        """Return the hash of the whole file: of what was read, and of what no reader asked for."""
        buffer = bytearray(BUFFER_BYTES)
        while self.readinto(buffer):
            pass
        return self._digest.hexdigest()


class _XzStream(io.RawIOBase):
    """The content of an xz file. `lzma.open` ignores what follows a stream's end, even a damaged second stream."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw, self._stream = raw, lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view, data = memoryview(buffer), b""
        while not data:
            more = b""
            if self._stream.eof:
                more = self._stream.unused_data.lstrip(b"\0")  # zeros are padding
                while not more and (block := self._raw.read(BUFFER_BYTES)):
                    more = block.lstrip(b"\0")
                if not more:
                    return 0
                self._stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            elif self._stream.needs_input and not (more := self._raw.read(BUFFER_BYTES)):
                raise EOFError("it ends before its end-of-stream marker")
            data = self._stream.decompress(more, len(view))
        view[: len(data)] = data
        return len(data)


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Raise errors of reading `path` within the block as a `UsageError` that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(
            f"{printable(path)} cannot be read: {reason}\n  is it complete? download or write it again"
        ) from error


@contextmanager
def open_stream(path: Path, *, is_hashed: bool = False) -> Iterator[tuple[BinaryIO, io.FileIO]]:
    """Yield the decompressed bytes, and the file itself, whose position says how far reading got.

    Args:
        is_hashed: the file is a `HashedFile`.
    """
    with HashedFile(path) if is_hashed else io.FileIO(path) as raw:
        stream: io.BufferedIOBase
        match path.suffix.lower():
            case ".gz":
                stream = gzip.GzipFile(fileobj=io.BufferedReader(raw, BUFFER_BYTES))
            case ".zst" | ".bz2" as suffix:
                # pyarrow raises if the file is cut off, where `zstandard.open` silently ends, and if anything follows
                # the end, which `bz2.open` ignores.
                from pyarrow import input_stream

                codec = {".zst": "zstd", ".bz2": "bz2"}[suffix]
                stream = io.BufferedReader(input_stream(raw, compression=codec), BUFFER_BYTES)
            case ".xz":
                stream = io.BufferedReader(_XzStream(raw), BUFFER_BYTES)
            case _:
                stream = io.BufferedReader(raw, BUFFER_BYTES)
        with stream:
            yield cast("BinaryIO", stream), raw
