"""The entry point of a process that encodes batches for `parallel.encode_source`.

    python -P -m chunkflow_cli.data.worker FILE_DESCRIPTOR

reads a pickled `Encoder` from the inherited connection, then batches of rows. It answers each batch with the
`EncodedBatch`, or with the exception that encoding raised, and exits when the connection is closed or its parent ends.

The workers of `multiprocessing` would import the program's main file again: a program without `if __name__ ==
"__main__"` would restart itself in each of them, and one that is read from standard input could not be read twice. A
forked process is no alternative either: the threads of torch and of the tokenizer do not survive a fork.
"""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from chunkflow_cli.data.tokenizer import keep_torch_out
from chunkflow_cli.processes.worker import end_with_parent

if TYPE_CHECKING:
    from chunkflow_cli.data.encoded_batch import EncodedBatch
    from chunkflow_cli.data.encoding import Encoder
    from chunkflow_cli.data.source import RowBatch


def main() -> None:
    """Encode batches until the parent closes the connection."""
    end_with_parent()
    keep_torch_out()  # rendering a chat template imports transformers
    with Connection(int(sys.argv[1])) as connection:
        try:
            encoder: Encoder = connection.recv()
            while True:
                connection.send(_encode(encoder, connection.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent is done, or was killed


def _encode(encoder: Encoder, batch: RowBatch) -> EncodedBatch | Exception:
    try:
        return encoder.encode(batch)
    except Exception as error:  # raised again in the parent, which decides what it means
        error.add_note(traceback.format_exc())
        return error


if __name__ == "__main__":
    main()
