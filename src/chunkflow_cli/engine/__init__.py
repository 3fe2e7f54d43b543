"""The training engine: the only room that imports deepspeed."""

from chunkflow_cli.engine.data_parallel import Engine
from chunkflow_cli.engine.processes import (
    Processes,
    close_process_group,
    import_deepspeed,
    init_process_group,
    join_processes,
    launched_processes,
    launched_rank,
)
from chunkflow_cli.engine.settings import EngineSettings, check_settings, deepspeed_config

__all__ = [
    "Engine",
    "EngineSettings",
    "Processes",
    "check_settings",
    "close_process_group",
    "deepspeed_config",
    "import_deepspeed",
    "init_process_group",
    "join_processes",
    "launched_processes",
    "launched_rank",
]
