"""The training engine: the only room that imports deepspeed."""

from chunkflow_cli.engine.data_parallel import Engine
from chunkflow_cli.engine.processes import (
    broadcast_from_first,
    close_process_group,
    import_deepspeed,
    init_process_group,
)
from chunkflow_cli.engine.settings import EngineSettings, check_settings, deepspeed_config

__all__ = [
    "Engine",
    "EngineSettings",
    "broadcast_from_first",
    "check_settings",
    "close_process_group",
    "deepspeed_config",
    "import_deepspeed",
    "init_process_group",
]
