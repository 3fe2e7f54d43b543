"""Find the folder and the data of a run, for a single process, our worker, or a rank of another launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.engine import all_or_none, broadcast_from_first, init_process_group
from chunkflow_cli.errors import ChunkflowError, UsageError
from chunkflow_cli.model.device import training_device
from chunkflow_cli.processes.environment import FOUND_DATA, local_rank, processes, rank, worker_folder
from chunkflow_cli.processes.hang_watch import watched_together
from chunkflow_cli.processes.heartbeat import Heartbeat
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.processes.worker import heartbeat, redirect_output
from chunkflow_cli.training.identity import identify
from chunkflow_cli.training.inputs import FoundData, RunData, load_run_data
from chunkflow_cli.training.run_folder import RunFolder, open_run_folder, shared_run_folder


def open_folder(
    loaded: LoadedConfig, hf_config: Any | None, keys: Sequence[str] = ()
) -> tuple[RunFolder, RunData | FoundData]:
    """Open and lock the folder of the run once for all ranks, and read its data on the process that does so.

    Our launcher has opened the folder for its workers, and tells them in their environment where the data is in the
    token cache. If torchrun or deepspeed started the ranks, rank 0 does both, and tells the others.

    Args:
        keys: `FoundData.keys`, if this process has read the data before.

    Returns:
        The folder, and the data; on the other ranks, where it has been found.

    Raises:
        UsageError: the data or the folder is wrong; on all ranks.
        RunError: the checkpoint to continue from is damaged; on all ranks.
    """
    resume = loaded.config.checkpoint.resume
    if (given := worker_folder()) is not None:
        return shared_run_folder(given, resume), FoundData.parse(os.environ[FOUND_DATA])
    if processes() == 1:
        return read_and_open(loaded, hf_config, keys)
    init_process_group(training_device())
    opened: tuple[RunFolder, RunData] | None = None
    answer: tuple[Path, FoundData] | ChunkflowError | None = None
    if rank() == 0:
        try:
            opened = read_and_open(loaded, hf_config)
            folder, data = opened
            answer = folder.path, FoundData.of(data)
            WatchFolder(folder.path).prepare()
        except ChunkflowError as error:
            answer = error
    answer = broadcast_from_first(answer)
    if isinstance(answer, ChunkflowError):
        raise answer
    if opened is not None:
        return opened
    assert answer is not None
    path, found = answer
    return shared_run_folder(path, resume), found


def read_and_open(loaded: LoadedConfig, hf_config: Any | None, keys: Sequence[str] = ()) -> tuple[RunFolder, RunData]:
    """Read the data of a run, and open its folder. One process of the run calls it.

    Raises:
        UsageError: as `load_run_data` and `open_run_folder`.
        RunError: as `open_run_folder`.
    """
    data = load_run_data(loaded.config, hf_config, keys)
    identity = identify(loaded.config, data)
    return open_run_folder(loaded, identity), data


@contextmanager
def watched(run_folder: Path, hang_seconds: float) -> Iterator[Heartbeat]:
    """Yield the heartbeat of this rank. Within the block, our launcher or the ranks themselves notice a hang.

    Without our launcher, the output of every rank but the first goes to its log from here on.
    """
    own = heartbeat(run_folder)
    if worker_folder() is not None or processes() == 1:
        yield own
        return
    watch = WatchFolder(run_folder)
    if rank():
        redirect_output(watch.log(rank()), keep_stderr=False)
    with watched_together(watch, rank(), processes(), hang_seconds):
        yield own


def load_data(config: Config, hf_config: Any | None, data: RunData | FoundData) -> RunData:
    """Return the data on every rank, without reading and hashing it on each. Every process of the run calls it.

    A node that sees the token cache of the process that has found the data maps the same files. On a node with a cache
    of its own, the first rank reads, hashes and if necessary tokenizes the data, and the others wait.

    Args:
        data: as `open_folder` returns it.

    Raises:
        UsageError: the data cannot be read on a node, or is not the same there; on all ranks.
    """
    own = data if isinstance(data, RunData) else None
    with all_or_none("reading the data"):
        if isinstance(data, FoundData) and local_rank() == 0 and not data.is_seen_by(config):
            own = _same(load_run_data(config, hf_config), data)
    with all_or_none("reading the data"):
        if isinstance(data, FoundData) and own is None:
            own = _same(load_run_data(config, hf_config, data.keys), data)
    assert own is not None
    return own


def _same(own: RunData, found: FoundData) -> RunData:
    if FoundData.of(own).keys != found.keys:
        raise UsageError(
            f"{', '.join(whole.named for whole in own.read.wholes)}: "
            "its rows, or the tokenizer, are on this node not those of the first one\n"
            "  give all nodes the same files, or a file system that they share"
        )
    return own
