"""Encoding of a whole source, in several processes if there is enough data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from queue import SimpleQueue

from chunkflow_cli.data.encoded_batch import EncodedBatch
from chunkflow_cli.data.encoding import Encoder
from chunkflow_cli.data.source import RowBatch, Source
from chunkflow_cli.errors import RunError
from chunkflow_cli.processes.environment import child_environment, cores, module_command

BYTES_PER_WORKER = 4_000_000
"""Bytes of data per worker process below which starting it is not worth the seconds that it takes."""


def encode_source(source: Source, encoder: Encoder, *, num_workers: int | None) -> Iterator[EncodedBatch]:
    """Yield all batches of a source, encoded, in order.

    Args:
        num_workers: maximum number of processes; None is one per core.

    Raises:
        RunError: a worker process was killed.
    """
    count = min(num_workers or cores(), 1 + source.nbytes // BYTES_PER_WORKER)
    if count == 1:
        yield from map(encoder.encode, source.batches())
        return
    workers = [_Worker(encoder) for _ in range(count)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(batch: RowBatch) -> EncodedBatch:
        worker = idle.get()
        try:
            return worker.encode(batch)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(count)
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in source.batches():
            pending.append(threads.submit(encode, batch))
            if len(pending) > 2 * count:  # enough to keep all workers busy; more would only fill memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        threads.shutdown()


class _Worker:
    """A process that runs `data.worker`, and the connection to it."""

    def __init__(self, encoder: Encoder) -> None:
        self._connection, theirs = Pipe()
        self._unsent: Encoder | None = encoder
        with theirs:
            self._process = subprocess.Popen(
                module_command("chunkflow_cli.data.worker", [str(theirs.fileno())]),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which ends its workers
                env={
                    **child_environment(),
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "TOKENIZERS_PARALLELISM": "false",  # the other workers use the other cores
                },
            )

    def encode(self, batch: RowBatch) -> EncodedBatch:
        try:
            if self._unsent is not None:
                self._connection.send(self._unsent)
                self._unsent = None
            self._connection.send(batch)
            answer: EncodedBatch | Exception = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RunError(
                f"a tokenizing process was killed (exit status {self._process.wait()}; out of memory?)\n"
                "  run fewer of them: data.num_workers=1"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
