"""How a rank finds the folder and the data of its run: on its own, as our worker, or started by another launcher."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.data.cache import cache_root
from chunkflow_cli.engine import broadcast_from_first, init_process_group
from chunkflow_cli.errors import ChunkflowError
from chunkflow_cli.files import one_at_a_time
from chunkflow_cli.model.device import training_device
from chunkflow_cli.processes.environment import processes, rank, worker_folder
from chunkflow_cli.processes.hang_watch import watched_together
from chunkflow_cli.processes.watch_folder import WatchFolder
from chunkflow_cli.processes.worker import redirect_output
from chunkflow_cli.training.inputs import RunData, load_run_data
from chunkflow_cli.training.run_folder import RunFolder, open_run_folder, shared_run_folder


def open_folder(loaded: LoadedConfig, hf_config: Any | None) -> RunFolder:
    """Return the folder of the run, opened and locked once for all ranks.

    If torchrun or deepspeed started the ranks, rank 0 opens the folder and sends its path to the others. That needs a
    process group, whose collectives would not wait for tokenisation, so the data is tokenised first. From then on the
    output of every other rank goes to its log.

    Args:
        loaded: the configuration, the same on all ranks.
        hf_config: the configuration of the model.

    Raises:
        UsageError: the folder or the data is at fault; on all ranks.
    """
    resume = loaded.config.checkpoint.resume
    folder = worker_folder()
    if folder is not None:
        return shared_run_folder(folder, resume)
    if processes() == 1:
        return open_run_folder(loaded)
    load_data(loaded.config, hf_config)
    init_process_group(training_device())
    opened: RunFolder | None = None
    answer: Path | ChunkflowError | None = None
    if rank() == 0:
        try:
            opened = open_run_folder(loaded)
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
    redirect_output(WatchFolder(answer).log(rank()), keep_stderr=False)
    return shared_run_folder(answer, resume)


def watched(folder: RunFolder, hang_seconds: float) -> AbstractContextManager[None]:
    """Return a context within which a hang is noticed: by our launcher, or without it by the ranks themselves."""
    if worker_folder() is not None or processes() == 1:
        return nullcontext()
    return watched_together(WatchFolder(folder.path), rank(), processes(), hang_seconds)


def load_data(config: Config, hf_config: Any | None) -> RunData:
    """Load the data as `load_run_data` does; one of the ranks that share a cache folder tokenises, the others wait."""
    if processes() == 1:
        return load_run_data(config, hf_config)
    with one_at_a_time(cache_root(config.data.cache_dir) / ".ranks.lock"):
        return load_run_data(config, hf_config)
