"""The elements of a JSON array, one after the other, without the whole of it in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

WINDOW_BYTES = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_scan = json.JSONDecoder().raw_decode


class JsonArrayError(ValueError):
    """An array that cannot be read to its end.

    Args:
        line: where, counted from 1.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def json_elements(stream: BinaryIO, *, largest: int) -> Iterator[bytes]:
    """Yield each element of the array in a stream as the JSON text that it is.

    Args:
        largest: most bytes of an element.

    Raises:
        JsonArrayError: the stream holds anything but one array, or a larger element.
    """
    window = _Window(stream, largest)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        yield window.element()
        while window.peek() == ",":
            window.take(",")
            yield window.element()
        window.take("]")
    if window.peek():
        raise window.error(window.at, "something follows the array")


class _Window:
    """The part of the text that is in memory. Bytes that are not UTF-8 stay what they are."""

    def __init__(self, stream: BinaryIO, largest: int) -> None:
        self._stream, self._largest = stream, largest
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._line, self._is_start = "", 1, True
        self.at = 0

    def error(self, position: int, reason: str) -> JsonArrayError:
        return JsonArrayError(self._line + self._text.count("\n", 0, position), reason)

    def peek(self) -> str:
        """Return the next character that is not blank, without taking it; "" at the end."""
        while True:
            blank = _BLANK.match(self._text, self.at)
            assert blank is not None
            self.at = blank.end()
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._grow():
                return ""

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self.error(self.at, f"{expected!r} is missing" if self.at < len(self._text) else "it is cut off")
        self.at += 1

    def element(self) -> bytes:
        is_number = self.peek() in "-0123456789"  # may go on where the window ends
        while True:
            try:
                _, end = _scan(self._text, self.at)
            except json.JSONDecodeError as error:
                # An error at the window's end, or a string without an end, may only need the text that follows.
                may_go_on = error.pos >= len(self._text) - 10 or error.msg.startswith("Unterminated string")
                if not (may_go_on and self._grow()):
                    raise self.error(error.pos, error.msg) from error
            except RecursionError as error:
                raise self.error(self.at, "nested too deeply") from error
            else:
                # Of `0.5`, the window may end after `0` or after `0.`, both of which begin with a number.
                is_cut = is_number and not self._text[end:].strip("0123456789.eE+-")
                if not (is_cut and self._grow()):
                    break
            if len(self._text) - self.at > self._largest:
                raise self.error(self.at, f"an element of more than {self._largest >> 20} MiB")
        element = self._text[self.at : end].encode("utf-8", "surrogateescape")
        self.at = end
        return element

    def _grow(self) -> bool:
        """Read as much as is left of the window, at least; False at the end of the stream."""
        self._line += self._text.count("\n", 0, self.at)
        rest = self._text[self.at :]
        block = self._stream.read(max(WINDOW_BYTES, len(rest)))
        if self._is_start:
            block, self._is_start = block.removeprefix(codecs.BOM_UTF8), False
        self._text, self.at = rest + self._decoder.decode(block, final=not block), 0
        return bool(block)
