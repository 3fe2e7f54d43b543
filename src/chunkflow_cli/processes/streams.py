"""Standard streams that accept any text, and without which a run can continue.

A run must outlive what reads its output: a pager that is closed, a lost connection, a full disk. Python raises an error
at the next write then, or at a character that the terminal's encoding lacks. `prepare` replaces `sys.stdout` and
`sys.stderr` by streams that handle both.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from chunkflow_cli.errors import RunError

PLAIN = {
    "…": "...", "–": "-", "·": ".", "×": "x", "─": "-", "━": "-", "│": "|", "┃": "|", "█": "#",
    "⟦": "[[", "⟧": "]]", "␣": "_", "⇥": "\\t", "↵": "\\n",
}  # fmt: skip
"""Replacements for our characters in an encoding that lacks them."""
STDIN, STDOUT, STDERR = 0, 1, 2
"""The numbers of the standard descriptors."""
_ERRORS = "chunkflow.plain"
"""The name under which `_plain` is registered."""


def prepare() -> None:
    """Make the standard streams of this process usable. Call it first in a process, before files are opened.

    - A closed descriptor is opened on /dev/null: otherwise the next file that is opened takes its number, and receives
      what native libraries print.
    - A character that the encoding of a stream lacks is written in other characters.
    - If stderr cannot be written, its output is dropped, or goes on in the log that `fall_back_to` names.
    - If stdout cannot be written, the process ends as other programs do. A run goes on, as for stderr.
    """
    codecs.register_error(_ERRORS, _plain)
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(STDIN, closefd=False)))
    sys.stdout = _text_stream(sys.stdout, STDOUT)
    sys.stderr = _text_stream(sys.stderr, STDERR)


def fall_back_to(log: Path) -> None:
    """From now on, write to this file, made if needed, what cannot be written to stdout or stderr."""
    for stream in (sys.stdout, sys.stderr):
        if (output := _output_of(stream)) is not None:
            output.fall_back_to(log)


class _Output(io.FileIO):
    """A standard descriptor, which is replaced by a file when it cannot be written."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._log: Path | None = None
        self._lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        while rest:  # a signal may cut a write
            try:
                written: int | None = super().write(rest)
            except OSError as error:
                self._lose(error)
            else:
                if written is None:
                    select.select([], [self], [])  # another program left the terminal in non-blocking mode
                rest = rest[written or 0 :]
        return memoryview(data).nbytes

    def fall_back_to(self, log: Path) -> None:
        self._log = log
        if self._lost is not None:
            self._open_log(log, self._lost)

    def _lose(self, error: OSError) -> None:
        is_first, self._lost = self._lost is None, error
        if self._log is not None and is_first:
            self._open_log(self._log, error)
            return
        self._replace_by(Path(os.devnull))
        if self.fileno() == STDOUT and self._log is None:
            if isinstance(error, BrokenPipeError):
                os._exit(128 + signal.SIGPIPE)  # as if that signal had ended it; Python ignores the signal
            raise RunError(f"stdout cannot be written: {error.strerror}; the output is incomplete")

    def _open_log(self, log: Path, error: OSError) -> None:
        name = "stdout" if self.fileno() == STDOUT else "stderr"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._replace_by(log)
            super().write(f"{name} cannot be written ({error.strerror}); it goes on in this file\n".encode())
        except OSError:
            self._replace_by(Path(os.devnull))  # the disk of the log is full, too
        else:
            if self.fileno() == STDOUT:
                print(f"warning: stdout cannot be written ({error.strerror}); it goes on in {log}", file=sys.stderr)

    def _replace_by(self, path: Path) -> None:
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.dup2(opened, self.fileno())  # the descriptor, so that native libraries and child processes follow
        os.close(opened)


def _output_of(stream: TextIO | None) -> _Output | None:
    buffer = getattr(stream, "buffer", None)
    output = getattr(buffer, "raw", buffer)
    return output if isinstance(output, _Output) else None


def _text_stream(old: TextIO | None, descriptor: int) -> TextIO:
    if old is not None:
        if _output_of(old) is not None:
            return old
        old.flush()
    output = _Output(descriptor)
    # A buffered stream cannot be written by a signal handler while it is being written, which a paused pager prolongs.
    buffer: Any = output if descriptor == STDERR else io.BufferedWriter(output)
    return io.TextIOWrapper(
        buffer,
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors=_ERRORS,
        line_buffering=descriptor == STDERR or os.isatty(descriptor) or getattr(old, "write_through", False),
        write_through=descriptor == STDERR,
    )


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace the first character that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not text: as it is
        return bytes([code - 0xDC00]), error.start + 1
    if character in PLAIN:
        plain = PLAIN[character]
    elif 0x2500 <= code < 0x2580:  # corners of boxes
        plain = "+"
    elif 0x2580 <= code < 0x25A0:  # parts of bars
        plain = "#" if code < 0x258D else ":"
    elif 0x2800 <= code < 0x2900:  # spinners
        plain = "*"
    else:
        plain = character.encode("ascii", "backslashreplace").decode()
    return plain, error.start + 1
