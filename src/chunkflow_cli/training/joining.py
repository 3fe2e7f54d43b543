"""How a process finds the folder and the data of its run: alone, as a worker of ours, or under a foreign launcher."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from chunkflow_cli.config.load import LoadedConfig
from chunkflow_cli.config.schema import Config
from chunkflow_cli.data.cache import cache_root
from chunkflow_cli.engine import broadcast_from_first, init_process_group
from chunkflow_cli.errors import ChunkflowError
from chunkflow_cli.model.device import training_device
from chunkflow_cli.processes import worker
from chunkflow_cli.processes.hang_watch import watched_together
from chunkflow_cli.training.inputs import RunData, load_run_data
from chunkflow_cli.training.run_folder import RunFolder, open_run_folder, shared_run_folder


def open_folder(loaded: LoadedConfig, hf_config: Any | None) -> RunFolder:
    """The run's folder, opened and locked once for all of its ranks.

    Where torchrun or deepspeed has started them, rank 0 opens it and tells the others. That takes a process group, so
    the data is tokenised before. From then on every other rank's output goes to its log.

    Args:
        loaded: the configuration, of which all ranks have the same.
        hf_config: the model's.

    Raises:
        UsageError: the folder or the data is at fault; on all ranks.
    """
    config = loaded.config
    folder = worker.worker_folder()
    if folder is not None:
        return shared_run_folder(folder, config.checkpoint.resume)
    if worker.processes() == 1:
        return open_run_folder(loaded)
    load_data(config, hf_config)
    init_process_group(training_device())
    opened: RunFolder | ChunkflowError | None = None
    if worker.rank() == 0:
        try:
            opened = open_run_folder(loaded)
            worker.WatchFolder(opened.path).empty()
        except ChunkflowError as error:
            opened = error
    told = broadcast_from_first(opened.path if isinstance(opened, RunFolder) else opened)
    if isinstance(told, ChunkflowError):
        raise told
    assert isinstance(told, Path)
    if isinstance(opened, RunFolder):
        return opened
    worker.redirect_output(worker.WatchFolder(told).log(worker.rank()), keep_stderr=False)
    return shared_run_folder(told, config.checkpoint.resume)


def watched(folder: RunFolder, hang_seconds: float) -> AbstractContextManager[None]:
    """Within it somebody finds out if the run hangs: our launcher, or where another one has started the ranks, they."""
    if worker.worker_folder() is not None or worker.processes() == 1:
        return nullcontext()
    return watched_together(worker.WatchFolder(folder.path), worker.rank(), worker.processes(), hang_seconds)


def load_data(config: Config, hf_config: Any | None) -> RunData:
    """As `load_run_data`; of the ranks that share a cache folder one tokenises, and the others wait and find it."""
    if worker.processes() == 1:
        return load_run_data(config, hf_config)
    with worker.one_at_a_time(cache_root(config.data.cache_dir) / ".ranks.lock"):
        return load_run_data(config, hf_config)
