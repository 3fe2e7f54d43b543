"""How a rank finds the folder and the data of its run: on its own, as our worker, or started by another launcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.data.cache import cache_root
from chunkflow_cli.engine import broadcast_from_first, init_process_group
from chunkflow_cli.errors import ChunkflowError
from chunkflow_cli.files import one_at_a_time, to_be_writable
from chunkflow_cli.model.device import training_device
from chunkflow_cli.processes.environment import processes, rank, worker_folder
from chunkflow_cli.processes.hang_watch import watched_together
from chunkflow_cli.processes.heartbeat import Heartbeat
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.processes.worker import heartbeat, redirect_output
from chunkflow_cli.training.identity import identify
from chunkflow_cli.training.inputs import RunData, load_run_data
from chunkflow_cli.training.run_folder import RunFolder, open_run_folder, shared_run_folder


def open_folder(loaded: LoadedConfig, data: RunData | None) -> RunFolder:
    """Return the folder of the run, opened and locked once for all ranks.

    If torchrun or deepspeed started the ranks, rank 0 opens the folder and sends its path to the others. That needs a
    process group, whose collectives would not wait for tokenisation, so the data is tokenised first.

    Args:
        data: None in a worker of our launcher, which has opened the folder.

    Raises:
        UsageError: the folder is wrong; on all ranks.
        RunError: the checkpoint to continue from is damaged; on all ranks.
    """
    resume = loaded.config.checkpoint.resume
    if (given := worker_folder()) is not None:
        return shared_run_folder(given, resume)
    assert data is not None
    if processes() == 1:
        return open_run_folder(loaded, identify(loaded.config, data))
    init_process_group(training_device())
    opened: RunFolder | None = None
    answer: Path | ChunkflowError | None = None
    if rank() == 0:
        try:
            opened = open_run_folder(loaded, identify(loaded.config, data))
            answer = opened.path
            WatchFolder(answer).prepare()
        except ChunkflowError as error:
            answer = error
    answer = broadcast_from_first(answer)
    if isinstance(answer, ChunkflowError):
        raise answer
    if opened is not None:
        return opened
    assert answer is not None
    return shared_run_folder(answer, resume)


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


def load_data(config: Config, hf_config: Any | None) -> RunData:
    """Load the data as `load_run_data` does; one of the ranks that share a cache folder tokenises, the others wait."""
    if processes() == 1:
        return load_run_data(config, hf_config)
    root = cache_root(config.data.cache_dir)
    with to_be_writable(f"the token cache {root}", "set data.cache_dir to a folder that you can write to"):
        root.mkdir(parents=True, exist_ok=True)
        (root / ".ranks.lock").touch()
    with one_at_a_time(root / ".ranks.lock"):
        return load_run_data(config, hf_config)
